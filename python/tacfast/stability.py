"""Would other clean samples have said the same? May import: solver, geometry, outliers, numpy."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from tacfast.geometry import traits
from tacfast.outliers import FEWEST_CLASSES, FEWEST_SAMPLES, extreme
from tacfast.solver import solve

#: Splits into two disjoint halves. Halves, not bootstrap samples: these are inconsistent for a maximum (Bickel, Götze & van Zwet 1997).
_SPLITS = 4
#: With more classes the many solves would take longer than all the rest.
MOST_CLASSES = 2000


def stability(
    weight: NDArray[np.floating],
    bias: NDArray[np.floating] | None,
    latents: NDArray[np.floating],
    predictions: NDArray[np.int64],
    *,
    targets: Collection[int],
    kind: str,
    quantile: float,
    threads: int | None,
) -> float | None:
    """The share of disjoint halves of the samples in which one of the targets is the most abnormal class by the same kind of evidence.

    None with too many classes, or with too few samples to halve.
    """
    if len(weight) > MOST_CLASSES or len(latents) < 2 * FEWEST_SAMPLES:
        return None
    rng, same = np.random.default_rng(0), []
    for _ in range(_SPLITS):
        order = rng.permutation(len(latents))
        for half in np.array_split(order, 2):
            part = np.sort(half)
            found = solve(weight, bias, latents[part], quantile=quantile, threads=threads)
            solved = np.flatnonzero(found.status == "solved")
            if len(solved) < FEWEST_CLASSES:
                same.append(False)
                continue
            of_all = traits(weight, latents[part], predictions[part], found.perturbations)
            at = extreme(found.norms[solved], of_all.of(solved), kind)
            same.append(at is not None and int(solved[at]) in targets)
    return float(np.mean(same))


def moved_share(
    weight: NDArray[np.floating], bias: NDArray[np.floating] | None, latents: NDArray[np.floating], shift: NDArray[np.float64], target: int
) -> float:
    """The share of samples that the shift really sends to the target: less than the quantile, for each rival holds back others."""
    rows = max(1, 10_000_000 // len(weight))
    moved = 0
    for at in range(0, len(latents), rows):
        logits = (latents[at : at + rows] + shift) @ weight.T + (0 if bias is None else bias)
        # At the optimum some samples lie on the border between two classes.
        moved += int((logits[:, target] >= logits.max(axis=1) - 1e-9 * np.abs(logits).max()).sum())
    return moved / len(latents)
