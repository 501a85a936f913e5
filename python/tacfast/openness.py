"""Is a class abnormally open to patterns of the input? May import: outliers, numpy.

`patterns.py` measures how far small patterns go towards each class. Several targets stand out together and hide one another, so the r-th
largest margin is compared with the smaller ones alone, for r = 1, 2, ... (generalised extreme studentised deviates: Rosner 1983). The null
distribution is that of independent classes with normal margins, by simulation; having picked the kind of pattern and r is accounted for.
Beyond one class the level is FURTHER times smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tacfast.outliers import FEWEST_CLASSES, FURTHER, Look, share_beyond

Floats = NDArray[np.float64]

SHORT = "short pattern"
FEW_PIXELS = "few pixels"
#: Of more classes only some are looked at: those with the smallest norms, and others drawn at random.
MOST_CLASSES = 50
_BY_NORM = 10
#: Targets that are told apart, at most, and the share of the classes that they may be.
_TARGETS, _SHARE = 5, 3
_DRAWS = 20_000


@dataclass(frozen=True, eq=False)
class Patterns:
    """How far small patterns of the input go towards each class."""

    #: int64 (m,): the classes that were looked at, increasing.
    classes: NDArray[np.int64]
    #: By kind of pattern, float64 (m,): mean margin, in logits, of the class over the best other one on images that are not its own; NaN
    #: where there were no such images.
    margins: Mapping[str, Floats]

    def testable(self) -> Patterns | None:
        """The classes with all margins known; None if they are too few."""
        known = np.all([np.isfinite(m) for m in self.margins.values()], axis=0)
        if known.sum() < FEWEST_CLASSES:
            return None
        return Patterns(self.classes[known], {kind: m[known] for kind, m in self.margins.items()})


@dataclass(frozen=True)
class Openness:
    """The classes that are most open."""

    #: The probability that independent normal classes have some that are as open.
    p_value: float
    #: Classes at the level of the test, the most open first.
    classes: tuple[int, ...]
    #: By kind of pattern, the strongest first; `position` is a class.
    looks: Mapping[str, Look]


def chosen(norms: Floats, seed: int = 0) -> NDArray[np.int64]:
    """The classes to look at: all, or MOST_CLASSES of them."""
    if len(norms) <= MOST_CLASSES:
        return np.arange(len(norms))
    first = np.argsort(norms, kind="stable")[:_BY_NORM]
    rest = np.setdiff1d(np.arange(len(norms)), first)
    others = np.random.default_rng(seed).choice(rest, MOST_CLASSES - _BY_NORM, replace=False)
    return np.sort(np.concatenate([first, others]))


def most_open(patterns: Patterns, alpha: float) -> Openness:
    """The test at level `alpha`; all margins are known."""
    null = _null(len(patterns.classes), len(patterns.margins))
    found: dict[str, tuple[Look, NDArray[np.intp], int]] = {}
    for kind, margins in patterns.margins.items():
        order = np.argsort(-margins, kind="stable")
        outlying = _outlying(margins[None, order])[0]
        p = _p_values(outlying[None], null)[0]
        r = int(p.argmin())
        # As many as the test allows: each p-value by itself, corrected for all that were tried.
        within = [k + 1 for k in range(len(p)) if _corrected(p[k], null) <= alpha]
        look = Look(int(patterns.classes[order[0]]), float(outlying[r]), float(p[r]))
        found[kind] = (look, order, max(within, default=0))
    found = dict(sorted(found.items(), key=lambda item: item[1][0].p_value))
    open_classes: list[int] = []
    for _, order, number in found.values():
        open_classes += [k for k in patterns.classes[order[:number]].tolist() if k not in open_classes]
    p_value = _corrected(min(look.p_value for look, _, _ in found.values()), null)
    return Openness(p_value, tuple(open_classes), {kind: look for kind, (look, _, _) in found.items()})


def _outlying(decreasing: Floats) -> Floats:
    """For r = 1, 2, ...: how far the r-th largest of a row lies above the mean of the smaller ones, in their standard deviations.
    (draws, m), decreasing, to (draws, number of r)."""
    count = decreasing.shape[1]
    columns = []
    for r in range(min(_TARGETS, count // _SHARE)):
        rest = decreasing[:, r + 1 :]
        spread = rest.std(axis=1, ddof=1)
        gap = decreasing[:, r] - rest.mean(axis=1)
        flat = spread <= 1e-12 * np.abs(decreasing).max(axis=1)
        columns.append(np.where(flat, np.where(gap > 0, np.inf, 0.0), gap / np.where(flat, 1.0, spread)))
    return np.stack(columns, axis=1)


def _p_values(outlying: Floats, null: Mapping[str, Floats]) -> Floats:
    """For each r; of several classes together at a fraction of the level, for some data have groups of similar classes."""
    columns = [share_beyond(null[f"{r}"], outlying[:, r]) / (FURTHER if r else 1) for r in range(outlying.shape[1])]
    return np.minimum(np.stack(columns, axis=1), 1.0)


def _corrected(p: float, null: Mapping[str, Floats]) -> float:
    least = null["least p"]
    return float((1 + np.searchsorted(least, p, side="right")) / (1 + len(least)))


@lru_cache(maxsize=16)
def _null(count: int, kinds: int) -> Mapping[str, Floats]:
    """Sorted draws of the statistic for every r, by its number, and of the smallest of all p-values."""
    rng = np.random.default_rng((count, kinds))
    drawn = [_outlying(-np.sort(rng.standard_normal((_DRAWS, count)), axis=1)) for _ in range(kinds)]
    null = {f"{r}": np.sort(drawn[0][:, r]) for r in range(drawn[0].shape[1])}
    least = np.min([_p_values(d, null).min(axis=1) for d in drawn], axis=0)
    return {**null, "least p": np.sort(least)}
