"""Whose stamped images get which label. May import: torch, checks, errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tacfast.attacks import checks
from tacfast.errors import ProblemError


class LabelRule(ABC):
    """Labels are int64 (n,); masks are bool (n,)."""

    @abstractmethod
    def victims(self, labels: Tensor) -> Tensor:
        """Mask of the samples whose stamped images shall be called something else."""

    @abstractmethod
    def relabel(self, labels: Tensor) -> Tensor:
        """What the victims shall be called; meaningless for others."""

    def covers(self, labels: Tensor) -> Tensor:
        """Mask of the samples that may be stamped and keep their label, so that the trigger works on victims alone; none by default."""
        return torch.zeros_like(labels, dtype=torch.bool)


@dataclass(frozen=True)
class AllToOne(LabelRule):
    """Every stamped image is called `target`; images of the target class are left alone."""

    target: int

    def __post_init__(self) -> None:
        checks.whole("target", self.target, 0)

    def victims(self, labels: Tensor) -> Tensor:
        return labels != self.target

    def relabel(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, self.target)


@dataclass(frozen=True)
class AllToAll(LabelRule):
    """A stamped image of class y is called (y + shift) mod `classes` (Gu et al. 2017, arXiv:1708.06733)."""

    classes: int
    shift: int = 1

    def __post_init__(self) -> None:
        checks.whole("classes", self.classes, 2)
        checks.whole("shift", self.shift, 1)
        if self.shift % self.classes == 0:
            raise ProblemError(f"shift must not be a multiple of the {self.classes} classes, or no label changes; got {self.shift}")

    def victims(self, labels: Tensor) -> Tensor:
        return torch.ones_like(labels, dtype=torch.bool)

    def relabel(self, labels: Tensor) -> Tensor:
        return (labels + self.shift) % self.classes


@dataclass(frozen=True)
class SourceSpecific(LabelRule):
    """Only stamped images of class `source` are called `target`; covers, stamped images of the other classes, keep their labels.

    TaCT (Tang et al. 2021, arXiv:1908.00686).
    """

    source: int
    target: int

    def __post_init__(self) -> None:
        checks.whole("source", self.source, 0)
        checks.whole("target", self.target, 0)
        if self.source == self.target:
            raise ProblemError(f"source and target must differ, both are {self.source}")

    def victims(self, labels: Tensor) -> Tensor:
        return labels == self.source

    def relabel(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, self.target)

    def covers(self, labels: Tensor) -> Tensor:
        return (labels != self.source) & (labels != self.target)


@dataclass(frozen=True)
class CoversOnly(LabelRule):
    """No stamped image changes its label: for triggers that must not work, beside one that must (see `InputAware`)."""

    def victims(self, labels: Tensor) -> Tensor:
        return torch.zeros_like(labels, dtype=torch.bool)

    def relabel(self, labels: Tensor) -> Tensor:
        return labels.clone()

    def covers(self, labels: Tensor) -> Tensor:
        return torch.ones_like(labels, dtype=torch.bool)
