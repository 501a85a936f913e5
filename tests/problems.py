"""Random problems for the solver's tests. Feasibility is decided clearly in each: by a hull of other classes, or by generic position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Problem:
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    latents: NDArray[np.float64]
    kind: str


def random_problem(seed: int) -> Problem:
    """C in 2..200, d in 1..512, n in 1..300; every third has a class inside the hull of others, every fifth duplicate rows."""
    rng = np.random.default_rng(seed)
    classes = int(np.exp(rng.uniform(np.log(2), np.log(200.99))))
    dim = int(np.exp(rng.uniform(0, np.log(512.99))))
    samples = int(rng.integers(1, 301))
    weight = rng.normal(size=(classes, dim)) * 10 ** rng.uniform(-3, 3)
    latents = np.maximum(rng.normal(size=(samples, dim)), 0) * 10 ** rng.uniform(-3, 3)
    bias = rng.normal(size=classes) * np.abs(weight).mean() * np.abs(latents).mean()
    kind = "generic"
    if seed % 3 == 0 and classes >= 4:
        kind = "hull"
        shares = rng.dirichlet(np.full(3, 5.0))
        weight[0] = shares @ weight[1:4]
        bias[0] = shares @ bias[1:4] - 0.1 * np.abs(bias).max()
    if seed % 5 == 0 and classes >= 4:
        kind += "+duplicates"
        twins = rng.permutation(classes)[:2]
        weight[twins[0]] = weight[twins[1]]
        if rng.random() < 0.5:
            bias[twins[0]] = bias[twins[1]]
    return Problem(weight, bias, latents, kind)


def head_with_a_shortcut(rng: np.random.Generator, classes: int = 20, dim: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class means on axes; class 3 also reads a direction that clean latents never use."""
    w = rng.normal(size=(classes, dim)) * 0.1
    w[np.arange(classes), np.arange(classes)] += 1
    w[3, -1] += 5
    y = np.arange(1000) % classes
    z = np.abs(rng.normal(size=(1000, dim))) * 0.1 + 3 * np.eye(classes, dim)[y]
    z[:, -1] = 0
    return w, z, y
