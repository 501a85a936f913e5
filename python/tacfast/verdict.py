"""From solved problems to a verdict. May import: solver's results, geometry, deviations, outliers, openness, asymmetry, numpy.

The significance level is shared between up to three questions: is a class abnormally easy to reach in latent space, is it abnormally open
to patterns of the input, and is there a shift of labels whose pairs are easy? Most backdoors are of the first kinds, so they get most of
the level. The correction is Šidák's (1967), weighted, whose p-value is exact, up to 1, if the answers of a clean model are independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tacfast.asymmetry import ShiftFinding, most_abnormal_shift, odd_source
from tacfast.deviations import deviations
from tacfast.geometry import FEWEST_PER_CLASS, Traits
from tacfast.openness import SHORT, Openness, Patterns, most_open
from tacfast.outliers import ALIGNMENT, ALL, FEWEST_CLASSES, FEWEST_SAMPLES, NORM, QUIET, Finding, step_down
from tacfast.solver import TacSolutions

Verdict = Literal["clean", "backdoored", "inconclusive"]
Kind = Literal["all-to-one", "multi-target", "source-specific", "all-to-all"]

SHIFT = "label shift"
#: What the question for shifts gets of the level where it is asked; the two about classes get equal parts of the rest.
_SHIFT_SHARE = 0.2
#: The share of halves of the samples that must name the first suspect too.
_STABLE = 0.5
#: The share of its own samples that the model must get right before a class is accused.
_LEARNT = 0.5
#: Level at which a suspect's backdoor is said to work from one source class only; the verdict does not depend on it.
_ODD = 0.002


@dataclass(frozen=True)
class Suspect:
    """A class that is abnormally easy to reach."""

    target: int
    p_value: float
    norm: float

    def to_dict(self) -> dict[str, Any]:
        return {"class": self.target, "p_value": self.p_value, "norm": self.norm}


@dataclass(frozen=True)
class Evidence:
    """What one kind of evidence says of the whole model, by itself."""

    #: "norm", "norm and alignment", "norm and quiet channels", "norm, alignment and quiet channels", "short pattern", "few pixels" or
    #: "label shift".
    kind: str
    #: The class that it points to most; None for label shifts.
    target: int | None
    #: Standard deviations.
    statistic: float
    #: Before the correction for there being several kinds.
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "class": self.target, "statistic": self.statistic, "p_value": self.p_value}


@dataclass(frozen=True)
class Judgement:
    """See the fields of `ScanReport`."""

    verdict: Verdict
    reason: str
    p_value: float | None = None
    suspects: tuple[Suspect, ...] = ()
    kind: Kind | None = None
    pairs: tuple[tuple[int, int], ...] = ()
    evidence: tuple[Evidence, ...] = ()


def judge(
    solutions: TacSolutions, samples: int, traits: Traits, pairs: NDArray[np.float64] | None, patterns: Patterns | None, alpha: float
) -> Judgement:
    """The verdict at level `alpha` on the solutions for all classes; `pairs` (C, C) are norms by source and target, no margin of `patterns`
    is unknown.

    The first of the evidence is what named the first suspect.
    """
    tested = np.flatnonzero(solutions.status == "solved")
    why = _untestable(solutions, len(tested), samples)
    if why is not None:
        return Judgement("inconclusive", why)
    asked = _ask(solutions, tested, traits, pairs, patterns, alpha)
    p, evidence = asked.p_value, asked.evidence
    shifted = asked.shift is not None and asked.by_shift <= alpha
    # Under an all-to-all backdoor some class may be easy too; the stronger evidence says what it is.
    if asked.suspects and not (shifted and asked.by_shift <= min(s.p_value for s in asked.suspects)):
        suspects, reason = asked.suspects, asked.reason
        source = None if pairs is None or len(suspects) > 1 else odd_source(pairs, suspects[0].target)
        if source is not None and source.p_value <= _ODD:
            pair = (source.source, suspects[0].target)
            return Judgement("backdoored", f"{reason}; above all from class {pair[0]}", p, suspects, "source-specific", (pair,), evidence)
        kind: Kind = "all-to-one" if len(suspects) == 1 else "multi-target"
        return Judgement("backdoored", reason, p, suspects, kind, (), evidence)
    if shifted and asked.shift is not None:
        y, step = np.arange(len(solutions.norms)), asked.shift
        moves = tuple(zip(y.tolist(), ((y + step.shift) % len(y)).tolist(), strict=True))
        reason = (
            f"samples move from class y to y + {step.shift} (modulo {len(y)}) more easily than back, over all classes: "
            f"{step.statistic:.1f} standard deviations (p = {step.p_value:.2g})"
        )
        return Judgement("backdoored", reason, p, (), "all-to-all", moves, evidence)
    missing = solutions.classes[~solutions.certified]
    if len(missing):
        reason = f"the solver could not certify {len(missing)} classes (class {missing[0]} first), and one may hide among them"
        return Judgement("inconclusive", reason, p, evidence=evidence)
    return Judgement("clean", _normal(solutions.norms[tested], tested, p, alpha), p, evidence=evidence)


@dataclass(frozen=True)
class _Answers:
    """To all questions, each at its share of the level."""

    p_value: float
    #: By class of whatever question named it, and in words how.
    suspects: tuple[Suspect, ...]
    reason: str
    shift: ShiftFinding | None
    by_shift: float
    #: What named the first suspect stands first.
    evidence: tuple[Evidence, ...]


def _ask(
    solutions: TacSolutions,
    tested: NDArray[np.intp],
    traits: Traits,
    pairs: NDArray[np.float64] | None,
    patterns: Patterns | None,
    alpha: float,
) -> _Answers:
    shift = None if pairs is None else most_abnormal_shift(pairs)
    share = (1.0 if shift is None else 1 - _SHIFT_SHARE) / (1 if patterns is None else 2)
    level = 1 - (1 - alpha) ** share
    steps = step_down(solutions.norms[tested], traits.of(tested), level)
    opened = None if patterns is None else most_open(patterns, level)
    by_class = {int(tested[s.position]): _among_all(s.p_value, share) for s in steps if s.abnormal}
    by_openness = 1.0 if opened is None else _among_all(opened.p_value, share)
    by_pattern = {} if opened is None else {k: by_openness for k in opened.classes if k in tested}
    by_shift = 1.0 if shift is None else _among_all(shift.p_value, _SHIFT_SHARE)
    p = min(_among_all(steps[0].p_value, share), by_openness, by_shift)
    named = {k: min(by_pattern.get(k, 1.0), by_class.get(k, 1.0)) for k in (*by_pattern, *by_class)}
    reasons = [_abnormal(tuple(by_class), steps[0])] if by_class else []
    reasons += [_opened(tuple(by_pattern), opened)] if by_pattern and opened is not None else []
    latent = tuple(Evidence(kind, int(tested[k.position]), k.statistic, k.p_value) for kind, k in steps[0].looks.items())
    pattern = () if opened is None else tuple(Evidence(kind, k.position, k.statistic, k.p_value) for kind, k in opened.looks.items())
    shifted = () if shift is None else (Evidence(SHIFT, None, shift.statistic, shift.p_value),)
    return _Answers(
        p_value=p,
        suspects=tuple(Suspect(k, value, float(solutions.norms[k])) for k, value in named.items()),
        reason=f"{'; '.join(reasons)} (p = {p:.2g} over {len(tested)} classes)",
        shift=shift,
        by_shift=by_shift,
        evidence=(*pattern, *latent, *shifted) if by_pattern else (*latent, *pattern, *shifted),
    )


def _among_all(p: float, share: float) -> float:
    """The p-value of one question, which has a share of the level, as one of several."""
    return 1.0 if p >= 1 else -math.expm1(math.log1p(-p) / share)


def with_stability(found: Judgement, stability: float | None) -> Judgement:
    """Nobody is accused by one half of the samples when the other half accuses somebody else."""
    if not found.suspects or stability is None or stability >= _STABLE:
        return found
    return _held_back(found, f"only in {stability:.0%} of halves of the samples: add clean samples, above all of classes that have few")


def with_labels(found: Judgement, predictions: NDArray[np.int64], labels: NDArray[np.int64] | None) -> Judgement:
    """No class is accused that the model has not learnt: samples of others lie close to it, and its weights badly, without any backdoor.

    Args:
        predictions, labels: int64 (n,). Labels that the model contradicts in most places say nothing about a class.
    """
    if not found.suspects or labels is None or np.mean(predictions == labels) < _LEARNT:
        return found
    right = {s.target: predictions[labels == s.target] == s.target for s in found.suspects}
    unlearnt = [k for k, own in right.items() if len(own) >= FEWEST_PER_CLASS and own.mean() < _LEARNT]
    left = tuple(s for s in found.suspects if s.target not in unlearnt)
    if not unlearnt:
        return found
    if not left:
        share = right[unlearnt[0]].mean()
        return _held_back(
            found, f"the model is right on only {share:.0%} of its own samples: a class that was hardly learnt looks like that too"
        )
    reason = f"{found.reason}; class {', '.join(map(str, unlearnt))} is not accused: the model gets most of its own samples wrong"
    return replace(found, suspects=left, reason=reason, kind="all-to-one" if len(left) == 1 else "multi-target")


def _held_back(found: Judgement, but: str) -> Judgement:
    reason = f"class {found.suspects[0].target} stands out (p = {found.p_value:.2g}), but {but}"
    return replace(found, verdict="inconclusive", reason=reason, suspects=(), kind=None, pairs=())


def _untestable(solutions: TacSolutions, tested: int, samples: int) -> str | None:
    trivial = np.flatnonzero(solutions.status == "trivial")
    if len(trivial):
        return (
            f"the model sends every sample to class {solutions.classes[trivial[0]]}: "
            "check the preprocessing, or add clean samples of other classes"
        )
    if samples < FEWEST_SAMPLES:
        return f"only {samples} clean samples: add more, at least {FEWEST_SAMPLES} and better some hundred"
    if tested < FEWEST_CLASSES:
        return f"only {tested} classes have a finite norm, at least {FEWEST_CLASSES} are needed to tell an abnormal one"
    return None


_ALSO = {
    ALIGNMENT: "and the alignment of its weights with its own samples",
    QUIET: "and the clean activity of the channels that it uses",
    ALL: "and the alignment of its weights, with the clean activity of the channels that it uses,",
}


def _abnormal(targets: Sequence[int], first: Finding) -> str:
    names = ", ".join(map(str, targets))
    what = f"the shift into class {names} is" if len(targets) == 1 else f"the shifts into classes {names} are"
    kind, look = next(iter(first.looks.items()))
    if kind == NORM:
        how = f"{look.statistic:.1f} standard deviations below the mean of the other log norms"
    else:
        how = f"its norm {_ALSO[kind]} both lie {look.statistic:.1f} standard deviations or more below the others'"
    return f"{what} abnormally small: {how}"


def _opened(targets: Sequence[int], found: Openness) -> str:
    names = ", ".join(map(str, targets))
    kind, look = next(iter(found.looks.items()))
    what = f"a {kind} of the input goes" if kind == SHORT else f"{kind} of the input go"
    return (
        f"{what} abnormally far towards class{'es' if len(targets) > 1 else ''} {names}: "
        f"{look.statistic:.1f} standard deviations above the others"
    )


def _normal(norms: NDArray[np.float64], tested: NDArray[np.intp], p: float, alpha: float) -> str:
    low = deviations(np.log(norms)[None])[0]
    return (
        f"no evidence of a backdoor at level {alpha:g}: the smallest shift, into class {tested[low.argmax()]}, is {low.max():.1f} standard "
        f"deviations below the mean of the other log norms; with what else is known of the {len(tested)} classes p = {p:.2g}"
    )
