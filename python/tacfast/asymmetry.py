"""Do pairs of classes betray a backdoor that knows the class of its victim? May import: outliers, numpy.

Confusion between two classes is by and large symmetric: what is easily moved from a to b is easily moved from b to a. A backdoor is not.
The usual all-to-all attack shifts labels, y to y + t modulo C; every such t is tried, by the sum over its pairs of
log ‖s_{y→y+t}‖ - log ‖s_{y+t→y}‖.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tacfast.outliers import FEWEST_CLASSES, NORM, most_abnormal

Floats = NDArray[np.float64]

#: Samples that each source class needs, for its largest margins to say something.
FEWEST_PER_SOURCE = 5
#: Pairs of so many classes are solved in a second or so.
MOST_CLASSES = 200
_DRAWS = 20_000
#: Normal numbers that the simulation may draw, if that leaves it 2000 draws.
_BUDGET = 20_000_000


@dataclass(frozen=True)
class ShiftFinding:
    """The shift of labels that is most abnormal."""

    shift: int
    #: Standard deviations.
    statistic: float
    p_value: float


@dataclass(frozen=True)
class SourceFinding:
    """The source class that is most abnormal for a given target."""

    source: int
    statistic: float
    p_value: float


def most_abnormal_shift(norms: Floats) -> ShiftFinding | None:
    """The label shift whose pairs are easier to move than their reverses, and the probability of one as clear among independent pairs.

    Args:
        norms: float64 (C, C), by source and target; anything on the diagonal.

    Returns:
        None where a norm is not positive and finite, or where there are fewer than five classes.
    """
    lead = _lead(norms)
    if lead is None or np.abs(lead).max() <= 1e-12:
        return None
    sums = _shift_sums(lead[None])[0]
    at, null = int(sums.argmax()), _null(len(norms))
    p = (1 + len(null) - np.searchsorted(null, sums[at], side="left")) / (1 + len(null))
    return ShiftFinding(at + 1, float(sums[at]), float(p))


def odd_source(norms: Floats, target: int) -> SourceFinding | None:
    """The source whose samples are most abnormally easy to move to a target, against the way back: that of a source-specific backdoor.

    Args:
        norms: as for `most_abnormal_shift`.
    """
    lead = _lead(norms)
    if lead is None:
        return None
    sources = np.delete(np.arange(len(norms)), target)
    look = most_abnormal(np.exp(_rest(lead[None])[0, sources, target])).looks[NORM]
    return SourceFinding(int(sources[look.position]), look.statistic, look.p_value)


def _lead(norms: Floats) -> Floats | None:
    """log ‖s_{a→b}‖ - log ‖s_{b→a}‖ (C, C), 0 on the diagonal."""
    off = ~np.eye(len(norms), dtype=bool)
    if len(norms) < FEWEST_CLASSES + 1 or not (np.isfinite(norms[off]) & (norms[off] > 0)).all():
        return None
    logs = np.zeros_like(norms)
    logs[off] = np.log(norms[off])
    return logs - logs.T


def _rest(lead: Floats) -> Floats:
    """Of antisymmetric matrices (m, C, C) what is left without that which a class is like as a source and as a target:
    lead[a, b] = e_a - e_b + rest[a, b]."""
    effect = lead.mean(axis=2)
    rest: Floats = lead - (effect[:, :, None] - effect[:, None, :])
    return rest


def _shift_sums(lead: Floats) -> Floats:
    """Of antisymmetric matrices (m, C, C): for each shift 1 to C - 1 how much easier its pairs are than their reverses, in standard
    deviations."""
    classes, rest = lead.shape[1], _rest(lead)
    # Every pair is there twice.
    spread = np.sqrt((rest**2).sum(axis=(1, 2)) / ((classes - 1) * (classes - 2)))
    y = np.arange(classes)
    sums = np.stack([-rest[:, y, (y + t) % classes].sum(axis=1) for t in range(1, classes)], axis=1)
    result: Floats = sums / (spread * np.sqrt(classes))[:, None]
    return result


@lru_cache(maxsize=16)
def _null(classes: int) -> Floats:
    """Sorted draws of the largest sum over independent normal pairs; the same ones every time."""
    rng = np.random.default_rng(classes)
    draws = int(np.clip(_BUDGET // classes**2, 2000, _DRAWS))
    chunk = max(1, 2_000_000 // classes**2)
    largest = []
    for at in range(0, draws, chunk):
        logs = rng.standard_normal((min(chunk, draws - at), classes, classes))
        largest.append(_shift_sums(logs - logs.transpose(0, 2, 1)).max(axis=1))
    return np.sort(np.concatenate(largest))
