"""How long a whole solve takes, against the one GEMM that any method must do. May import: solver, numpy; never torch.

Seconds depend on the machine and on what else it does; their ratio within one run depends on it far less, so the two are timed in turn.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tacfast.errors import ProblemError
from tacfast.solver import Engine, solve

#: The threads of a BLAS go on spinning for a while after its work is done, and would take a core from what is timed next.
SETTLE_S = 0.1


@dataclass(frozen=True)
class BenchResult:
    """Medians over `repeats` pairs (GEMM, solve) of wall seconds. C classes, latents of dimension d, n samples."""

    classes: int
    dim: int
    samples: int
    engine: str
    #: Threads of the solve.
    threads: int
    #: Those of the GEMM; None where numpy could not be told (no threadpoolctl) and used as many as it liked.
    gemm_threads: int | None
    repeats: int
    #: numpy's float32 Z Wᵀ into memory that it has already.
    gemm_s: float
    #: `tacfast.solve` for all classes: logits, collapse, Gram matrix, QPs, certificates.
    solve_s: float
    #: How many classes ended in each status.
    status: dict[str, int]
    #: Seconds by stage of the solve, as `TacSolutions.stage_seconds`: "collapse" and "qp" are summed over threads.
    stage_s: dict[str, float]

    @property
    def ratio(self) -> float:
        """Whole solves per GEMM; below 1 would mean that solving took less than forming the logits."""
        return self.solve_s / self.gemm_s

    @property
    def ms_per_class(self) -> float:
        """Milliseconds of the whole solve per class."""
        return 1e3 * self.solve_s / self.classes

    def __repr__(self) -> str:
        size = f"C={self.classes}, d={self.dim}, n={self.samples}"
        return f"BenchResult({size}: {self.solve_s:.3g} s = {self.ratio:.2f} GEMMs, threads={self.threads})"

    def to_dict(self) -> dict[str, Any]:
        """All fields and properties, ready for JSON."""
        return {**asdict(self), "ratio": self.ratio, "ms_per_class": self.ms_per_class}


def synthetic_head(
    classes: int, dim: int, samples: int, *, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """A head with normal weights and latents as they leave a ReLU: float32 W (C, d), b = 0 (C,), Z (n, d)."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((classes, dim), dtype=np.float32)
    latents = rng.standard_normal((samples, dim), dtype=np.float32)
    np.maximum(latents, 0, out=latents)
    return weight, np.zeros(classes, dtype=np.float32), latents


def run(
    weight: ArrayLike, bias: ArrayLike | None, latents: ArrayLike, *, engine: Engine = "auto", threads: int | None = None, repeats: int = 3
) -> BenchResult:
    """Time the logits GEMM and the whole solve in turn, after one untimed round of both.

    Args:
        weight, bias, latents, engine, threads: as for `tacfast.solve`.
        repeats: pairs to time.

    Raises:
        ProblemError: an argument is malformed.
    """
    if repeats < 1:
        raise ProblemError(f"repeats must be at least 1, got {repeats}")
    # First, because it checks the arguments.
    solutions = solve(weight, bias, latents, engine=engine, threads=threads)
    w, z = (np.ascontiguousarray(a, dtype=np.float32) for a in (weight, latents))
    logits = np.empty((len(z), len(w)), dtype=np.float32)
    gemm_s, solved = [], []
    with blas_threads(threads) as gemm_threads:
        np.matmul(z, w.T, out=logits)
        for _ in range(repeats):
            gemm_s.append(seconds(lambda: np.matmul(z, w.T, out=logits)))
            time.sleep(SETTLE_S)
            began = time.perf_counter()
            solutions = solve(weight, bias, latents, engine=engine, threads=threads)
            solved.append((time.perf_counter() - began, solutions.stage_seconds))
    return BenchResult(
        classes=len(w),
        dim=w.shape[1],
        samples=len(z),
        engine=engine,
        threads=threads or cores(),
        gemm_threads=gemm_threads,
        repeats=repeats,
        gemm_s=median(gemm_s),
        solve_s=median(s for s, _ in solved),
        status=dict(Counter(solutions.status.tolist())),
        stage_s={stage: median(stages[stage] for _, stages in solved) for stage in solved[0][1]},
    )


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # neither macOS nor Windows has it
        return os.cpu_count() or 1


@contextmanager
def blas_threads(threads: int | None) -> Iterator[int | None]:
    """Within it numpy's BLAS uses this many threads, or all cores; yields how many, None where nobody can tell it."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        yield None
        return
    count = threads or cores()
    with threadpool_limits(count):
        yield count
