"""How a head's weights lie to the latents of its own classes. May import: numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: The mean of fewer latents says more about the samples than about the class.
FEWEST_PER_CLASS = 5


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
    alignment = np.full(len(weight), np.nan)
    if usable.any():
        w, m = weight[usable] - weight.mean(axis=0), means[usable] - means[usable].mean(axis=0)
        lengths = np.linalg.norm(w, axis=1) * np.linalg.norm(m, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            alignment[usable] = np.where(lengths > 0, (w * m).sum(axis=1) / lengths, np.nan)
    return alignment
