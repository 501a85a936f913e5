"""Why a scan says what it says: what a page shows beyond the report itself. May import: report, details, scan, solver, pairs, stability,
geometry, openness, asymmetry, progress, errors; heads (and torch) only when a model is given.

Nothing here has a part in the verdict.
"""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tacfast import details
from tacfast._rust import __version__
from tacfast.asymmetry import FEWEST_PER_SOURCE
from tacfast.errors import ProblemError
from tacfast.openness import Patterns
from tacfast.outliers import FEWEST_SAMPLES
from tacfast.pairs import PairSolutions, solve_pairs
from tacfast.report import ScanReport
from tacfast.scan import _predictions, scan_head
from tacfast.solver import TacSolutions, check_arrays, solve
from tacfast.stability import MOST_CLASSES

if TYPE_CHECKING:
    from torch import nn

#: Shifts that are shown, of as many suspects; and of pairs.
_SUSPECTS, _PAIRS = 4, 2
#: Parts of the samples on which the scan is made again.
_PARTS = (8, 4, 2)
#: Pixels of a side of the pictures that are kept.
_SIDE = 64

Pictures = Mapping[int, NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class _Route:
    """A shift that is shown: from all classes, or from one, into one."""

    target: int
    source: int | None
    #: float64 (d,)
    shift: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Head:
    weight: NDArray[np.float64]
    bias: NDArray[np.float64] | None
    latents: NDArray[Any]
    predictions: NDArray[np.int64]

    def logits(self, samples: NDArray[np.intp]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self.latents[samples] @ self.weight.T + (0.0 if self.bias is None else self.bias)
        return found


def explain_head(
    report: ScanReport,
    weight: ArrayLike,
    bias: ArrayLike | None,
    latents: ArrayLike,
    *,
    names: Mapping[int, str] | Sequence[str | None] | None = None,
    names_from: str = "the caller",
    images: NDArray[np.uint8] | None = None,
    threads: int | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> ScanReport:
    """The report with `details`, and with the pictures that its page shows.

    Args:
        report: a scan of these arrays, made here or read from a file.
        weight, bias, latents: as for `scan_head`.
        names: of the classes, all of them in order or some by number.
        names_from: where the names were found.
        images: uint8 (n, H, W, 3), the samples as pictures.
        threads: worker threads of the solver.
        provenance: what else to tell, as words and numbers: the command line, a seed.

    Raises:
        ProblemError: an argument is malformed, or the arrays are not those that were scanned.
    """
    w, b, z = check_arrays(weight, bias, latents)
    if len(w) != len(report.norms) or len(z) != report.samples:
        raise ProblemError(
            f"weight and latents must be those of the scan, of {len(report.norms)} classes and {report.samples} samples; "
            f"got {len(w)} and {len(z)}"
        )
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[::3] != (len(z), 3)):
        raise ProblemError(f"images must be uint8 ({len(z)}, H, W, 3), got {images.dtype} {images.shape}")
    head = _Head(w, b, z, _predictions(w, b, z))
    solutions = report.solutions or solve(w, b, z, quantile=report.quantile, threads=threads)
    pairs = _pairs(head, threads)
    shifts = [_shift(head, route) for route in _routes(report, solutions, pairs)]
    told: dict[str, Any] = {
        "shifts": shifts,
        "certificate": _certificate(solutions),
        "convergence": _convergence(head, report, threads),
        "provenance": {**versions(), **(provenance or {})},
    }
    if names is not None:
        told |= {"names": _named(names, len(w)), "names_from": names_from}
    if pairs is not None:
        told["pairs"] = [[float(v) if np.isfinite(v) else None for v in row] for row in pairs.norms]
    shown = {entry["sample"] for shift in shifts for entry in shift["easiest"] + shift["hardest"]}
    return replace(
        report,
        details=details.read_details(told, len(w)),
        pictures={} if images is None else {i: images[i] for i in sorted(shown)},
    )


def explain(
    report: ScanReport,
    model: nn.Module,
    loader: Iterable[Any],
    *,
    names: Mapping[int, str] | Sequence[str | None] | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: bool = False,
) -> ScanReport:
    """`explain_head` for a model and its clean data, which it runs once more. Pictures are of its inputs, stretched to full contrast.

    Args:
        report: a scan of this model on these data.
        model, loader, device, threads, progress: as for `scan`.
        names: see `explain_head`; by default those of the loader's data set, where it has any.

    Raises:
        ModelError: see `scan`.
        ProblemError: the data are not those that were scanned.
    """
    from tacfast.heads import capture

    small: list[NDArray[np.uint8]] = []
    found = capture(model, _watched(loader, small), device=device, progress=progress)
    same = len({picture.shape[1:] for picture in small}) == 1 and sum(map(len, small)) == len(found.latents)
    if names is None:
        names = getattr(getattr(loader, "dataset", None), "classes", None)
        names = names if isinstance(names, list) and len(names) == len(found.weight) and all(isinstance(n, str) for n in names) else None
    return explain_head(
        report,
        found.weight,
        found.bias,
        found.latents,
        names=names,
        names_from="the data set",
        images=np.concatenate(small) if same else None,
        threads=threads,
    )


def versions() -> dict[str, Any]:
    """Of what computed this, and when."""
    torch = sys.modules.get("torch")
    return {
        "tacfast": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        **({} if torch is None else {"torch": str(torch.__version__)}),
        "platform": platform.platform(terse=True),
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _pairs(head: _Head, threads: int | None) -> PairSolutions | None:
    """As the scan solves them, where a picture of them can be read."""
    counts = np.bincount(head.predictions, minlength=len(head.weight))
    if len(head.weight) > details.PAIRED or counts.min() < FEWEST_PER_SOURCE:
        return None
    return solve_pairs(head.weight, head.bias, head.latents, head.predictions, threads=threads)


def _routes(report: ScanReport, solutions: TacSolutions, pairs: PairSolutions | None) -> Iterator[_Route]:
    """The suspects'; the easiest of the pairs of an all-to-all backdoor; of a model without a suspect the class that came closest."""
    if report.kind == "all-to-all" and pairs is not None:
        for a, k in sorted(report.pairs, key=lambda pair: float(pairs.norms[pair]))[:_PAIRS]:
            if np.isfinite(pairs.norms[a, k]):
                yield _Route(k, a, pairs.perturbation(a, k))
        return
    first = [e.target for e in report.evidence if e.target is not None][:1]
    for k in [s.target for s in report.suspects][:_SUSPECTS] or first:
        shift = solutions.perturbations[k]
        if np.isfinite(shift).all() and shift.any():
            yield _Route(k, None, shift)


def _shift(head: _Head, route: _Route) -> dict[str, Any]:
    sizes = np.abs(route.shift)
    order = np.argsort(-sizes, kind="stable")
    energy = np.cumsum(sizes[order] ** 2)
    spread = head.latents.std(axis=0, dtype=np.float64)
    easiest, hardest = _pushed(head, route)
    return {
        "class": route.target,
        "source": route.source,
        "norm": float(np.sqrt(energy[-1])),
        "channels": len(sizes),
        "half": int(np.searchsorted(energy, energy[-1] / 2)) + 1,
        "sizes": sizes[order[: details.CHANNELS]].tolist(),
        "top": [{"channel": int(c), "change": float(route.shift[c]), "spread": float(spread[c])} for c in order[: details.TOP]],
        "easiest": easiest,
        "hardest": hardest,
    }


def _pushed(head: _Head, route: _Route) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The samples that the smallest and the largest share of the shift moves into its class, of those that are not there yet."""
    k = route.target
    chosen = np.flatnonzero(head.predictions != k if route.source is None else head.predictions == route.source)
    gain = (head.weight[k] - head.weight) @ route.shift
    shares = np.empty(len(chosen))
    for part in np.array_split(np.arange(len(chosen)), -(-len(chosen) * len(head.weight) // 10_000_000)):
        logits = head.logits(chosen[part])
        lead = logits - logits[:, [k]]
        with np.errstate(divide="ignore", invalid="ignore"):
            shares[part] = np.where(lead > 0, np.where(gain > 0, lead / gain, np.inf), 0.0).max(axis=1, initial=0.0)
    order = np.argsort(shares, kind="stable")
    few = min(details.SAMPLES, len(order) // 2)

    def told(at: NDArray[np.intp]) -> list[dict[str, Any]]:
        return [
            {
                "sample": int(chosen[i]),
                "predicted": int(head.predictions[chosen[i]]),
                "share": float(shares[i]) if np.isfinite(shares[i]) else None,
            }
            for i in at
        ]

    return told(order[:few]), told(order[::-1][:few])


def _certificate(solutions: TacSolutions) -> dict[str, Any]:
    solved = solutions.status == "solved"
    kinds, counts = np.unique(solutions.status, return_counts=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        tightest = solutions.bound[solved] / solutions.norms[solved]
    worst = {name: getattr(solutions, name)[solved] for name in ("primal_residual", "dual_residual", "gap")}
    return {
        "counts": dict(zip(kinds.tolist(), counts.tolist(), strict=True)),
        **{name: _finite(values.max(initial=0.0)) if len(values) else None for name, values in worst.items()},
        "bound": _finite(tightest.min()) if len(tightest) else None,
    }


def _convergence(head: _Head, report: ScanReport, threads: int | None) -> list[dict[str, Any]]:
    """The scan again on nested random parts of the samples; none with so many classes that it would take long."""
    n, points = report.samples, []
    order = np.random.default_rng(0).permutation(n)
    for part in _PARTS if len(head.weight) <= MOST_CLASSES else ():
        if n // part >= FEWEST_SAMPLES:
            some = np.sort(order[: n // part])
            again = scan_head(
                head.weight, head.bias, head.latents[some], patterns=_patterns(report),
                alpha=report.alpha, quantile=report.quantile, threads=threads,
            )  # fmt: skip
            points.append(again)
    return [
        {"samples": r.samples, "verdict": r.verdict, "p_value": r.p_value, "kind": r.kind, "targets": list(r.targets)}
        for r in (*points, report)
    ]


def _patterns(report: ScanReport) -> Patterns | None:
    if report.patterns is None:
        return None
    seen = np.flatnonzero(np.all([np.isfinite(m) for m in report.patterns.values()], axis=0))
    return Patterns(seen, {kind: margins[seen] for kind, margins in report.patterns.items()})


def _named(names: Mapping[int, str] | Sequence[str | None], classes: int) -> list[str | None]:
    given = dict(names) if isinstance(names, Mapping) else {k: name for k, name in enumerate(names) if name is not None}
    if any(not 0 <= k < classes for k in given):
        raise ProblemError(f"names must be of the {classes} classes, from 0 to {classes - 1}")
    return [None if k not in given else str(given[k])[: details.LETTERS] for k in range(classes)]


def _watched(loader: Iterable[Any], small: list[NDArray[np.uint8]]) -> Iterator[Any]:
    """The batches, and small pictures of them on the way where they are images."""
    import torch

    from tacfast.heads import split_batch

    for batch in loader:
        images, _ = split_batch(batch)
        if images.ndim == 4 and images.shape[1] in (1, 3) and len(images) and images.is_floating_point():
            x = images.detach().float().cpu()
            scale = min(1.0, _SIDE / max(x.shape[2:]))
            if scale < 1:
                size = [max(1, round(side * scale)) for side in x.shape[2:]]
                x = torch.nn.functional.interpolate(x, size=size, mode="bilinear", antialias=True)
            low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
            x = ((x - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
            small.append(x.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
        yield batch


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
