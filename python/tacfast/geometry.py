"""What a backdoor leaves behind in latent space, beside a small norm. May import: numpy.

In a trained network the weights of a class point where the latents of its own samples lie, seen from the centre (self-duality: Papyan,
Han & Donoho 2020, arXiv:2008.08186); those of a backdoor's target also read the trigger. And the trigger speaks through latent channels
that are quiet on clean data, so the smallest shift into the target runs along these.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: The mean of fewer latents says more about the samples than about the class.
FEWEST_PER_CLASS = 5


@dataclass(frozen=True)
class Traits:
    """What is known of C classes beside their norms; low where a backdoor may be."""

    #: float64 (C,): see `class_alignment`.
    alignment: Floats
    #: float64 (C,): see `shift_spread`.
    spread: Floats

    def of(self, classes: NDArray[np.intp]) -> Traits:
        """Of some of the classes."""
        return Traits(self.alignment[classes], self.spread[classes])


def traits(weight: NDArray[np.floating], latents: NDArray[np.floating], predictions: NDArray[np.int64], shifts: Floats) -> Traits:
    """Of all classes; for the arguments see the two functions below."""
    return Traits(class_alignment(weight, latents, predictions), shift_spread(shifts, latents))


def class_alignment(weight: NDArray[np.floating], latents: NDArray[np.floating], predictions: NDArray[np.int64]) -> Floats:
    """cos(w_k - w̄, μ_k - μ̄) of each class, μ_k the mean latent of the samples that the model itself calls k; no labels are needed.

    Args:
        weight: float (C, d).
        latents: float (n, d).
        predictions: int64 (n,).

    Returns:
        float64 (C,): NaN for classes with fewer than FEWEST_PER_CLASS samples, or where a vector vanishes.
    """
    counts = np.bincount(predictions, minlength=len(weight))
    means = np.zeros(weight.shape)
    order = np.argsort(predictions, kind="stable")
    present = np.flatnonzero(counts)
    starts = np.concatenate([[0], np.cumsum(counts[present])[:-1]])
    means[present] = np.add.reduceat(latents[order], starts, axis=0, dtype=np.float64) / counts[present, None]
    usable = counts >= FEWEST_PER_CLASS
    rows, centres = _in_units(weight), _in_units(means)
    alignment = np.full(len(weight), np.nan)
    if usable.any():
        w, m = rows[usable] - rows.mean(axis=0), centres[usable] - centres[usable].mean(axis=0)
        lengths = np.linalg.norm(w, axis=1) * np.linalg.norm(m, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            alignment[usable] = np.where(lengths > 0, (w * m).sum(axis=1) / lengths, np.nan)
    return alignment


def shift_spread(shifts: Floats, latents: NDArray[np.floating]) -> Floats:
    """‖s_k‖ / ‖s_k / σ‖: the standard deviation, over clean samples, of the latent channels that a shift uses.

    Args:
        shifts: float64 (C, d).
        latents: float (n, d).

    Returns:
        float64 (C,): NaN where a shift vanishes or is not finite.
    """
    unit = float(np.abs(latents).max())
    deviation = _in_units(latents).std(axis=0, dtype=np.float64)
    # A channel that never moves would rule everything.
    deviation = np.maximum(deviation, 1e-3 * deviation.max())
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        shifts = shifts / np.abs(shifts).max(axis=1, keepdims=True)
        spread: Floats = unit * np.linalg.norm(shifts, axis=1) / np.linalg.norm(shifts / deviation, axis=1)
    return np.where(np.isfinite(spread) & (spread > 0), spread, np.nan)


def _in_units(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """With a largest entry of one, so that squares neither overflow nor vanish."""
    unit = np.abs(values).max()
    return values / unit if unit > 0 else values
