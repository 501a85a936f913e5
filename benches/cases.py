"""The problems that solvers are timed on: a synthetic head, and the QP of one of its classes in the forms that solvers want.

What all classes share (W in float64, W Wᵀ, scratch memory) is made once and is never timed. What belongs to one class (its rows
a_j = w_k - w_j, its Gram matrix, its factor) is made anew whenever a solver asks for it, inside the timer. The margins r are an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

import tacfast
from tacfast.bench import synthetic_head

Floats = NDArray[np.float64]


class Case:
    """A head with C classes, d latents and n samples, its certified norms, and what the QPs of its classes share."""

    def __init__(self, classes: int, dim: int, samples: int) -> None:
        self.classes, self.dim, self.samples = classes, dim, samples
        self.weight32, _, self.latents = synthetic_head(classes, dim, samples)
        self.weight = self.weight32.astype(np.float64)
        self.gram = self.weight @ self.weight.T
        self.solutions = tacfast.solve(self.weight, None, self.latents)
        assert (self.solutions.status == "solved").all()

    @cached_property
    def logits(self) -> Floats:
        """float64 (n, C)."""
        return self.latents @ self.weight.T

    @cached_property
    def scratch(self) -> dict[str, Floats]:
        """Memory for the rows and the Gram matrix of the class at hand: fresh pages would cost more than filling them."""
        others = self.classes - 1
        return {"rows": np.empty((others, self.dim)), "gram": np.empty((others, others))}

    def spread(self, count: int) -> list[int]:
        """`count` classes, evenly spread."""
        return np.unique(np.linspace(0, self.classes - 1, min(count, self.classes)).astype(int)).tolist()

    def qp(self, k: int) -> ClassQP:
        return ClassQP(self, k)


class ClassQP:
    """min ½‖s‖² subject to A s ≥ r: the collapsed problem of one class, m = C - 1 constraints."""

    def __init__(self, case: Case, k: int) -> None:
        self.case, self.k, self.dim = case, k, case.dim
        self.norm = float(case.solutions.norms[k])
        self.r: Floats = self._margins()

    def _margins(self) -> Floats:
        """r_kj = max_i (l_ij - l_ik), (m,)."""
        logits = self.case.logits
        return np.delete((logits - logits[:, [self.k]]).max(axis=0), self.k)

    def rows(self) -> Floats:
        """A, (m, d): the differences w_k - w_j. Overwritten by the next class."""
        w, k, out = self.case.weight, self.k, self.case.scratch["rows"]
        np.subtract(w[k], w[:k], out=out[:k])
        np.subtract(w[k], w[k + 1 :], out=out[k:])
        return out

    def gram(self) -> Floats:
        """A Aᵀ, (m, m), from the shared W Wᵀ. Overwritten by the next class."""
        shared, k, out = self.case.gram, self.k, self.case.scratch["gram"]
        others = np.delete(np.arange(self.case.classes), k)
        column = shared[k, others]
        np.subtract(shared[np.ix_(others, others)], column, out=out)
        out += (shared[k, k] - column)[:, None]
        return out

    def shift(self, multipliers: Floats) -> Floats:
        """s = Aᵀλ, (d,), from the rows that count."""
        positive = np.flatnonzero(multipliers)
        rivals = positive + (positive >= self.k)
        x = multipliers[positive]
        return x.sum() * self.case.weight[self.k] - x @ self.case.weight[rivals]

    def errors(self, shift: Floats) -> tuple[float, float]:
        """How far the deepest violated constraint is missed, relative to max|r|, and the relative difference to our certified norm."""
        missed = np.maximum(self.r - self.rows() @ shift, 0).max() / np.abs(self.r).max()
        return float(missed), float(abs(np.linalg.norm(shift) / self.norm - 1))


class UncollapsedQP(ClassQP):
    """The same problem as published: a constraint for every rival and every sample, m = n (C - 1)."""

    def _margins(self) -> Floats:
        logits = self.case.logits
        return np.delete(logits - logits[:, [self.k]], self.k, axis=1).T.ravel()

    def rows(self) -> Floats:
        return np.repeat(super().rows(), self.case.samples, axis=0)


@cache
def case(classes: int, dim: int, samples: int) -> Case:
    """The case, made once."""
    return Case(classes, dim, samples)


def worst(qps: Sequence[ClassQP], shifts: Sequence[Floats]) -> tuple[float, float]:
    """The larger of each error over classes."""
    missed, apart = zip(*(qp.errors(s) for qp, s in zip(qps, shifts, strict=True)), strict=True)
    return max(missed), max(apart)
