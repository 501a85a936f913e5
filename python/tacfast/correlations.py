"""How two properties go together over the classes of a clean network, where one class may be abnormal. May import: deviations, numpy.

An abnormal class is low in both and raises their correlation over all classes, and so its own p-value. Over all classes but the most
abnormal one the correlation is too small, for a normal network has a most abnormal class too; by how much, simulation says. That estimate
alone makes p-values a little too small, for it rests on few classes. With the mean of the two they have their size, whatever the true
correlation (docs/detection.md).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tacfast.deviations import deviations

Floats = NDArray[np.float64]

_GRID = np.linspace(-0.9, 0.9, 19)
_DRAWS = 4000
#: Numbers that the simulation may draw for each correlation, if that leaves it 200 draws.
_BUDGET = 200_000


def correlation(x: Floats, y: Floats) -> float:
    """That of normal classes like these; 0 where either does not vary.

    Args:
        x, y: float64 (C,), finite, C >= 4: low where a backdoor may be.
    """
    rows = np.stack([x, y])
    if (np.ptp(rows, axis=1) <= 1e-12 * np.abs(rows).max(axis=1)).any():
        return 0.0
    rest = float(_pearson(*_without_most_abnormal(rows[:1], rows[1:]))[0])
    return float((_pearson(rows[:1], rows[1:])[0] + np.interp(rest, _of_rest(len(x)), _GRID)) / 2)


def _pearson(x: Floats, y: Floats) -> Floats:
    """Of each row of x (draws, C) and y (draws, C)."""
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    found: Floats = np.where(lengths > 0, (x * y).sum(axis=1) / np.where(lengths > 0, lengths, 1.0), 0.0)
    return found


def _without_most_abnormal(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """(draws, C) to (draws, C - 1): without the class that lies farthest below the others in both."""
    left = np.ones(x.shape, dtype=bool)
    left[np.arange(len(x)), np.minimum(deviations(x), deviations(y)).argmax(axis=1)] = False
    return x[left].reshape(len(x), -1), y[left].reshape(len(x), -1)


@lru_cache(maxsize=64)
def _of_rest(count: int) -> Floats:
    """Median correlation over all classes but the most abnormal one, increasing, of `count` normal classes with each correlation of the
    grid."""
    rng = np.random.default_rng(count)
    a, b = rng.standard_normal((2, int(np.clip(_BUDGET // count, 200, _DRAWS)), count))
    medians = [np.median(_pearson(*_without_most_abnormal(a, r * a + np.sqrt(1 - r**2) * b))) for r in _GRID]
    return np.maximum.accumulate(np.array(medians))
