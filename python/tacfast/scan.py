"""Is there a backdoor in a classifier? May import: report, solver, pairs, verdict, outliers, openness, geometry, asymmetry,
stability, progress, errors; heads and patterns (and torch) only when a model is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tacfast.asymmetry import FEWEST_PER_SOURCE, MOST_CLASSES
from tacfast.errors import ProblemError
from tacfast.geometry import traits
from tacfast.openness import Patterns, chosen
from tacfast.outliers import mad_index
from tacfast.pairs import solve_pairs
from tacfast.progress import counter, timed
from tacfast.report import ScanReport
from tacfast.solver import TacSolutions, check_arrays, solve
from tacfast.stability import moved_share, stability
from tacfast.verdict import Judgement, judge, with_labels, with_stability

if TYPE_CHECKING:
    from torch import nn

    from tacfast.heads import Captured

#: The order statistic of a scan: one unusual image in a hundred does not rule a norm.
QUANTILE = 0.99
#: What looking at patterns may take without being asked for.
PATTERN_SECONDS = 600
#: Logits that are held at a time.
_LOGITS = 10_000_000


def scan_head(
    weight: ArrayLike,
    bias: ArrayLike | None,
    latents: ArrayLike,
    *,
    labels: ArrayLike | None = None,
    patterns: Patterns | Callable[[NDArray[np.float64]], Patterns | None] | None = None,
    alpha: float = 0.05,
    quantile: float = QUANTILE,
    threads: int | None = None,
    progress: bool = False,
    file: Mapping[str, Any] | None = None,
) -> ScanReport:
    """Scan a classifier of any framework from its last layer and clean latents. Needs no torch.

    Args:
        weight, bias, latents: as for `tacfast.solve`: W (C, d), b (C,) or None, Z (n, d).
        labels: integer (n,), the true classes: for the accuracy in the report, and so that no class is accused that the model has not
            learnt.
        patterns: how far small patterns of the input go towards each class, or what tells it from the norms, float64 (C,); a head alone
            cannot say. `scan` measures them (`tacfast.patterns`).
        alpha: significance level in (0, 1): the share of clean models that may be flagged.
        quantile: see `tacfast.solve`.
        threads: worker threads of the solver.
        progress: draw a progress bar on standard error.
        file: provenance to keep in the report.

    Raises:
        ProblemError: an argument is malformed.
    """
    if not isinstance(alpha, (int, float)) or not 0 < alpha < 1:
        raise ProblemError(f"alpha must be between 0 and 1, got {alpha!r}")
    w, b, z = check_arrays(weight, bias, latents)
    timing: dict[str, float] = {}
    with timed(timing, "solve"), counter("solving", shown=progress) as tell:
        solutions = solve(w, b, z, quantile=quantile, threads=threads, progress=tell)
    with timed(timing, "statistics"):
        predictions = _predictions(w, b, z)
        truth = None if labels is None else _labels(labels, len(z))
        also = traits(w, z, predictions, solutions.perturbations)
    with timed(timing, "pairs"):
        pairs = _pair_norms(w, b, z, predictions, threads)
    if callable(patterns):
        with timed(timing, "patterns"):
            known = patterns(solutions.norms)
    else:
        known = patterns
    _check(known, len(w))
    with timed(timing, "statistics"):
        found = judge(solutions, len(z), also, pairs, None if known is None else known.testable(), alpha)
    first = next((e for e in found.evidence if e.target is not None), None)
    stable, moved = None, None
    if first is not None and first.target is not None:
        named = [s.target for s in found.suspects] or [first.target]
        with timed(timing, "stability"):
            # A pattern was measured on other images than those that made it.
            by_pattern = known is not None and first.kind in known.margins
            stable = (
                None if by_pattern else stability(w, b, z, predictions, targets=named, kind=first.kind, quantile=quantile, threads=threads)
            )
            moved = moved_share(w, b, z, solutions.perturbations[first.target], first.target)
        found = with_labels(with_stability(found, stable), predictions, truth)
    more = {
        "alignment": also.alignment,
        "spread": also.spread,
        "patterns": None if known is None else _by_class(known, len(w)),
        "stability": stable,
        "moved": moved,
        "samples": len(z),
        "clean_accuracy": None if truth is None else float(np.mean(predictions == truth)),
        "alpha": alpha,
    }
    return _report(found, solutions, more, timing, dict(file or {}))


def scan(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    patterns: bool | None = None,
    alpha: float = 0.05,
    quantile: float = QUANTILE,
    device: str = "auto",
    threads: int | None = None,
    progress: bool = False,
    file: Mapping[str, Any] | None = None,
) -> ScanReport:
    """Scan a model for a backdoor with clean data.

    Args:
        model: any module from images to logits whose last layer is linear. Left as found.
        loader: a DataLoader or any iterable of batches: images, (images, labels), or dicts with "pixel_values" and "labels". Some hundred
            to some thousand clean images, preprocessed as the model expects them; for labels see `scan_head`.
        patterns: whether to look at patterns of the input too; by default if that is not likely to take more than PATTERN_SECONDS.
        alpha: significance level in (0, 1): the share of clean models that may be flagged.
        quantile: see `tacfast.solve`.
        device: "auto" (the GPU where there is one) or torch's name of a device.
        threads: worker threads of the solver.
        progress: draw a progress bar on standard error.
        file: provenance to keep in the report.

    Raises:
        ModelError: the model does not end in a linear layer, or fails on the data.
        ProblemError: an argument is malformed, or latents are not finite.
    """
    from tacfast.heads import capture
    from tacfast.patterns import IMAGES

    started = time.perf_counter()
    captured = capture(model, loader, device=device, keep=0 if patterns is False else IMAGES, progress=progress)
    timing = {"latents": time.perf_counter() - started}
    look = (
        None if patterns is False else pattern_look(model, captured, timing["latents"], wanted=patterns, device=device, progress=progress)
    )
    return scan_captured(captured, timing, patterns=look, alpha=alpha, quantile=quantile, threads=threads, progress=progress, file=file)


def pattern_look(
    model: nn.Module, captured: Captured, latents_s: float, *, wanted: bool | None, device: str, progress: bool
) -> Callable[[NDArray[np.float64]], Patterns | None]:
    """What `scan_head` asks for patterns: None with too few images or whole-numbered ones, or if it would take long and nobody insists.

    Args:
        captured: with images.
        latents_s: seconds that `capture` took, which tell how fast the model is.
        wanted: never or however long it takes; None if that is not likely to take more than PATTERN_SECONDS.
    """
    from tacfast.heads import choose_device
    from tacfast.patterns import FEWEST_IMAGES, measure, passes

    images = captured.images

    def look(norms: NDArray[np.float64]) -> Patterns | None:
        if wanted is False or images is None or len(images) < FEWEST_IMAGES or not images.is_floating_point():
            return None
        classes = chosen(norms)
        likely = passes(len(classes), len(images)) * latents_s / len(captured.latents)
        if likely > PATTERN_SECONDS and wanted is None:
            return None
        return measure(model, images, classes, device=choose_device(model, device), progress=progress)

    return look


def scan_captured(
    captured: Captured,
    timing: dict[str, float],
    *,
    patterns: Callable[[NDArray[np.float64]], Patterns | None] | None = None,
    alpha: float = 0.05,
    quantile: float = QUANTILE,
    threads: int | None = None,
    progress: bool = False,
    file: Mapping[str, Any] | None = None,
) -> ScanReport:
    """Scan latents that were captured already; `timing` holds the phases before. Otherwise as `scan`."""
    w, b, z, y = captured.weight, captured.bias, captured.latents, captured.labels
    report = scan_head(w, b, z, labels=y, patterns=patterns, alpha=alpha, quantile=quantile, threads=threads, progress=progress, file=file)
    return replace(
        report,
        timing_s={**timing, **report.timing_s},
        head={"name": captured.name, "proof_error": captured.proof_error},
    )


def _predictions(w: NDArray[Any], b: NDArray[Any] | None, z: NDArray[Any]) -> NDArray[np.int64]:
    """The model's classes, a few samples at a time: with many classes all logits at once would be large."""
    parts = np.array_split(z, -(-z.shape[0] * len(w) // _LOGITS))
    return np.concatenate([(part @ w.T + (0 if b is None else b)).argmax(axis=1) for part in parts])


def _pair_norms(
    w: NDArray[Any], b: NDArray[Any] | None, z: NDArray[Any], predictions: NDArray[np.int64], threads: int | None
) -> NDArray[np.float64] | None:
    """float64 (C, C), by source and target; None where there are too many classes or too few samples of one."""
    counts = np.bincount(predictions, minlength=len(w))
    if len(w) > MOST_CLASSES or counts.min() < FEWEST_PER_SOURCE:
        return None
    return solve_pairs(w, b, z, predictions, threads=threads).norms


def _check(known: Patterns | None, classes: int) -> None:
    if known is None:
        return
    k = np.asarray(known.classes)
    if k.dtype.kind not in "iu" or k.ndim != 1 or len(np.unique(k)) < len(k) or (len(k) and not 0 <= k.min() <= k.max() < classes):
        raise ProblemError(f"patterns must be of different classes, 0 to {classes - 1}")
    if any(m.shape != k.shape for m in known.margins.values()):
        raise ProblemError(f"patterns must have a margin for each of their {len(k)} classes, of every kind")


def _by_class(known: Patterns, classes: int) -> dict[str, NDArray[np.float64]]:
    """float64 (C,) by kind, NaN for classes that were not looked at."""
    by_kind = {kind: np.full(classes, np.nan) for kind in known.margins}
    for kind, margins in known.margins.items():
        by_kind[kind][known.classes] = margins
    return by_kind


def _report(found: Judgement, solutions: TacSolutions, more: dict[str, Any], timing: dict[str, float], file: dict[str, Any]) -> ScanReport:
    solved = solutions.norms[solutions.status == "solved"]
    return ScanReport(
        **vars(found),
        **more,
        norms=solutions.norms,
        status=solutions.status,
        mad_index=mad_index(solved) if len(solved) else None,
        quantile=solutions.quantile,
        timing_s=timing,
        solutions=solutions,
        file=file,
    )


def _labels(labels: ArrayLike, samples: int) -> NDArray[np.int64]:
    try:
        y = np.asarray(labels)
    except ValueError:
        raise ProblemError(f"labels must be integers of shape ({samples},)") from None
    if y.shape != (samples,) or y.dtype.kind not in "iu":
        raise ProblemError(f"labels must be integers of shape ({samples},), got {y.dtype} of shape {y.shape}")
    return y.astype(np.int64)
