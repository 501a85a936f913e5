"""When is one of C classes abnormally easy to reach? May import: numpy.

Two looks at every class. The first: how far its log norm lies below those of the others, in their standard deviations (Grubbs' test for one
outlier, 1950, externally studentised). The second asks for two things of the same class: a small norm, and weights that are badly aligned
with the latents of its own clean samples; the smaller of the two deviations counts. In a trained network weights align with class means
(self-duality: Papyan, Han & Donoho 2020, arXiv:2008.08186), but those of a backdoor's target also read the trigger. A class that is merely
easy has a small norm and good alignment.

The null distribution is that of C independent classes with normal log norms and alignments, by simulation for that very C: having picked
the most abnormal class, and the look that showed it, is accounted for (the smaller p-value of the two is itself a statistic: Westfall &
Young 1993, sec. 2.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: With fewer classes the spread of the others is not known well enough to call one of them abnormal.
FEWEST_CLASSES = 4

#: With fewer samples the norms' own scatter, which differs from class to class, is taken for a backdoor too often.
FEWEST_SAMPLES = 50

#: Of the level, what is left for classes after the first.
FURTHER = 0.2

NORM = "norm"
BOTH = "norm and alignment"

_DRAWS = 20_000
#: Normal numbers that a simulation may draw in all.
_BUDGET = 20_000_000


@dataclass(frozen=True)
class Look:
    """The most abnormal class by one kind of evidence."""

    position: int
    #: Standard deviations below the mean of the others.
    statistic: float
    #: By this evidence alone.
    p_value: float


@dataclass(frozen=True)
class Finding:
    """The most abnormal of some classes."""

    position: int
    p_value: float
    #: By kind of evidence, the strongest first.
    looks: Mapping[str, Look]
    #: At the level of the test that it comes from.
    abnormal: bool = False


def most_abnormal(norms: Floats, alignment: Floats | None = None) -> Finding:
    """The class that is most abnormal, and the probability that independent normal classes have one that is as abnormal.

    Args:
        norms: float64 (C,), positive and finite, C >= FEWEST_CLASSES.
        alignment: float64 (C,), NaN where unknown; used if FEWEST_CLASSES or more are known.
    """
    known = np.zeros(len(norms), dtype=bool) if alignment is None else np.isfinite(alignment)
    known &= known.sum() >= FEWEST_CLASSES
    null = _null(len(norms), int(known.sum()))
    low = deviations(np.log(norms)[None])[0]
    looks = {NORM: _look(low, np.arange(len(norms)), null[NORM])}
    if alignment is not None and known.any():
        both = np.minimum(low[known], deviations(alignment[None, known])[0])
        looks[BOTH] = _look(both, np.flatnonzero(known), null[BOTH])
    looks = dict(sorted(looks.items(), key=lambda item: item[1].p_value))
    first = next(iter(looks.values()))
    p = first.p_value if len(looks) == 1 else _share(np.searchsorted(null["least p"], first.p_value, side="right"), len(null["least p"]))
    return Finding(first.position, p, looks)


def step_down(norms: Floats, alignment: Floats | None, alpha: float) -> list[Finding]:
    """Test the most abnormal class, set it aside while its p-value is at most `alpha`, and go on with the rest.

    A backdoor also disturbs the weights of classes near its target: once one is found, further classes are tested by their norms alone, at
    the level FURTHER x `alpha`.

    Returns what was found at each step, the last of them not abnormal unless too few classes were left; p-values never decrease. Positions
    are those in `norms`.
    """
    left, p = np.arange(len(norms)), 0.0
    found: list[Finding] = []
    while len(left) >= FEWEST_CLASSES:
        step = most_abnormal(norms[left], alignment[left] if alignment is not None and not found else None)
        p = max(p, step.p_value)
        looks = {name: Look(int(left[look.position]), look.statistic, look.p_value) for name, look in step.looks.items()}
        abnormal = p <= alpha if not found else p <= FURTHER * alpha
        found.append(Finding(int(left[step.position]), p, looks, abnormal))
        left = np.delete(left, step.position)
        if not abnormal:
            break
    return found


def mad_index(norms: Floats) -> float:
    """The field's usual index of the smallest norm, |x - median| / (1.4826 MAD). Shown, never used: at C = 10 it exceeds 2 on a quarter of
    independent draws. 0 where all norms agree."""
    median = np.median(norms)
    spread = 1.4826 * np.median(np.abs(norms - median))
    return float((median - norms.min()) / spread) if spread > 0 else 0.0


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


def _look(statistics: Floats, positions: NDArray[np.intp], null: Floats) -> Look:
    at = int(statistics.argmax())
    reached = len(null) - np.searchsorted(null, statistics[at], side="left")
    return Look(int(positions[at]), float(statistics[at]), _share(reached, len(null)))


def _share(count: np.intp, draws: int) -> float:
    return float((1 + count) / (1 + draws))


@lru_cache(maxsize=64)
def _null(count: int, known: int) -> Mapping[str, Floats]:
    """Sorted draws of each statistic for `count` independent classes, of which the first `known` have an alignment; the same ones every
    time. "least p" is the smaller of the two p-values."""
    rng = np.random.default_rng((count, known))
    draws = max(2000, min(_DRAWS, _BUDGET // (count + known)))
    chunk = max(1, 1_000_000 // count)
    parts: dict[str, list[Floats]] = {NORM: [], BOTH: []}
    for at in range(0, draws, chunk):
        rows = min(chunk, draws - at)
        low = deviations(rng.standard_normal((rows, count)))
        parts[NORM].append(low.max(axis=1))
        if known:
            parts[BOTH].append(np.minimum(low[:, :known], deviations(rng.standard_normal((rows, known)))).max(axis=1))
    drawn = {name: np.concatenate(part) for name, part in parts.items() if part}
    null = {name: np.sort(values) for name, values in drawn.items()}
    p = [(1 + draws - np.searchsorted(null[name], values, side="left")) / (1 + draws) for name, values in drawn.items()]
    return {**null, "least p": np.sort(np.min(p, axis=0))}
