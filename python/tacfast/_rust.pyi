"""The compiled core. `tacfast.solve` and `tacfast.solve_pairs` check types and wrap what this returns."""

from collections.abc import Callable
from typing import TypedDict, type_check_only

import numpy as np
from numpy.typing import NDArray

__all__ = ["__version__", "solve", "solve_margins", "solve_pairs"]

__version__: str

@type_check_only
class Arguments(TypedDict):
    """What both functions take."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64] | None
    #: Or, where margins are given: how many there are, and the length of the longest.
    latents: NDArray[np.float32] | NDArray[np.float64] | tuple[int, float]
    classes: list[int]
    quantile: float
    engine: str
    tol: float
    threads: int | None
    progress: Callable[[int], object] | None

@type_check_only
class Columns(TypedDict):
    """Struct of arrays over the QPs; see `tacfast.TacSolutions` for their meaning. `sources` is 0 and
    `perturbations` is there but for pairs."""

    classes: NDArray[np.int64]
    sources: NDArray[np.int64]
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
    stage_seconds: dict[str, float]

def solve(arguments: Arguments) -> Columns:
    """Solve the given classes; raises ValueError on malformed input. Releases the GIL; Ctrl-C, or what `progress` raises, stops it."""

def solve_margins(arguments: Arguments, margins: NDArray[np.float32], samples: NDArray[np.int32], unit: float) -> Columns:
    """Solve the given classes for given margins (targets, classes), in units of `unit`, without biases, and samples that attain them."""

def solve_pairs(arguments: Arguments, labels: list[int]) -> Columns:
    """Solve the given target classes for the samples of each other label, by target and then by source. As `solve` otherwise."""
