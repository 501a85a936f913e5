"""Scans of stored heads, with the patterns of the input that patterns.py measured, each made once and kept as a JSON line: an
interrupted run goes on where it was.

    scans.py DIR [DIR...] [--alpha 0.05] [--threads 1]

DIR is a folder of train.py; outcomes go to DIR/scans.jsonl. An outcome holds for one head, one way of changing it, one level and one state
of the code that decides: whoever edits the rule gets new scans, and a line of another rule is never read as one of this.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from measured import Measured
from networks import Line, Pair, read_networks
from numpy.typing import NDArray
from results import append_line, read_lines
from states import state_of

import tacfast
from tacfast.files import read_npz
from tacfast.openness import Patterns
from tacfast.progress import track

#: Sources that no scan of a head passes through; all others, those not yet written too, make a new rule when they change.
_ELSEWHERE = (
    "__main__",
    "architectures",
    "archives",
    "autograd",
    "backdoorbench",
    "bench",
    "checkpoints",
    "cli",
    "demo",
    "details",
    "device",
    "doctor",
    "errors",
    "examples",
    "explain",
    "files",
    "folders",
    "formats",
    "heads",
    "html",
    "images",
    "methods",
    "options",
    "outcome",
    "outputs",
    "patterns",
    "pickles",
    "preact",
    "precision",
    "preprocessing",
    "progress",
    "repair",
    "report",
    "sampling",
    "sarif",
    "schemas",
    "selftest",
    "shown",
    "sources",
    "taxonomy",
    "terminal",
    "universal",
    "unwrapping",
)

Folders = Annotated[list[Path], typer.Argument(help="Folders of train.py: results.jsonl, heads/, scans.jsonl.")]
Alpha = Annotated[float, typer.Option(help="Level of tacfast's rule.")]
Threads = Annotated[int, typer.Option(help="Threads of a scan.")]


@dataclass(frozen=True, eq=False)
class Head:
    """W (C, d), b (C,) or None, latents (n, d), true classes (n,)."""

    weight: NDArray[Any]
    bias: NDArray[Any] | None
    latents: NDArray[Any]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Task:
    """A scan to be made of a head in a file; `variant` says all of how `change` changes it, "" that it does not."""

    network: str
    file: Path
    variant: str = ""
    change: Callable[[Head], Head] = lambda head: head
    #: How far patterns of the input go; None: by the head alone.
    patterns: Patterns | None = None

    @property
    def identity(self) -> str:
        """Of the head and the patterns."""
        if self.patterns is None:
            return head_id(self.file)
        margins = repr([(kind, m.tolist()) for kind, m in self.patterns.margins.items()])
        return f"{head_id(self.file)}-{hashlib.sha256(margins.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Outcome:
    """What is kept of a scan report."""

    network: str
    variant: str
    verdict: str
    p: float | None
    suspects: tuple[int, ...]
    pairs: tuple[Pair, ...]
    kind: str | None
    samples: int
    accuracy: float | None
    #: Kind, class, standard deviations and p-value of each kind of evidence by itself: what a scan saw, when its head is gone.
    evidence: tuple[tuple[str, int | None, float, float], ...]

    @property
    def flagged(self) -> bool:
        return self.verdict == "backdoored"

    @classmethod
    def from_line(cls, line: Line) -> Outcome:
        return cls(
            network=line["network"],
            variant=line["variant"],
            verdict=line["verdict"],
            p=line["p"],
            suspects=tuple(line["suspects"]),
            pairs=tuple((source, target) for source, target in line["pairs"]),
            kind=line["kind"],
            samples=line["samples"],
            accuracy=line["accuracy"],
            evidence=tuple((kind, target, statistic, p) for kind, target, statistic, p in line["evidence"]),
        )


@cache
def rule_id() -> str:
    """Names the state of the sources that decide. The compiled core is left out: its answers carry certificates."""
    folder = Path(tacfast.__file__).parent
    sources = sorted(file for file in folder.glob("*.py") if file.stem not in _ELSEWHERE)
    return f"{tacfast.__version__}-{state_of(sources)}"


def head_id(file: Path) -> str:
    """Names the contents of an .npz by the checksums in its directory: quick, and the same wherever the file lies."""
    with zipfile.ZipFile(file) as archive:
        sums = sorted((member.filename, member.CRC) for member in archive.infolist())
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:12]


@lru_cache(maxsize=1)
def read_head(file: Path) -> Head:
    arrays, _ = read_npz(file)
    latents = arrays["Z"].astype(np.float32)
    return Head(arrays["W"], arrays.get("b"), latents, arrays["y"].astype(np.int64))


def scan_task(task: Task, alpha: float, threads: int) -> Outcome:
    head = task.change(read_head(task.file))
    report = tacfast.scan_head(
        head.weight, head.bias, head.latents, labels=head.labels, patterns=task.patterns, alpha=alpha, threads=threads
    )
    return Outcome(
        network=task.network,
        variant=task.variant,
        verdict=report.verdict,
        p=report.p_value,
        suspects=tuple(s.target for s in report.suspects),
        pairs=tuple((int(source), int(target)) for source, target in report.pairs),
        kind=report.kind,
        samples=report.samples,
        accuracy=report.clean_accuracy,
        evidence=tuple((e.kind, e.target, round(e.statistic, 3), round(e.p_value, 5)) for e in report.evidence),
    )


class Scans:
    """A file of outcomes, for one level and the rule of this process."""

    def __init__(self, file: Path, alpha: float, threads: int = 1) -> None:
        self.file, self.alpha, self.threads = file, alpha, threads
        found = [line for line in read_lines(file) if line["rule"] == rule_id() and line["alpha"] == alpha]
        self._kept = {(line["network"], line["variant"], line["head"]): Outcome.from_line(line) for line in found}

    def of(self, tasks: Sequence[Task], *, shown: bool = True) -> list[Outcome]:
        """The outcomes of the tasks, in their order, without those that have neither a head nor a line; a stop loses the scan at hand and
        none of those before."""
        return list(self._made(track(tasks, "scanning", shown=shown, total=len(tasks))))

    def kept(self, network: str, variant: str = "") -> Outcome | None:
        """The outcome of a network whose head is not at hand."""
        return next((o for (name, how, _), o in self._kept.items() if (name, how) == (network, variant)), None)

    def holds(self, network: str, what: str) -> bool:
        """Whether there is an outcome of the network with a change of this kind."""
        return any(name == network and variant.startswith(f"{what}=") for name, variant, _ in self._kept)

    def _made(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        for task in tasks:
            if not task.file.exists():
                kept = self.kept(task.network, task.variant)
                if kept is not None:
                    yield kept
                continue
            head = task.identity
            place = (task.network, task.variant, head)
            if place not in self._kept:
                self._kept[place] = scan_task(task, self.alpha, self.threads)
                append_line(self.file, {**asdict(self._kept[place]), "head": head, "rule": rule_id(), "alpha": self.alpha})
            yield self._kept[place]


def head_file(line: Line) -> Path:
    file: Path = line["folder"] / "heads" / f"{line['key']}.npz"
    return file


def scan_networks(lines: Sequence[Line], alpha: float, threads: int = 1, *, shown: bool = True) -> dict[str, Outcome]:
    """Outcome of each network, by key; those with neither a head nor a kept outcome are left out."""
    found: dict[str, Outcome] = {}
    for folder in dict.fromkeys(line["folder"] for line in lines):
        mine = [line for line in lines if line["folder"] == folder]
        scans = Scans(folder / "scans.jsonl", alpha, threads)
        present = [line for line in mine if head_file(line).exists()]
        patterns = Measured(folder)
        made = scans.of([Task(line["key"], head_file(line), patterns=patterns.kept(line["key"])) for line in present], shown=shown)
        absent = [scans.kept(line["key"]) for line in mine if not head_file(line).exists()]
        found |= {o.network: o for o in (*made, *absent) if o is not None}
    return found


def main(folders: Folders, alpha: Alpha = 0.05, threads: Threads = 1) -> None:
    """Scan every stored head that has no outcome yet."""
    lines = read_networks(folders)
    found = scan_networks(lines, alpha, threads)
    flagged = sum(o.flagged for o in found.values())
    print(f"{len(found)} of {len(lines)} networks are scanned by rule {rule_id()} at level {alpha:g}; {flagged} are flagged.")


if __name__ == "__main__":
    typer.run(main)
