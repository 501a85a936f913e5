"""What became of a repair, in Python and in JSON. May import: numpy; torch for its types only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tacfast._rust import __version__

if TYPE_CHECKING:
    from torch import nn

SCHEMA = "tacfast.repair/1"

Method = Literal["auto", "unlearn", "finetune", "equalize", "head", "prune"]


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
    #: Share of samples that a universal perturbation of the input, made anew, sends to the target; None without targets.
    reach: float | None
    #: float64 (C,): norms of all classes, as in a scan.
    norms: NDArray[np.float64]

    def to_dict(self) -> dict[str, Any]:
        norms = [float(v) if np.isfinite(v) else None for v in self.norms]
        return {
            "clean_accuracy": self.clean_accuracy,
            "target_accuracy": self.target_accuracy,
            "agreement": self.agreement,
            "recovery_accuracy": self.recovery_accuracy,
            "reach": self.reach,
            "norms": norms,
        }


@dataclass(frozen=True, repr=False, eq=False)
class RepairResult:
    """A repaired copy and what became of it."""

    #: The repaired copy on the CPU, in eval mode; None when there was nothing to do.
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
    file: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        if self.after is None:
            return "RepairResult(nothing to do)"
        before, after = self.before.clean_accuracy, self.after.clean_accuracy
        return f"RepairResult({self.method}, targets={list(self.targets)}, clean accuracy {before:.3f} -> {after:.3f})"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, as JSON can hold it: schema `tacfast.repair/1`."""
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
            "file": dict(self.file),
        }
