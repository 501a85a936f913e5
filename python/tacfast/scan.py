"""Is some class the target of a backdoor? May import: solver, outliers, progress, errors; heads (and torch) only when a model is given."""

from __future__ import annotations

import json
import operator
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tacfast._rust import __version__
from tacfast.errors import CheckpointError, ProblemError
from tacfast.outliers import FEWEST_CLASSES, FEWEST_SAMPLES, mad_index, step_down
from tacfast.progress import counter
from tacfast.solver import TacSolutions, check_arrays, solve

if TYPE_CHECKING:
    from torch import nn

    from tacfast.heads import Captured

SCHEMA = "tacfast.scan/1"

#: The order statistic of a scan: one unusual image in a hundred does not rule a norm.
QUANTILE = 0.99

Verdict = Literal["clean", "backdoored", "inconclusive"]


@dataclass(frozen=True)
class Suspect:
    """A class whose norm is abnormally small."""

    target: int
    p_value: float
    norm: float

    def to_dict(self) -> dict[str, Any]:
        return {"class": self.target, "p_value": self.p_value, "norm": self.norm}


@dataclass(frozen=True, repr=False, eq=False)
class ScanReport:
    """What a scan found. True when it calls the model backdoored."""

    verdict: Verdict
    #: One sentence that says why.
    reason: str
    #: Of the smallest norm, given that the smallest of all was picked; None where nothing could be tested.
    p_value: float | None
    suspects: tuple[Suspect, ...]
    #: "all-to-one" when there are suspects.
    kind: str | None
    #: float64 (C,): norm of the smallest shift into each class; +inf where unreachable.
    norms: NDArray[np.float64]
    #: str (C,): see `TacSolutions.status`.
    status: NDArray[np.str_]
    #: The field's usual index of the smallest norm. Shown, never used.
    mad_index: float | None
    samples: int
    #: Accuracy on the given samples; None without labels.
    clean_accuracy: float | None
    #: Significance level and order statistic of the scan.
    alpha: float
    quantile: float
    #: Seconds per phase.
    timing_s: Mapping[str, float]
    #: Name of the last layer and largest relative |Wz + b - logits|, where a model was scanned.
    head: Mapping[str, Any] | None = None
    #: The solved problems; None in a report that was read from a file.
    solutions: TacSolutions | None = None
    #: Provenance: SHA-256 of the model file and whatever else the caller knows.
    file: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        p = "" if self.p_value is None else f", p={self.p_value:.2g}"
        targets = [s.target for s in self.suspects]
        return f"ScanReport({self.verdict}{p}, suspects={targets}, {len(self.norms)} classes, {self.samples} samples)"

    def __bool__(self) -> bool:
        return self.verdict == "backdoored"

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it: schema `tacfast.scan/1`, null for infinite norms."""
        return {
            "schema": SCHEMA,
            "tool_version": __version__,
            "verdict": self.verdict,
            "reason": self.reason,
            "p_value": self.p_value,
            "kind": self.kind,
            "suspects": [s.to_dict() for s in self.suspects],
            "pairs": [],
            "norms": [float(v) if np.isfinite(v) else None for v in self.norms],
            "status": self.status.tolist(),
            "mad_index": self.mad_index,
            "samples": self.samples,
            "clean_accuracy": self.clean_accuracy,
            "alpha": self.alpha,
            "quantile": self.quantile,
            "timing_s": dict(self.timing_s),
            "head": None if self.head is None else dict(self.head),
            "file": dict(self.file),
        }

    @classmethod
    def from_dict(cls, data: Any) -> ScanReport:
        """Read what `to_dict` wrote.

        Raises:
            CheckpointError: it is not a report of this schema.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise CheckpointError(f'not a scan report: expected a JSON object with "schema": "{SCHEMA}"')
        try:
            suspects = tuple(Suspect(operator.index(s["class"]), float(s["p_value"]), float(s["norm"])) for s in data["suspects"])
            norms = np.array([np.inf if v is None else float(v) for v in data["norms"]])
            if data["verdict"] not in ("clean", "backdoored", "inconclusive"):
                raise ValueError(f"unknown verdict {data['verdict']!r}")
            if any(not 0 <= s.target < len(norms) for s in suspects):
                raise ValueError("a suspect is not among the classes")
            return cls(
                verdict=data["verdict"],
                reason=str(data["reason"]),
                p_value=data["p_value"],
                suspects=suspects,
                kind=data["kind"],
                norms=norms,
                status=np.array(data["status"], dtype=np.str_),
                mad_index=data["mad_index"],
                samples=int(data["samples"]),
                clean_accuracy=data["clean_accuracy"],
                alpha=float(data["alpha"]),
                quantile=float(data["quantile"]),
                timing_s=dict(data["timing_s"]),
                head=data["head"],
                file=dict(data["file"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"scan report is damaged: {type(error).__name__}: {error}") from None

    @classmethod
    def from_json(cls, path: str | Path) -> ScanReport:
        """Read a report file; see `from_dict`."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot read scan report {str(path)!r}: {error}") from None
        return cls.from_dict(data)


def scan_head(
    weight: ArrayLike,
    bias: ArrayLike | None,
    latents: ArrayLike,
    *,
    labels: ArrayLike | None = None,
    alpha: float = 0.05,
    quantile: float = QUANTILE,
    threads: int | None = None,
    progress: bool = False,
    file: Mapping[str, Any] | None = None,
) -> ScanReport:
    """Scan a classifier of any framework from its last layer and clean latents. Needs no torch.

    Args:
        weight, bias, latents: as for `tacfast.solve`: W (C, d), b (C,) or None, Z (n, d).
        labels: integer (n,), the true classes, for the accuracy in the report.
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
    started = time.perf_counter()
    with counter("solving", shown=progress) as tell:
        solutions = solve(w, b, z, quantile=quantile, threads=threads, progress=tell)
    solved = time.perf_counter()
    accuracy = None if labels is None else _accuracy(w, b, z, labels)
    return _judge(solutions, len(z), accuracy, alpha, {"solve": solved - started}, dict(file or {}))


def scan(
    model: nn.Module,
    loader: Iterable[Any],
    *,
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
            to some thousand clean images, preprocessed as the model expects them; labels only serve the accuracy in the report.
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

    started = time.perf_counter()
    captured = capture(model, loader, device=device, progress=progress)
    timing = {"latents": time.perf_counter() - started}
    return scan_captured(captured, timing, alpha=alpha, quantile=quantile, threads=threads, progress=progress, file=file)


def scan_captured(
    captured: Captured,
    timing: dict[str, float],
    *,
    alpha: float = 0.05,
    quantile: float = QUANTILE,
    threads: int | None = None,
    progress: bool = False,
    file: Mapping[str, Any] | None = None,
) -> ScanReport:
    """Scan latents that were captured already; `timing` holds the phases before. Otherwise as `scan`."""
    w, b, z = captured.weight, captured.bias, captured.latents
    report = scan_head(w, b, z, alpha=alpha, quantile=quantile, threads=threads, progress=progress, file=file)
    return replace(
        report,
        clean_accuracy=captured.accuracy,
        timing_s={**timing, **report.timing_s},
        head={"name": captured.name, "proof_error": captured.proof_error},
    )


def _judge(
    solutions: TacSolutions, samples: int, accuracy: float | None, alpha: float, timing: dict[str, float], file: dict[str, Any]
) -> ScanReport:
    started = time.perf_counter()
    tested = np.flatnonzero(solutions.status == "solved")
    norms = solutions.norms[tested]
    verdict, reason = _untestable(solutions, len(tested), samples)
    suspects: tuple[Suspect, ...] = ()
    p_value: float | None = None
    if verdict is None:
        steps = step_down(norms, alpha)
        p_value = steps[0][1]
        suspects = tuple(Suspect(int(solutions.classes[tested[at]]), p, float(norms[at])) for at, p, _ in steps if p <= alpha)
        verdict, reason = _verdict(suspects, steps[0][2], p_value, len(tested), alpha)
        missing = solutions.classes[~solutions.certified]
        if len(missing) and not suspects:
            verdict = "inconclusive"
            reason = f"the solver could not certify {len(missing)} classes (class {missing[0]} first), and one may hide among them"
    timing["statistics"] = time.perf_counter() - started
    return ScanReport(
        verdict=verdict,
        reason=reason,
        p_value=p_value,
        suspects=suspects,
        kind="all-to-one" if suspects else None,
        norms=solutions.norms,
        status=solutions.status,
        mad_index=mad_index(norms) if len(norms) else None,
        samples=samples,
        clean_accuracy=accuracy,
        alpha=alpha,
        quantile=solutions.quantile,
        timing_s=timing,
        solutions=solutions,
        file=file,
    )


def _untestable(solutions: TacSolutions, tested: int, samples: int) -> tuple[Verdict | None, str]:
    trivial = np.flatnonzero(solutions.status == "trivial")
    if len(trivial):
        return "inconclusive", (
            f"the model sends every sample to class {solutions.classes[trivial[0]]}: "
            "check the preprocessing, or add clean samples of other classes"
        )
    if samples < FEWEST_SAMPLES:
        return "inconclusive", f"only {samples} clean samples: add more, at least {FEWEST_SAMPLES} and better some hundred"
    if tested < FEWEST_CLASSES:
        return "inconclusive", f"only {tested} classes have a finite norm, at least {FEWEST_CLASSES} are needed to tell an abnormal one"
    return None, ""


def _verdict(suspects: Sequence[Suspect], statistic: float, p: float, tested: int, alpha: float) -> tuple[Verdict, str]:
    how = f"{statistic:.1f} standard deviations below the mean of the other log norms (p = {p:.2g} over {tested} classes)"
    if suspects:
        return "backdoored", f"the shift into class {suspects[0].target} is abnormally small: {how}"
    return "clean", f"no evidence of a backdoor at level {alpha:g}: the smallest shift is {how}"


def _accuracy(w: NDArray[np.float64], b: NDArray[np.float64] | None, z: NDArray[Any], labels: ArrayLike) -> float:
    try:
        y = np.asarray(labels)
    except ValueError:
        raise ProblemError(f"labels must be integers of shape ({len(z)},)") from None
    if y.shape != (len(z),) or y.dtype.kind not in "iu":
        raise ProblemError(f"labels must be integers of shape ({len(z)},), got {y.dtype} of shape {y.shape}")
    logits = z @ w.T + (0 if b is None else b)
    return float(np.mean(logits.argmax(1) == y))
