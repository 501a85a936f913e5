"""How far one of several numbers lies from the others. May import: numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def deviations(x: Floats) -> Floats:
    """How far each entry of a row lies below the mean of the others, in the standard deviations of the others. (draws, C) to (draws, C)."""
    others = x.shape[1] - 1
    centre = x.mean(axis=1, keepdims=True)
    x = x - centre
    # The mean of the others is -x / others.
    total = (x**2).sum(axis=1, keepdims=True)
    square = total - x**2 * (1 + 1 / others)
    gap = -x * (1 + 1 / others)
    # All others equal, up to rounding: any gap is infinitely many deviations, none is no deviation.
    flat = square <= np.maximum(1e-13 * total, others * (1e-12 * np.maximum(np.abs(centre), 1)) ** 2)
    endless = np.where(np.abs(gap) > 1e-9, np.copysign(np.inf, gap), 0.0)
    result: Floats = np.where(flat, endless, gap / np.sqrt(np.where(flat, 1.0, square) / (others - 1)))
    return result
