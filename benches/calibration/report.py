"""Tables over the lines of train.py: how often clean networks are flagged, and which backdoors are found.

    report.py results.jsonl [--seeds odd] [--alpha 0.05]

Rules are chosen on even seeds and reported on odd ones. Three rules stand side by side: tacfast's, the field's MAD index > 2 on the norms
of the published method (every sample counts), and the gap between the two smallest of these norms, whose threshold is the even clean
networks' own quantile. A backdoor counts where it works: each trigger's ASR at least 0.9 times the clean accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from results import read_lines
from scipy.stats import beta

from tacfast.outliers import FEWEST_CLASSES, mad_index, step_down
from tacfast.scan import QUANTILE

Line = dict[str, Any]
#: A network's suspects, most abnormal first; none where it is not flagged.
Rule = Callable[[Line], list[int]]

WORKS = 0.9
STRONG = 0.85


class Seeds(str, Enum):
    odd = "odd"
    even = "even"
    all = "all"


def tested_norms(line: Line, quantile: float) -> tuple[np.ndarray, np.ndarray]:
    """Classes with a positive, finite norm, and these norms."""
    norms = np.array(line["scan"][f"norms_{quantile:g}"], dtype=np.float64)
    classes = np.flatnonzero(np.nan_to_num(norms) > 0)
    return classes, norms[classes]


def tacfast_rule(alpha: float) -> Rule:
    def suspects(line: Line) -> list[int]:
        classes, norms = tested_norms(line, QUANTILE)
        if len(norms) < FEWEST_CLASSES:
            return []
        return [int(classes[at]) for at, p, _ in step_down(norms, alpha) if p <= alpha]

    return suspects


def mad_rule(threshold: float = 2.0) -> Rule:
    def suspects(line: Line) -> list[int]:
        classes, norms = tested_norms(line, 1.0)
        return [int(classes[norms.argmin()])] if len(norms) and mad_index(norms) > threshold else []

    return suspects


def gap(line: Line) -> float:
    """log of the second smallest norm over the smallest, with every sample counted."""
    norms = np.sort(tested_norms(line, 1.0)[1])
    return float(np.log(norms[1] / norms[0])) if len(norms) > 1 else 0.0


def gap_rule(threshold: float) -> Rule:
    def suspects(line: Line) -> list[int]:
        classes, norms = tested_norms(line, 1.0)
        return [int(classes[norms.argmin()])] if gap(line) > threshold else []

    return suspects


def interval(hits: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Clopper & Pearson 1934)."""
    low = float(beta.ppf(0.025, hits, total - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, total - hits)) if hits < total else 1.0
    return low, high


def share(hits: int, total: int) -> str:
    if not total:
        return "-"
    low, high = interval(hits, total)
    return f"{hits}/{total} = {hits / total:.0%} ({low:.0%} to {high:.0%})"


@dataclass(frozen=True)
class Tables:
    """Markdown tables over some lines."""

    lines: Sequence[Line]
    rules: dict[str, Rule]

    def false_positives(self, by: Callable[[Line], str]) -> str:
        rows = []
        for name, group in grouped([line for line in self.lines if is_clean(line)], by):
            flagged = [share(sum(bool(rule(line)) for line in group), len(group)) for rule in self.rules.values()]
            rows.append([name, accuracies(group), *flagged])
        return markdown(["clean networks", "clean accuracy", *(f"{name}: flagged" for name in self.rules)], rows)

    def detection(self, by: Callable[[Line], str]) -> str:
        """Found / target named / working networks, for each rule."""
        rows = []
        for name, every in grouped([line for line in self.lines if not is_clean(line)], by):
            group = [line for line in every if works(line)]
            cells = []
            for rule in self.rules.values():
                found = [(line, rule(line)) for line in group]
                right = sum(bool(targets(line) & set(suspects)) for line, suspects in found)
                cells += [share(sum(bool(s) for _, s in found), len(group)), f"{right}/{len(group)}"]
            rows.append([name, f"{len(group)} of {len(every)}", *cells])
        heads = [head for name in self.rules for head in (f"{name}: flagged", "target named")]
        return markdown(["poisoned networks", "attack works", *heads], rows)


def is_clean(line: Line) -> bool:
    return bool(line["attack"] == "clean")


def works(line: Line) -> bool:
    return bool(min(line["asr"]) >= WORKS * line["clean_accuracy"])


def targets(line: Line) -> set[int]:
    return set(line["truth"]["targets"]) | {target for _, target in line["truth"]["pairs"]}


def grouped(lines: Iterable[Line], by: Callable[[Line], str]) -> list[tuple[str, list[Line]]]:
    """Groups in the order of their names, then all together."""
    every = list(lines)
    names = sorted({by(line) for line in every})
    return [(name, [line for line in every if by(line) == name]) for name in names] + [("all", every)]


def accuracies(group: Sequence[Line]) -> str:
    if not group:
        return "-"
    found = [line["clean_accuracy"] for line in group]
    return f"{min(found):.1%} to {max(found):.1%}"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_attack(line: Line) -> str:
    return f"{line['attack']}, {line['rate']:.1%}"


def by_dataset(line: Line) -> str:
    return f"{line['dataset']}, accuracy {'>=' if line['clean_accuracy'] >= STRONG else '<'} {STRONG:.0%}"


def by_arch(line: Line) -> str:
    return f"{line['dataset']}, {line['arch']}"


def main(
    results: Annotated[list[Path], typer.Argument(help="Files of JSON lines.")],
    seeds: Annotated[Seeds, typer.Option(help="Networks that are reported.")] = Seeds.odd,
    alpha: Annotated[
        float, typer.Option(help="Level of tacfast's rule, and false-positive rate that the gap's threshold is chosen for.")
    ] = 0.05,
) -> None:
    """Print detection and false positives as markdown tables."""
    every = [line for path in results for line in read_lines(path)]
    newest = max((line["recipe"] for line in every), default=0)
    every = [line for line in every if line["recipe"] == newest]
    gaps = [gap(line) for line in every if is_clean(line) and line["seed"] % 2 == 0]
    threshold = float(np.quantile(gaps, 1 - alpha)) if gaps else np.inf
    rules = {f"tacfast, p <= {alpha:g}": tacfast_rule(alpha), "MAD > 2": mad_rule(), f"gap > {threshold:.3f}": gap_rule(threshold)}
    parity = {"even": {0}, "odd": {1}, "all": {0, 1}}[seeds.value]
    tables = Tables([line for line in every if line["seed"] % 2 in parity], rules)
    print(f"{len(tables.lines)} networks of recipe {newest}, {seeds.value} seeds; in brackets 95 % Clopper-Pearson intervals.\n")
    for title, by in (("data set", by_dataset), ("architecture", by_arch)):
        print(f"## False positives by {title}\n\n{tables.false_positives(by)}\n")
    for title, by in (("attack and poisoning rate", by_attack), ("data set", by_dataset), ("architecture", by_arch)):
        print(f"## Detection by {title}\n\n{tables.detection(by)}\n")


if __name__ == "__main__":
    typer.run(main)
