"""Arrays in, certified solutions out. May import: _rust, numpy, errors; of torch only `device`, and only for tensors that are not here."""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, SupportsIndex, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tacfast import _rust
from tacfast.errors import ProblemError

Engine = Literal["auto", "active-set", "clarabel", "clarabel-full"]
#: (done, total)
Progress = Callable[[int, int], object]

#: Status codes of the core, in order.
STATUSES = np.array(["solved", "trivial", "unreachable", "not-converged"])
_ENGINES = np.array(["active-set", "clarabel", "clarabel-full"])


@dataclass(frozen=True, repr=False, eq=False)
class TacSolutions:
    """The smallest latent shift into each class, with its proof. m classes, latents of dimension d.

    The shift of class k solves (P_k) of arXiv:2511.08944: min ½‖s‖² subject to (w_k - w_j)ᵀ(s + z_i) + b_k - b_j ≥ 0 for every rival j
    and every sample i. `perturbations[t] = Σ_e multipliers[e] · (weight[k] - weight[active[e]])` over `indptr[t] ≤ e < indptr[t + 1]`.
    """

    #: int64 (m,): the classes, in the order asked for.
    classes: NDArray[np.int64]
    #: float64 (m,): ‖s_k‖ in the units of the latents; +inf where unreachable, of the best attempt (perhaps NaN) where not converged.
    norms: NDArray[np.float64]
    #: str (m,): "solved"; "trivial" (s = 0); "unreachable" (`bound` proves it); "not-converged" (only `bound` is proven).
    status: NDArray[np.str_]
    #: float64 (m, d): s_k; zero where trivial, NaN where unreachable or where `norms` is.
    perturbations: NDArray[np.float64]
    #: int64 (m + 1,): where each class begins in the next three arrays.
    indptr: NDArray[np.int64]
    #: int64: the rivals whose constraints are active, increasing within a class. Where unreachable, those of Farkas' proof.
    active: NDArray[np.int64]
    #: float64: their positive multipliers.
    multipliers: NDArray[np.float64]
    #: int64: for each, the sample that attains its margin r_kj.
    samples: NDArray[np.int64]
    #: float64 (m,): a lower bound on ‖s_k‖ that holds in spite of rounding.
    bound: NDArray[np.float64]
    #: float64 (m,): at most max_j (r_kj - a_jᵀs)₊ / max_j |r_kj|, rounding included; NaN where unreachable.
    primal_residual: NDArray[np.float64]
    #: float64 (m,): largest negative multiplier over the largest; where unreachable ‖Σλ_j a_j‖ / Σλ_j‖a_j‖.
    dual_residual: NDArray[np.float64]
    #: float64 (m,): |‖s‖² - rᵀλ| / ‖s‖²; NaN where unreachable.
    gap: NDArray[np.float64]
    #: int64 (m,): steps of the engine.
    iterations: NDArray[np.int64]
    #: str (m,): the engine whose answer this is.
    engine: NDArray[np.str_]
    #: The order statistic that stood for the maximum over samples.
    quantile: float
    #: Seconds by stage: "logits" and "gram" by the clock, "collapse" and "qp" summed over the worker threads.
    stage_seconds: dict[str, float]

    def __repr__(self) -> str:
        counts = ", ".join(f"{np.sum(self.status == s)} {s}" for s in STATUSES if np.any(self.status == s))
        return f"TacSolutions({len(self)} classes: {counts})"

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def certified(self) -> NDArray[np.bool_]:
        """bool (m,): every status but "not-converged"."""
        flags: NDArray[np.bool_] = self.status != "not-converged"
        return flags

    def to_dict(self) -> dict[str, Any]:
        """All fields as lists and numbers, ready for JSON: what is infinite or NaN becomes None."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}

    def verify(self, weight: ArrayLike, bias: ArrayLike | None, latents: ArrayLike) -> dict[str, NDArray[np.float64]]:
        """Recompute every certificate from the problem alone, in numpy and float64. O(n·C) a class.

        Returns `primal`, `dual`, `gap` and `stationarity` (‖s - Σλ_j a_j‖ / ‖s‖), each float64 (m,), NaN where unreachable, and `bound`,
        the lower bound rᵀλ / ‖Σλ_j a_j‖ as it comes out without rounding analysis.

        Raises:
            ProblemError: the arrays are not those of a problem with these classes.
        """
        w, b, z = check_arrays(weight, bias, latents)
        z = z.astype(np.float64, copy=False)
        b = np.zeros(len(w)) if b is None else b
        if w.shape[1] != self.perturbations.shape[1] or z.shape[1] != w.shape[1] or len(b) != len(w) or len(z) == 0:
            raise ProblemError(f"weight {w.shape}, bias {b.shape} and latents {z.shape} do not fit one another and these solutions")
        if max(self.classes.max(initial=-1), self.active.max(initial=-1)) >= len(w):
            raise ProblemError(f"weight has {len(w)} rows, the solutions speak of more classes")
        logits = z @ w.T + b
        out = {name: np.full(len(self), np.nan) for name in ("primal", "dual", "gap", "stationarity", "bound")}
        for t, k in enumerate(self.classes):
            for name, value in zip(out, self._verify_class(t, int(k), w, b, z, logits), strict=True):
                out[name][t] = value
        return out

    def _verify_class(
        self,
        t: int,
        k: int,
        w: NDArray[np.float64],
        b: NDArray[np.float64],
        z: NDArray[np.float64],
        logits: NDArray[np.float64],
    ) -> Iterator[float]:
        part = slice(self.indptr[t], self.indptr[t + 1])
        active, x, s = self.active[part], self.multipliers[part], self.perturbations[t]
        margins = logits - logits[:, [k]]
        rank = min(max(int(np.ceil(self.quantile * len(z))), 1), len(z)) - 1
        r = np.partition(margins, rank, axis=0)[rank]
        # Equal rows leave rounding noise in the difference of their logits; the difference of the rows does not.
        close = np.flatnonzero(np.linalg.norm(w - w[k], axis=1) <= 1e-3 * np.linalg.norm(w[k]))
        r[close] = np.partition(z @ (w[close] - w[k]).T, rank, axis=0)[rank] + (b[close] - b[k])
        made = x @ (w[k] - w[active]) if len(active) else np.zeros_like(s)
        paid, length = float(r[active] @ x), float(np.linalg.norm(made))
        # Silent where 0/0 or NaN says "not defined for this status".
        with np.errstate(invalid="ignore", divide="ignore"):
            reached = s @ w[k] - w @ s
            reached[close] = (w[k] - w[close]) @ s
            slack = np.delete(r - reached, k)
            square = float(s @ s)
            yield _ratio(float(np.maximum(slack, 0).max()), float(np.abs(np.delete(r, k)).max()))
            yield _ratio(float(np.maximum(-x, 0).max(initial=0)), float(np.abs(x).max(initial=0)))
            yield _ratio(abs(square - paid), square)
            yield _ratio(float(np.linalg.norm(s - made)), float(np.linalg.norm(s)))
            yield np.inf if length == 0 < paid else _ratio(max(paid, 0.0), length)


def solve(
    weight: ArrayLike,
    bias: ArrayLike | None,
    latents: ArrayLike,
    *,
    classes: Sequence[SupportsIndex] | NDArray[np.integer[Any]] | None = None,
    quantile: float = 1.0,
    engine: Engine = "auto",
    tol: float = 1e-9,
    threads: int | None = None,
    progress: Progress | None = None,
) -> TacSolutions:
    """Find, for each class, the smallest shift of the latents that sends every sample to it.

    Args:
        weight: last layer W, float32 or float64 (C, d), any strides.
        bias: b, (C,), or None for zeros.
        latents: inputs of that layer for clean samples, float32 or float64 (n, d), any strides; borrowed, never copied whole. Of a CUDA
            tensor the margins are formed on its device, in float32, and taken as they are: norms agree with the host's to float32,
            and certificates, bounds and "unreachable" speak of these margins.
        classes: which classes, in which order; all of them by default.
        quantile: in (0, 1]; below 1 each constraint uses that order statistic of the samples' margins (no interpolation) instead of the
            maximum, and is less ruled by one outlier. It then binds at least 1 - (C - 1)(1 - quantile) of the samples.
        engine: "auto" is the active-set kernel, with Clarabel for what its certificate does not cover; "active-set" and "clarabel" use one
            alone; "clarabel-full" gives Clarabel all C - 1 constraints at once and is meant for tests.
        tol: largest relative primal residual, dual residual and duality gap of a class called solved.
        threads: worker threads; None uses every core. Results are the same for any number. There are no others:
            the core calls no BLAS.
        progress: called about twenty times a second, on the calling thread, with (classes done, classes in all). What it raises ends the
            solve.

    Returns:
        TacSolutions, one entry per class, in the order of `classes`.

    Raises:
        ProblemError: an argument is malformed; the message names it.
        KeyboardInterrupt: on Ctrl-C, within a fraction of a second.
    """
    if getattr(latents, "is_cuda", False):
        return solve_on_device(weight, bias, latents, classes, quantile, engine, tol, threads, progress)
    arguments, chosen = check_arguments(weight, bias, latents, classes, quantile, engine, tol, threads)
    w = arguments["weight"]
    check_memory(w, len(arguments["latents"]), 24 * len(chosen) * w.shape[1])
    columns = call_core(_rust.solve, arguments, progress, len(chosen))
    return _solutions(columns, chosen, arguments)


def solve_on_device(
    weight: Any, bias: Any, latents: Any, classes: Any, quantile: Any, engine: Any, tol: Any, threads: Any, progress: Progress | None
) -> TacSolutions:
    """`solve` for a torch tensor of latents on any device, which stays there: see `tacfast.device`."""
    from tacfast.device import collapse

    weight, bias = (v.detach().cpu() if hasattr(v, "detach") else v for v in (weight, bias))
    if latents.ndim != 2 or latents.is_sparse or not latents.is_floating_point():
        raise ProblemError(
            f"latents must be a dense float32 or float64 tensor (samples, dimension), got {latents.dtype} {tuple(latents.shape)}"
        )
    # One latent stands for all where shapes and dtypes are checked.
    arguments, chosen = check_arguments(weight, bias, latents[:1].detach().cpu(), classes, quantile, engine, tol, threads)
    w, fraction = arguments["weight"], arguments["quantile"]
    if latents.shape[1] != w.shape[1] or len(latents) == 0:
        raise ProblemError(f"latents must have {w.shape[1]} columns to match weight, and at least one row, got {tuple(latents.shape)}")
    if not bool(latents.isfinite().all()):
        raise ProblemError("latents must be finite")
    if not 0 < fraction <= 1:
        raise ProblemError(f"quantile must be in (0, 1], got {fraction}")
    check_memory(w, len(latents), (8 * len(w) + 24 * w.shape[1]) * len(chosen))
    start = time.perf_counter()
    found = collapse(w, latents, chosen, fraction)
    spent = time.perf_counter() - start
    arguments["latents"] = (found.count, found.longest)
    columns = call_core(_rust.solve_margins, arguments, progress, len(chosen), found.margins, found.samples, found.unit)
    columns["stage_seconds"]["collapse"] += spent
    return _solutions(columns, chosen, arguments)


def _solutions(columns: _rust.Columns, chosen: NDArray[np.int64], arguments: _rust.Arguments) -> TacSolutions:
    w = arguments["weight"]
    return TacSolutions(
        classes=chosen,
        perturbations=columns["perturbations"].reshape(len(chosen), w.shape[1]),
        quantile=arguments["quantile"],
        stage_seconds=columns["stage_seconds"],
        **shared_fields(columns),
    )


def check_arguments(
    weight: ArrayLike,
    bias: ArrayLike | None,
    latents: ArrayLike,
    classes: Any,
    quantile: Any,
    engine: Any,
    tol: Any,
    threads: Any,
) -> tuple[_rust.Arguments, NDArray[np.int64]]:
    """What the core is given, but for progress; and the classes as an array.

    Raises:
        ProblemError: an argument is malformed.
    """
    w, b, z = check_arrays(weight, bias, latents)
    chosen = _check_classes(classes, len(w))
    if not isinstance(engine, str) or engine not in get_args(Engine):
        raise ProblemError(f"engine must be one of {', '.join(get_args(Engine))}, got {engine!r}")
    arguments: _rust.Arguments = {
        "weight": w,
        "bias": b,
        "latents": z,
        "classes": chosen.tolist(),
        "quantile": _check_number("quantile", quantile),
        "engine": engine,
        "tol": _check_number("tol", tol),
        "threads": _check_threads(threads),
        "progress": None,
    }
    return arguments, chosen


def call_core(
    solve: Callable[..., _rust.Columns], arguments: _rust.Arguments, progress: Progress | None, total: int, *more: Any
) -> _rust.Columns:
    """Run the core, with its complaints as our errors and without touching what `progress` raises."""
    if progress is not None and not callable(progress):
        raise ProblemError(f"progress must be None or a function of (done, total), got {progress!r}")
    raised: list[BaseException] = []

    def tell(done: int) -> None:
        assert progress is not None
        try:
            progress(done, total)
        except BaseException as error:
            raised.append(error)
            raise

    try:
        return solve({**arguments, "progress": None if progress is None else tell}, *more)
    except (ValueError, TypeError) as error:
        if raised:
            raise
        raise ProblemError(str(error)) from None


def shared_fields(columns: _rust.Columns) -> dict[str, Any]:
    """The core's columns that every kind of solutions has."""
    return {
        "norms": columns["norms"],
        "status": STATUSES[columns["status"]],
        "indptr": columns["indptr"],
        "active": columns["active"],
        "multipliers": columns["multipliers"],
        "samples": columns["samples"],
        "bound": columns["bound"],
        "primal_residual": columns["primal_residual"],
        "dual_residual": columns["dual_residual"],
        "gap": columns["gap"],
        "iterations": columns["iterations"],
        "engine": _ENGINES[columns["engine"]],
    }


