"""When is the smallest of C norms abnormally small? May import: numpy.

The statistic is the distance of the smallest log norm from the mean of the others, in their standard deviations: Grubbs' one-sided test for
one outlier (1950), in its externally studentised form. Its null distribution is that of C independent normal log norms, by simulation for
that very C; so having picked the smallest of C is accounted for.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

#: With fewer classes the spread of the others is not known well enough to call one of them abnormal.
FEWEST_CLASSES = 4

#: With fewer samples the norms' own scatter, which differs from class to class, is taken for a backdoor too often.
FEWEST_SAMPLES = 50

_DRAWS = 20_000
#: Normal numbers that the simulation may draw in all.
_BUDGET = 200_000_000


def smallest_is_outlier(norms: NDArray[np.float64]) -> tuple[float, float]:
    """The p-value and the statistic of the smallest of the given norms.

    Args:
        norms: float64 (C,), positive and finite, C >= FEWEST_CLASSES.
    """
    statistic = _studentised_gap(np.log(norms)[None, :])[0]
    null = _null(len(norms))
    at_least = len(null) - np.searchsorted(null, statistic, side="left")
    return float((1 + at_least) / (1 + len(null))), float(statistic)


def step_down(norms: NDArray[np.float64], alpha: float) -> list[tuple[int, float, float]]:
    """Test the smallest norm, set it aside while it is abnormal, and go on with the rest.

    Returns (position, p-value, statistic) of each one set aside, p-values non-decreasing, then of the first that was not abnormal.
    """
    left = list(np.argsort(norms, kind="stable"))
    found: list[tuple[int, float, float]] = []
    p = 0.0
    while len(left) >= FEWEST_CLASSES:
        step, statistic = smallest_is_outlier(norms[left])
        p = max(p, step)
        found.append((int(left.pop(0)), p, statistic))
        if p > alpha:
            break
    return found


def mad_index(norms: NDArray[np.float64]) -> float:
    """The field's usual index of the smallest norm, |x - median| / (1.4826 MAD). Shown, never used: at C = 10 it exceeds 2 on a quarter of
    independent draws. 0 where all norms agree."""
    median = np.median(norms)
    spread = 1.4826 * np.median(np.abs(norms - median))
    return float((median - norms.min()) / spread) if spread > 0 else 0.0


def _studentised_gap(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of log norms to the gap between the smallest and the mean of the others, in standard deviations of the others."""
    smallest = x.min(axis=1)
    others = x.shape[1] - 1
    mean = (x.sum(axis=1) - smallest) / others
    square = ((x - mean[:, None]) ** 2).sum(axis=1) - (smallest - mean) ** 2
    spread = np.sqrt(np.maximum(square, 0) / (others - 1))
    gap = mean - smallest
    # All others equal: any gap beyond rounding is infinitely many deviations, none is no deviation.
    flat = spread <= 1e-12 * np.maximum(np.abs(mean), 1)
    safe = np.where(flat, 1.0, spread)
    result: NDArray[np.float64] = np.where(flat, np.where(gap > 1e-9, np.inf, 0.0), gap / safe)
    return result


@lru_cache(maxsize=64)
def _null(count: int) -> NDArray[np.float64]:
    """Sorted draws of the statistic for `count` independent normal log norms; the same ones every time."""
    rng = np.random.default_rng(count)
    draws = max(2000, min(_DRAWS, _BUDGET // count))
    chunk = max(1, 2_000_000 // count)
    parts = [_studentised_gap(rng.standard_normal((min(chunk, draws - at), count))) for at in range(0, draws, chunk)]
    return np.sort(np.concatenate(parts))
