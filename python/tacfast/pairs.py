"""Source by source: the smallest shift that sends the samples of one class to another. May import: solver, _rust, numpy, errors."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tacfast import _rust
from tacfast.errors import ProblemError
from tacfast.solver import STATUSES, Engine, Progress, TacSolutions, call_core, check_arguments, check_memory, plain, shared_fields

#: About what the answer to one pair takes while it is handed over: 20 to 40 multipliers with their places, twice.
_BYTES_PER_PAIR = 2000


@dataclass(frozen=True, repr=False, eq=False)
class PairSolutions:
    """The smallest latent shifts from each source class into each target class, with their proofs. C classes, latents of dimension d.

    s_{a→k} solves (P_k) of arXiv:2511.08944 with the constraints of the samples labelled a alone. All-to-all and source-specific backdoors
    leave such shifts small that hold for few sources. Where there is no problem to solve the norm is NaN and the status "none": on the
    diagonal, for sources without samples, and for targets that were not asked for.

    `norms`, `status` and the like are C × C, by source and target. The multipliers of (a, k) lie at `e = index[a, k]` in
    `indptr[e]:indptr[e + 1]`, as in `TacSolutions`; `source(a)` puts them together with the shifts.
    """

    #: float64 (C, C): ‖s_{a→k}‖ by source a and target k; +inf where unreachable, NaN where there is no problem.
    norms: NDArray[np.float64]
    #: str (C, C): as in `TacSolutions`, and "none".
    status: NDArray[np.str_]
    #: float64 (C, C): a lower bound on the norm that holds in spite of rounding.
    bound: NDArray[np.float64]
    #: int64 (C, C): position among the solved problems; -1 where there is none.
    index: NDArray[np.int64]
    #: int64 (C,): samples of each source.
    counts: NDArray[np.int64]
    #: All problems that were solved, by target and then by source; its `perturbations` are left out.
    columns: dict[str, Any]
    #: float64 (C, d): the head's weight, of which the shifts are made.
    weight: NDArray[np.float64]
    #: The order statistic that stood for the maximum over samples.
    quantile: float
    #: Seconds by stage, as in `TacSolutions`.
    stage_seconds: dict[str, float]

    def __repr__(self) -> str:
        counts = ", ".join(f"{np.sum(self.status == s)} {s}" for s in STATUSES if np.any(self.status == s))
        return f"PairSolutions({len(self.norms)} classes: {counts})"

    @property
    def certified(self) -> NDArray[np.bool_]:
        """bool (C, C): every status but "not-converged"."""
        flags: NDArray[np.bool_] = self.status != "not-converged"
        return flags

    def perturbation(self, source: SupportsIndex, target: SupportsIndex) -> NDArray[np.float64]:
        """float64 (d,): s_{a→k}, made of its multipliers when asked for; NaN where unreachable or where there is no problem.

        Raises:
            ProblemError: source or target is no class.
        """
        a, k = self._checked("source", source), self._checked("target", target)
        e = self.index[a, k]
        if e < 0 or not np.isfinite(self.norms[a, k]):
            return np.full(self.weight.shape[1], np.nan)
        part = slice(*self.columns["indptr"][e : e + 2])
        shift: NDArray[np.float64] = self.columns["multipliers"][part] @ (self.weight[k] - self.weight[self.columns["active"][part]])
        return shift

    def source(self, source: SupportsIndex) -> TacSolutions:
        """The problems of one source, as `solve` gives them for its samples: with shifts, and `verify` for `latents[labels == source]`.

        `samples` count through all latents.

        Raises:
            ProblemError: source is no class.
        """
        row = self.index[self._checked("source", source)]
        targets = np.flatnonzero(row >= 0)
        chosen = row[targets]
        indptr = self.columns["indptr"]
        parts = [np.arange(indptr[e], indptr[e + 1]) for e in chosen]
        entries = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
        ragged = {"active", "multipliers", "samples"}
        picked = {k: v[entries] if k in ragged else v[chosen] for k, v in self.columns.items() if k != "indptr"}
        return TacSolutions(
            classes=targets,
            perturbations=np.array([self.perturbation(source, k) for k in targets]).reshape(len(targets), self.weight.shape[1]),
            indptr=np.cumsum([0, *map(len, parts)]),
            quantile=self.quantile,
            stage_seconds=self.stage_seconds,
            **picked,
        )

    def to_dict(self) -> dict[str, Any]:
        """Norms, statuses, bounds and counts as lists and numbers, ready for JSON: what is infinite or NaN becomes None."""
        kept = ("norms", "status", "bound", "counts", "quantile", "stage_seconds")
        return {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name in kept}

    def _checked(self, name: str, value: SupportsIndex) -> int:
        try:
            k = -1 if isinstance(value, (bool, np.bool_)) else operator.index(value)
        except TypeError:
            k = -1
        if not 0 <= k < len(self.norms):
            raise ProblemError(f"{name} must be an integer from 0 to {len(self.norms) - 1}, got {value!r}")
        return k


def solve_pairs(
    weight: ArrayLike,
    bias: ArrayLike | None,
    latents: ArrayLike,
    labels: ArrayLike,
    *,
    targets: Sequence[SupportsIndex] | NDArray[np.integer[Any]] | None = None,
    quantile: float = 1.0,
    engine: Engine = "auto",
    tol: float = 1e-9,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PairSolutions:
    """Find, for each pair of classes, the smallest shift of the latents that sends every sample of the one to the other.

    Args:
        latents: as for `solve`, but on the host.
        labels: integers (n,), the class of each sample (true or predicted), from 0 to C - 1.
        targets: into which classes; all by default.
        progress: as for `solve`, with pairs done and pairs in all.
        weight, bias, quantile, engine, tol, threads: as for `solve`; the quantile is one over a source's samples.

    Returns:
        PairSolutions. All logits are formed once, whatever the number of sources.

    Raises:
        ProblemError: an argument is malformed; the message names it.
        KeyboardInterrupt: on Ctrl-C, within a fraction of a second.
    """
    arguments, chosen = check_arguments(weight, bias, latents, targets, quantile, engine, tol, threads)
    w, count = arguments["weight"], len(arguments["weight"])
    if len(np.unique(chosen)) < len(chosen):
        raise ProblemError("targets must not name a class twice")
    sources = _check_labels(labels, len(arguments["latents"]), count)
    counts = np.bincount(sources, minlength=count)
    total = int(np.sum(np.subtract.outer(chosen, np.flatnonzero(counts)) != 0))
    check_memory(w, len(sources), _BYTES_PER_PAIR * total)
    columns = call_core(_rust.solve_pairs, arguments, progress, total, sources.tolist())
    at = (columns["sources"], columns["classes"])
    found = shared_fields(columns)

    def table(values: NDArray[Any], empty: Any) -> NDArray[Any]:
        full = np.full((count, count), empty, dtype=np.result_type(values, np.min_scalar_type(empty)))
        full[at] = values
        return full

    return PairSolutions(
        norms=table(found["norms"], np.nan),
        status=table(found["status"], "none"),
        bound=table(found["bound"], np.nan),
        index=table(np.arange(len(at[0])), -1),
        counts=counts,
        columns=found,
        weight=w,
        quantile=arguments["quantile"],
        stage_seconds=columns["stage_seconds"],
    )


def _check_labels(labels: ArrayLike, samples: int, classes: int) -> NDArray[np.int64]:
    if isinstance(labels, np.ma.MaskedArray):
        raise ProblemError("labels must not be a masked array: its mask would be lost")
    try:
        array = np.asarray(labels)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ProblemError(f"labels cannot be read as an array: {error}") from None
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ProblemError(f"labels must be integers of shape (samples,), got {array.dtype} of shape {array.shape}")
    if len(array) != samples:
        raise ProblemError(f"labels must have one entry per sample ({samples}), got {len(array)}")
    outside = array[(array < 0) | (array >= classes)]
    if len(outside):
        raise ProblemError(f"labels must be from 0 to {classes - 1}, got {outside[0]}")
    return array.astype(np.int64)