def check_arrays(
    weight: ArrayLike, bias: ArrayLike | None, latents: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None, NDArray[Any]]:
    """Weight and bias in float64, latents as they are. Shapes that the core checks are left to it.

    Raises:
        ProblemError: an argument is not a real floating-point array of the right number of dimensions.
    """
    w = _floating("weight", weight, 2, "(classes, dimension)").astype(np.float64, copy=False)
    z = _floating("latents", latents, 2, "(samples, dimension)")
    b = None if bias is None else _floating("bias", bias, 1, "(classes,)").astype(np.float64, copy=False)
    return w, b, z


def _floating(name: str, value: ArrayLike, ndim: int, shape: str) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ProblemError(f"{name} cannot be read as an array: {error}") from None
    if isinstance(value, np.ma.MaskedArray):
        raise ProblemError(f"{name} must not be a masked array: its mask would be lost")
    native = array.dtype.newbyteorder("=")
    if native not in (np.float32, np.float64):
        raise ProblemError(f"{name} must be float32 or float64, got {array.dtype}; convert it with .astype(np.float32)")
    if array.ndim != ndim:
        raise ProblemError(f"{name} must have {ndim} dimensions {shape}, got shape {array.shape}")
    # The core reads native, aligned memory of any strides.
    return array if array.dtype == native and array.flags.aligned else array.astype(native)


