"""Three rules that call a network backdoored, side by side.

tacfast's own, from scans of the stored heads; the field's MAD index > 2 on the norms of the published method (every sample counts); and the
gap between the two smallest of these norms, whose threshold is the even clean networks' own quantile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from networks import Line, Pair, is_clean
from numpy.typing import NDArray
from scans import Outcome

from tacfast.outliers import mad_index


@dataclass(frozen=True)
class Finding:
    """What a rule says of a network."""

    flagged: bool
    classes: frozenset[int] = frozenset()
    pairs: frozenset[Pair] = frozenset()


@dataclass(frozen=True)
class Rule:
    """`score` grows with suspicion; `find` cuts it at the rule's own threshold."""

    name: str
    find: Callable[[Line], Finding]
    score: Callable[[Line], float]


def recorded_norms(line: Line) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Classes with a positive, finite norm, and these norms, every sample counted."""
    norms = np.array(line["scan"]["norms_1"], dtype=np.float64)
    classes = np.flatnonzero(np.nan_to_num(norms) > 0)
    return classes, norms[classes]


def mad(line: Line) -> float:
    norms = recorded_norms(line)[1]
    return mad_index(norms) if len(norms) else 0.0


def gap(line: Line) -> float:
    """log of the second smallest norm over the smallest."""
    norms = np.sort(recorded_norms(line)[1])
    return float(np.log(norms[1] / norms[0])) if len(norms) > 1 else 0.0


def tacfast_rule(outcomes: Mapping[str, Outcome], alpha: float) -> Rule:
    def find(line: Line) -> Finding:
        o = outcomes[line["key"]]
        return Finding(o.flagged, frozenset(o.suspects), frozenset(o.pairs))

    def score(line: Line) -> float:
        p = outcomes[line["key"]].p
        return 0.0 if p is None else 1 - p

    return Rule(f"tacfast, p <= {alpha:g}", find, score)


def norm_rule(name: str, score: Callable[[Line], float], threshold: float) -> Rule:
    """Flags above a threshold, and names the class with the smallest norm."""

    def find(line: Line) -> Finding:
        if not score(line) > threshold:
            return Finding(False)
        classes, norms = recorded_norms(line)
        return Finding(True, frozenset({int(classes[norms.argmin()])}))

    return Rule(name, find, score)


def gap_threshold(lines: Iterable[Line], alpha: float) -> float:
    """Above it lies a share `alpha` of the even clean networks; infinite without any."""
    gaps = [gap(line) for line in lines if is_clean(line) and line["seed"] % 2 == 0]
    return float(np.quantile(gaps, 1 - alpha)) if gaps else np.inf


def all_rules(lines: Iterable[Line], outcomes: Mapping[str, Outcome], alpha: float) -> list[Rule]:
    """tacfast, MAD > 2 and the gap; `lines` are those of all seeds."""
    threshold = gap_threshold(lines, alpha)
    return [tacfast_rule(outcomes, alpha), norm_rule("MAD > 2", mad, 2.0), norm_rule(f"gap > {threshold:.3f}", gap, threshold)]
