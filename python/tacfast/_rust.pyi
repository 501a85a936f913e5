"""The compiled core. `tacfast.solve` checks types and wraps what this returns."""

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

__all__ = ["__version__", "solve"]

__version__: str

class _Columns(TypedDict):
    """Struct of arrays over the m classes asked for; see `tacfast.TacSolutions` for their meaning."""

    norms: NDArray[np.float64]
    status: NDArray[np.uint8]
    perturbations: NDArray[np.float64]
    indptr: NDArray[np.int64]
    active: NDArray[np.int64]
    multipliers: NDArray[np.float64]
    samples: NDArray[np.int64]
    bound: NDArray[np.float64]
    primal_residual: NDArray[np.float64]
    dual_residual: NDArray[np.float64]
    gap: NDArray[np.float64]
    iterations: NDArray[np.int64]
    engine: NDArray[np.uint8]

def solve(
    weight: NDArray[np.float64],
    bias: NDArray[np.float64] | None,
    latents: NDArray[np.float32] | NDArray[np.float64],
    classes: list[int],
    quantile: float,
    engine: str,
    tol: float,
    threads: int | None,
) -> _Columns:
    """Solve the given classes; raises ValueError on malformed input. Releases the GIL; Ctrl-C stops it."""