def _check_classes(classes: Any, count: int) -> NDArray[np.int64]:
    if classes is None:
        return np.arange(count, dtype=np.int64)
    try:
        chosen = np.asarray([operator.index(k) for k in classes], dtype=np.int64)
    except (TypeError, OverflowError) as error:
        raise ProblemError(f"classes must be a sequence of integers from 0 to {count - 1}: {error}") from None
    outside = chosen[(chosen < 0) | (chosen >= count)]
    if len(outside):
        raise ProblemError(f"classes must be from 0 to {count - 1}, got {outside[0]}")
    return chosen


def _check_number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ProblemError(f"{name} must be a number, got {value!r}") from None


def check_memory(weight: NDArray[np.float64], samples: int, answers: int) -> None:
    """Refuse at once what would be killed half-way: the core holds C^2 and n C numbers at a time, and its answers take some bytes too.

    Raises:
        ProblemError: this machine has less memory than that.
    """
    classes = len(weight)
    needed = classes**2 * (8 if classes <= 10_000 else 4) + samples * classes * 4 + 3 * weight.nbytes + answers
    try:
        present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return  # not a POSIX system: the allocator will have to say it
    if needed > present:
        have = present / 2**30
        raise ProblemError(f"weight has too many classes: {classes} and {samples} samples need {needed / 2**30:.0f} GiB of {have:.0f}")


def _check_threads(threads: Any) -> int | None:
    if threads is None:
        return None
    if not isinstance(threads, (int, np.integer)) or isinstance(threads, bool) or not 1 <= threads <= 1024:
        raise ProblemError(f"threads must be None or an integer between 1 and 1024, got {threads!r}")
    return int(threads)


def _ratio(a: float, b: float) -> float:
    return 0.0 if a == 0 else float(np.divide(a, b))


def plain(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind == "f":
        plain = value.astype(object)
        plain[~np.isfinite(value)] = None
        return plain.tolist()
    return value.tolist()
