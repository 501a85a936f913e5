"""One method on one network with one share of clean data: what is run, and the line that it leaves. May import: subjects, scores, defences,
tacfast."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defences import DEFENCES, FINE_TUNING, NotApplicable, Task
from scores import behaviour, effectiveness, rounded
from subjects import Subject
from torch import nn

import tacfast
from tacfast.checkpoints import save_safetensors

#: Beside other people's defences: the network as it is, and its twin that was never poisoned, which says what a perfect repair would score.
CONTROLS = ("none", "clean-twin")
_TACFAST = "tacfast:"


@dataclass(frozen=True)
class Method:
    """`NAME` or `NAME@KEY=VALUE,...`: one of the defences (KEY: epochs; slower, by which the learning rate of those that
    fine-tune is divided), a control, or tacfast:METHOD (KEY: an option of `tacfast.repair`)."""

    text: str

    @property
    def name(self) -> str:
        return self.text.partition("@")[0]

    @property
    def options(self) -> dict[str, Any]:
        listed = [part.partition("=") for part in self.text.partition("@")[2].split(",") if part]
        return {key: _number(value) for key, _, value in listed}

    def check(self) -> None:
        """Raises ValueError."""
        known = self.name.startswith(_TACFAST) or self.name in (*DEFENCES, *CONTROLS)
        if not known:
            raise ValueError(f"method must be tacfast:METHOD or one of {', '.join((*CONTROLS, *DEFENCES))}, got {self.name!r}")
        own = ("epochs", "slower") if self.name in FINE_TUNING else ("epochs",)
        if not self.name.startswith(_TACFAST) and set(self.options) - {*own}:
            raise ValueError(f"{self.name} has the settings of its paper; only {' and '.join(own)} can be given, got {self.text!r}")


@dataclass(frozen=True)
class Attempt:
    """A line of the results."""

    network: str
    method: Method
    share: float
    seed: int
    epochs: int
    #: "truth" or "scan".
    targets: str
    bfloat16: bool

    @property
    def key(self) -> str:
        """Names the attempt in results, files and locks."""
        name = f"{self.network}--{self.method.text}--{self.share:g}-{self.seed}-{self.epochs}-{self.targets}{'-bf16' * self.bfloat16}"
        return name.replace(":", "_").replace("/", "_")

    def to_dict(self) -> dict[str, Any]:
        more = {name: getattr(self, name) for name in ("share", "seed", "epochs", "targets", "bfloat16")}
        return {"attempt": self.key, "key": self.network, "method": self.method.text, **more}


@dataclass(frozen=True)
class Named:
    """What a method is told of a backdoor; other people's defences hear of the targets alone."""

    targets: tuple[int, ...]
    #: (source, target) where not every class is a source.
    pairs: tuple[tuple[int, int], ...]


def attempt(subject: Subject, job: Attempt, models: Path | None) -> dict[str, Any]:
    """Repair, measure, keep the weights in the folder `models`, and return the line."""
    images, labels = subject.clean(job.share)
    line = {**job.to_dict(), **{name: subject.line[name] for name in ("dataset", "arch", "attack", "rate")}}
    line |= {"network_seed": subject.line["seed"], "classes": subject.data.classes, "samples": len(images), "version": tacfast.__version__}
    named = Named(subject.targets, subject.pairs)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        if job.targets == "scan":
            report = tacfast.scan(subject.model, _batches(images, labels), device="cpu")
            named = Named(report.targets, report.pairs)
        line["named"] = list(named.targets)
        repaired, told = _repaired(subject, job, named)
    except (NotApplicable, tacfast.TacfastError) as error:
        return line | {"refused": f"{type(error).__name__}: {error}"}
    line |= {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    if told is not None:
        line["told"] = told
    measured = subject.before, behaviour(repaired, subject.doors, subject.targets, *subject.rest)
    if models is not None:
        save_safetensors(repaired, models / f"{job.key}.safetensors", {})
    return rounded(line | {"before": measured[0], "after": measured[1], "der": effectiveness(*measured)})


def _repaired(subject: Subject, job: Attempt, named: Named) -> tuple[nn.Module, dict[str, Any] | None]:
    """In eval mode, and what `tacfast.repair` says of it, norms apart.

    A method that needs targets and is given none leaves the network as it is: a backdoor that a scan missed stays.
    """
    name = job.method.name
    images, labels = subject.clean(job.share)
    if name == "clean-twin":
        return subject.twin(), None
    if name == "none" or (not named.targets and (name == "nc" or name.startswith(_TACFAST))):
        return subject.copied(), None
    if name.startswith(_TACFAST):
        how: dict[str, Any] = {"method": name.removeprefix(_TACFAST), **job.method.options}
        how |= {"pairs": named.pairs} if named.pairs else {"targets": named.targets}
        result = tacfast.repair(subject.model, _batches(images, labels), seed=job.seed, device="cpu", **how)
        if result.model is None or result.after is None:
            return subject.copied(), None
        states = {"before": result.before.to_dict(), "after": result.after.to_dict()}
        told = {when: {key: value for key, value in state.items() if key != "norms"} for when, state in states.items()}
        return result.model, told | {
            "method": result.method,
            "settings": dict(result.settings),
            "timing_s": dict(result.timing_s),
            "trials": [t.to_dict() for t in result.trials],
        }
    task = Task(
        subject.model,
        images,
        labels,
        named.targets,
        epochs=job.method.options.get("epochs", job.epochs),
        slower=job.method.options.get("slower", 1.0),
        seed=job.seed,
        dataset=subject.line["dataset"],
        view=subject.view(),
        bfloat16=job.bfloat16 and subject.bfloat16,
    )
    return DEFENCES[name](task), None


def _batches(images: Any, labels: Any) -> list[tuple[Any, Any]]:
    return list(zip(images.split(250), labels.split(250), strict=True))


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
