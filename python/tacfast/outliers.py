"""When is one of C classes abnormally easy to reach? May import: geometry, deviations, correlations, numpy.

Every class is looked at in up to three ways, each of which asks for two things of it, and the smaller of the two deviations counts: a small
norm (how far its log lies below those of the others, in their standard deviations: Grubbs' test for one outlier, 1950, externally
studentised), and a further trait that a backdoor leaves (see `geometry`), or the mean of both traits. A class that is merely easy to reach
has a small norm and nothing else: a norm alone counts only where the alignment of the class is not known, or with many classes, where it
must also stand out from the other small norms, whatever their distribution.

The null distribution is that of C independent classes with normal log norms and traits, by simulation for that very C: having picked
the most abnormal class, and the look that showed it, is accounted for (the smallest p-value of all is itself a statistic: Westfall &
Young 1993, sec. 2.3). How norm and traits go together over classes differs from network to network, so the simulated ones have the
correlations of the network at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tacfast.correlations import correlation
from tacfast.deviations import deviations
from tacfast.geometry import Traits

Floats = NDArray[np.float64]

#: With fewer classes the spread of the others is not known well enough to call one of them abnormal.
FEWEST_CLASSES = 4

#: With fewer samples the norms' own scatter, which differs from class to class, is taken for a backdoor too often.
FEWEST_SAMPLES = 50

#: From so many classes on the norms' tail is looked at as it is: it is heavier than a normal one.
TAIL_CLASSES = 100

#: Of the level, what is left for classes after the first.
FURTHER = 0.2

NORM = "norm"
ALIGNMENT = "norm and alignment"
QUIET = "norm and quiet channels"
ALL = "norm, alignment and quiet channels"

LEAST_P = "least p"

#: Correlations are rounded to tenths, so that scans of like networks share their simulation.
_STEPS = 10

_DRAWS = 20_000
#: Classes that a simulation may draw in all.
_BUDGET = 10_000_000


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


def most_abnormal(norms: Floats, traits: Traits | None = None) -> Finding:
    """The class that is most abnormal, and the probability that independent normal classes have one that is as abnormal.

    Args:
        norms: float64 (C,), positive and finite, C >= FEWEST_CLASSES.
        traits: of the same classes. Alignments are used if FEWEST_CLASSES or more are known, spreads if all are.
    """
    order, known, looks = _classes_first(norms, traits)
    null = _null(len(norms), known, QUIET in looks, _correlations(norms, traits))
    found = {name: _look(values[0], order, null[name]) for name, values in looks.items()}
    if NORM in found and len(norms) >= TAIL_CLASSES:
        # Another class than that with the smallest norm stands out from nothing.
        tail = _tail_p(np.log(norms)) if norms[found[NORM].position] == norms.min() else 1.0
        found[NORM] = replace(found[NORM], p_value=max(found[NORM].p_value, tail))
    found = dict(sorted(found.items(), key=lambda item: item[1].p_value))
    first = next(iter(found.values()))
    reached = np.searchsorted(null[LEAST_P], first.p_value, side="right")
    return Finding(first.position, first.p_value if len(found) == 1 else _share(reached, len(null[LEAST_P])), found)


def extreme(norms: Floats, traits: Traits, kind: str) -> int | None:
    """The class that is most abnormal by one kind of evidence; None where that cannot be told."""
    order, _, looks = _classes_first(norms, traits)
    return int(order[looks[kind][0].argmax()]) if kind in looks else None


def _classes_first(norms: Floats, traits: Traits | None) -> tuple[NDArray[np.intp], int, dict[str, Floats]]:
    """The order of classes in which those of known alignment come first, how many these are, and the looks (1, ...) in that order."""
    known = np.zeros(len(norms), dtype=bool) if traits is None else np.isfinite(traits.alignment)
    known &= known.sum() >= FEWEST_CLASSES
    order, count = np.argsort(~known, kind="stable"), int(known.sum())
    aligned = traits.alignment[None, order[:count]] if traits is not None and count else None
    spread = traits.spread[None, order] if traits is not None and np.isfinite(traits.spread).all() else None
    return order, count, _looks(np.log(norms)[None, order], aligned, None if spread is None else np.log(spread))


def step_down(norms: Floats, traits: Traits | None, alpha: float) -> list[Finding]:
    """Test the most abnormal class, set it aside while its p-value is at most `alpha`, and go on with the rest.

    A backdoor also disturbs the weights of classes near its target: once one is found, further classes are tested by their norms alone, at
    the level FURTHER x `alpha`.

    Returns what was found at each step, the last of them not abnormal unless too few classes were left; p-values never decrease. Positions
    are those in `norms`.
    """
    left, p = np.arange(len(norms)), 0.0
    found: list[Finding] = []
    while len(left) >= FEWEST_CLASSES:
        step = most_abnormal(norms[left], None if found else traits)
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


def _looks(log_norms: Floats, aligned: Floats | None, spread: Floats | None) -> dict[str, Floats]:
    """By kind of evidence, the deviations of each class. (draws, C), (draws, those of known alignment: the first) and (draws, C)."""
    low = deviations(log_norms)
    looks, count = {}, log_norms.shape[1]
    corroborated = aligned.shape[1] if aligned is not None and count < TAIL_CLASSES else 0
    if corroborated < count:
        looks[NORM] = np.where(np.arange(count) < corroborated, -np.inf, low)
    quiet = None if spread is None else deviations(spread)
    if quiet is not None:
        looks[QUIET] = np.minimum(low, quiet)
    if aligned is not None:
        off, known = deviations(aligned), aligned.shape[1]
        looks[ALIGNMENT] = np.minimum(low[:, :known], off)
        if quiet is not None:
            with np.errstate(invalid="ignore"):
                both = np.nan_to_num((off + quiet[:, :known]) / np.sqrt(2), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
            looks[ALL] = np.minimum(low[:, :known], both)
    return looks


def _look(statistics: Floats, positions: NDArray[np.intp], null: Floats) -> Look:
    at = int(statistics.argmax())
    return Look(int(positions[at]), float(statistics[at]), float(share_beyond(null, statistics[at])))


def _tail_p(log_norms: Floats) -> float:
    """How likely the smallest is so far below the next, whatever the distribution: the gaps between the smallest of many independent
    numbers are those of exponential ones, the i-th in proportion to 1/i (Weissman 1978), so their ratio has an F distribution."""
    count = len(log_norms) // 20
    gaps = np.diff(np.sort(log_norms)[: count + 1]) * np.arange(1, count + 1)
    others = gaps[1:].mean()
    ratio = gaps[0] / others if others > 0 else np.inf if gaps[0] > 0 else 0.0
    return float((1 + ratio / (count - 1)) ** -(count - 1))


def share_beyond(null: Floats, values: ArrayLike) -> Floats:
    """p-values: the share of sorted draws, and the value itself, that are at least as large."""
    reached = len(null) - np.searchsorted(null, values, side="left")
    share: Floats = (1 + reached) / (1 + len(null))
    return share


def _share(count: np.intp, draws: int) -> float:
    return float((1 + count) / (1 + draws))


def _correlations(norms: Floats, traits: Traits | None) -> tuple[float, float, float]:
    """Over classes: of log norm and alignment, of log norm and log spread, of alignment and log spread; 0 where too little is known."""
    if traits is None:
        return 0.0, 0.0, 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        columns = np.stack([np.log(norms), traits.alignment, np.log(traits.spread)])

    def of(i: int, j: int) -> float:
        both = columns[[i, j]][:, np.isfinite(columns[[i, j]]).all(axis=0)]
        if both.shape[1] < FEWEST_CLASSES:
            return 0.0
        return round(correlation(*both) * _STEPS) / _STEPS

    return of(0, 1), of(0, 2), of(1, 2)


@lru_cache(maxsize=64)
def _null(count: int, known: int, quiet: bool, correlations: tuple[float, float, float]) -> Mapping[str, Floats]:
    """Sorted draws of each statistic for `count` independent classes, whose norms and traits are correlated as given; the first `known`
    have an alignment, and all a spread if `quiet`; the same ones every time. LEAST_P is the smallest of the p-values."""
    rng = np.random.default_rng((count, known, int(quiet)))
    mix = _mixing(*correlations)
    draws = max(2000, min(_DRAWS, _BUDGET // count))
    chunk = max(1, 1_000_000 // count)
    parts: list[dict[str, Floats]] = []
    for at in range(0, draws, chunk):
        rows = min(chunk, draws - at)
        log_norms, aligned, spread = np.einsum("ij,jrc->irc", mix, rng.standard_normal((3, rows, count)))
        looks = _looks(log_norms, aligned[:, :known] if known else None, spread if quiet else None)
        parts.append({name: values.max(axis=1) for name, values in looks.items()})
    drawn = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    null = {name: np.sort(values) for name, values in drawn.items()}
    p = [share_beyond(null[name], values) for name, values in drawn.items()]
    return {**null, LEAST_P: np.sort(np.min(p, axis=0))}


def _mixing(a: float, b: float, c: float) -> Floats:
    """(3, 3): makes three independent normal draws have these correlations, or others near them that are possible."""
    values, vectors = np.linalg.eigh([[1, a, b], [a, 1, c], [b, c, 1]])
    mix = vectors * np.sqrt(np.maximum(values, 0))
    scaled: Floats = mix / np.linalg.norm(mix, axis=1, keepdims=True)
    return scaled
