"""What became of a repair, in Python and in JSON. May import: details, shown, errors; torch for its types only."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tacfast._rust import __version__
from tacfast.details import number, optional_number, read_details, seconds, words
from tacfast.errors import CheckpointError
from tacfast.shown import Shown, read_json

if TYPE_CHECKING:
    from torch import nn

SCHEMA = "tacfast.repair/1"

Method = Literal["auto", "unlearn", "finetune", "equalize", "head", "prune"]

#: Below this part of what it was, a target's mean probability says that the class is forgotten. Repaired ResNets for CIFAR-10 kept 0.85
#: and more of it, transformers 0.35 and more, networks of 200 classes that no longer knew the class a 30th and less
#: (docs/repair-choices.md).
_FORGOTTEN = 0.1
#: What people are told then.
FORGOTTEN = (
    "the repaired model hardly names the target class any more: its images will get other classes, and the backdoor may be masked by that "
    "rather than gone"
)


@dataclass(frozen=True, eq=False)
class State:
    """A model before or after a repair. Accuracies are on the clean samples that were held out of it."""

    clean_accuracy: float
    #: The same on the samples of the target class, the worst of several; None where none was held out.
    target_accuracy: float | None
    #: Share of samples that get the same class as before the repair.
    agreement: float
    #: Share of samples that keep their class when their latents are shifted by s_p, worst target; None without targets.
    recovery_accuracy: float | None
    #: Share of samples that a universal perturbation of the input, made anew, sends to the target; None without targets, and for
    #: the methods of seconds ("head", "prune").
    reach: float | None
    #: float64 (C,): norms of all classes, as in a scan.
    norms: NDArray[np.float64]
    #: Mean probability that the model gives the target class on these samples, the lowest of several; None without targets, and in
    #: reports of versions that did not tell.
    target_probability: float | None = None

    def to_dict(self) -> dict[str, Any]:
        norms = [float(v) if np.isfinite(v) else None for v in self.norms]
        return {
            "clean_accuracy": self.clean_accuracy,
            "target_accuracy": self.target_accuracy,
            "agreement": self.agreement,
            "recovery_accuracy": self.recovery_accuracy,
            "reach": self.reach,
            "norms": norms,
            "target_probability": self.target_probability,
        }

    @classmethod
    def from_dict(cls, data: Any) -> State:
        """Read what `to_dict` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        norms = np.array([np.inf if v is None else number(v) for v in data["norms"]], dtype=float)
        return cls(
            clean_accuracy=number(data["clean_accuracy"]),
            target_accuracy=optional_number(data["target_accuracy"]),
            agreement=number(data["agreement"]),
            recovery_accuracy=optional_number(data["recovery_accuracy"]),
            reach=optional_number(data["reach"]),
            norms=norms,
            target_probability=optional_number(data.get("target_probability")),
        )


@dataclass(frozen=True)
class Trial:
    """What one learning rate of method "auto" led to, on the clean samples that were held out."""

    lr: float
    clean_accuracy: float
    #: See `State.reach`.
    reach: float | None
    #: How far what the last inner layer says of these samples has moved: squared distance, relative to the spread; the mean. None where
    #: there is no such layer.
    drift: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"lr": self.lr, "clean_accuracy": self.clean_accuracy, "reach": self.reach, "drift": self.drift}

    @classmethod
    def from_dict(cls, data: Any) -> Trial:
        """Read what `to_dict` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        return cls(number(data["lr"]), number(data["clean_accuracy"]), optional_number(data["reach"]), optional_number(data.get("drift")))


@dataclass(frozen=True, repr=False, eq=False)
class RepairResult(Shown):
    """A repaired copy and what became of it."""

    #: The repaired copy on the CPU, in eval mode; None when there was nothing to do, or when the
    #: result was read from a file.
    model: nn.Module | None
    method: Method
    #: The classes whose backdoor was removed.
    targets: tuple[int, ...]
    before: State
    after: State | None
    #: Clean samples used, held out ones included.
    samples: int
    #: True where the classes came with the data, False where the model's own predictions stood in for them.
    labelled: bool
    settings: Mapping[str, Any]
    timing_s: Mapping[str, float]
    #: What "auto" tried, in this order; `settings` has the learning rate that it took.
    trials: tuple[Trial, ...] = ()
    file: Mapping[str, Any] = field(default_factory=dict)
    #: Names of the classes and provenance for a page, see `tacfast.details`; None unless the caller gave them.
    details: Mapping[str, Any] | None = None

    @property
    def forgotten(self) -> bool:
        """Whether the repaired model hardly names the target class any more: its mean probability is below a tenth of what it was.

        Images of the class then get another one; and the backdoor may be masked by that rather than gone.
        """
        before, after = self.before.target_probability, None if self.after is None else self.after.target_probability
        return before is not None and after is not None and after < _FORGOTTEN * before

    def __repr__(self) -> str:
        if self.after is None:
            return "RepairResult(nothing to do)"
        before, after = self.before.clean_accuracy, self.after.clean_accuracy
        return f"RepairResult({self.method}, targets={list(self.targets)}, clean accuracy {before:.3f} -> {after:.3f})"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, as JSON can hold it: schema `tacfast.repair/1`.

        `details`, where there are any: `names`, `names_from` and `provenance` of `tacfast.details`.
        """
        return {
            "schema": SCHEMA,
            "tool_version": __version__,
            "repaired": self.after is not None,
            "method": self.method,
            "targets": list(self.targets),
            "before": self.before.to_dict(),
            "after": None if self.after is None else self.after.to_dict(),
            "samples": self.samples,
            "labelled": self.labelled,
            "settings": dict(self.settings),
            "timing_s": dict(self.timing_s),
            "trials": [trial.to_dict() for trial in self.trials],
            "file": dict(self.file),
            **({} if self.details is None else {"details": dict(self.details)}),
        }

    @classmethod
    def from_dict(cls, data: Any) -> RepairResult:
        """Read what `to_dict` wrote; the model is not in it.

        Raises:
            CheckpointError: it is not a result of this schema.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise CheckpointError(f'not a repair report: expected a JSON object with "schema": "{SCHEMA}"')
        try:
            before, after = State.from_dict(data["before"]), None if data["after"] is None else State.from_dict(data["after"])
            classes = len(before.norms)
            targets = tuple(operator.index(k) for k in data["targets"])
            if data["method"] not in get_args(Method):
                raise ValueError(f"unknown method {str(data['method'])[:40]!r}")
            if any(not 0 <= k < classes for k in targets) or (after is not None and len(after.norms) != classes):
                raise ValueError("targets and norms must be those of one number of classes")
            if not isinstance(data["labelled"], bool) or data["repaired"] is not (after is not None):
                raise ValueError("labelled and repaired must be true or false, the latter as there is a state after or not")
            return cls(
                model=None,
                method=data["method"],
                targets=targets,
                before=before,
                after=after,
                samples=operator.index(data["samples"]),
                labelled=data["labelled"],
                settings=words(data["settings"]),
                timing_s=seconds(data["timing_s"]),
                trials=tuple(map(Trial.from_dict, data["trials"])),
                file=words(data["file"]),
                details=read_details(data.get("details"), classes),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"repair report is damaged: {type(error).__name__}: {error}") from None

    @classmethod
    def from_json(cls, path: str | Path) -> RepairResult:
        """Read a result's file of at most 64 MiB; see `from_dict`."""
        return cls.from_dict(read_json(path, "repair report"))
