"""The collapse of latents that live on an accelerator: logits and margins are formed there. May import: torch, numpy.

Only margins come to the host. They are float32, so what the solver then certifies is the problem of these margins: norms agree with those
of host latents to float32, not to float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Margins formed at a time.
_MARGINS = 1 << 26
#: Rows whose squared distance is below this share of their squared norms: float32 logits say too little of their difference.
_CLOSE = 1e-6


@dataclass(frozen=True, eq=False)
class Collapsed:
    """What the solver needs to know of latents elsewhere; m targets, C classes."""

    #: float32 (m, C): the order statistic over samples of (w_j - w_k)ᵀz_i, without biases, in units of `unit`.
    margins: NDArray[np.float32]
    #: A power of two: products of tiny or huge weights and latents leave the range of float32.
    unit: float
    #: int32 (m, C): a sample that attains it.
    samples: NDArray[np.int32]
    #: Number of latents.
    count: int
    #: Largest ‖z_i‖.
    longest: float


def collapse(weight: NDArray[np.float64], latents: Tensor, classes: NDArray[np.int64], quantile: float) -> Collapsed:
    """r_kj without biases, for target classes k and all rivals j, on the latents' device and in chunks of targets.

    Args:
        weight: W, (C, d).
        latents: float tensor (n, d) on any device.
        classes: int64 (m,), the targets.
        quantile: which order statistic (no interpolation); 1 is the maximum.
    """
    z = latents.detach()
    longest = _longest(z)
    # What all rows share changes no margin, but would cost digits.
    centred = weight - weight.mean(0)
    scales = [_unit_scale(float(np.abs(centred).max())), _unit_scale(longest)]
    rows = torch.as_tensor(centred * scales[0], device=z.device)
    z = (z.double() * scales[1]).to(z.dtype)
    with torch.no_grad(), _full_precision():
        logits = z.float() @ rows.float().T
        margins = np.empty((len(classes), len(weight)), dtype=np.float32)
        samples = np.empty(margins.shape, dtype=np.int32)
        place = len(z) + 1 - min(max(math.ceil(quantile * len(z)), 1), len(z))
        step = max(1, _MARGINS // logits.numel())
        for first in range(0, len(classes), step):
            part = slice(first, first + step)
            targets = torch.as_tensor(classes[part], device=z.device)
            value, index = _mth_largest(logits[:, None, :] - logits[:, targets, None], place)
            margins[part], samples[part] = value.cpu().numpy(), index.cpu().numpy()
        for t, j in _close_pairs(rows, classes):
            value, index = _mth_largest((z.double() @ (rows[j] - rows[classes[t]]))[:, None], place)
            margins[t, j], samples[t, j] = value.item(), index.item()
        return Collapsed(margins, 1 / scales[0] / scales[1], samples, len(z), longest)


def _longest(z: Tensor) -> float:
    """Largest Euclidean norm; squares of tiny or huge entries neither vanish nor overflow."""
    largest = float(z.abs().max())
    scale = _unit_scale(largest)
    return float((z.double() * scale).norm(dim=1).max()) / scale


def _unit_scale(largest: float) -> float:
    """The power of two that brings `largest` into [0.5, 1); 1 for zero."""
    return 1.0 if largest == 0 else 2.0 ** -max(-1000, min(1000, math.frexp(largest)[1]))


def _mth_largest(values: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The m-th largest over the first dimension, and where."""
    if m == 1:
        return tuple(values.max(dim=0))  # type: ignore[return-value]
    return tuple(values.kthvalue(len(values) + 1 - m, dim=0))  # type: ignore[return-value]


def _close_pairs(rows: Tensor, classes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(position among the targets, rival) whose rows nearly agree."""
    squares = (rows * rows).sum(1)
    for t, k in enumerate(classes):
        distance = squares[k] - 2 * (rows @ rows[k]) + squares
        for j in torch.nonzero(distance <= _CLOSE * (squares[k] + squares)).flatten().tolist():
            if j != k:
                yield t, j


@contextmanager
def _full_precision() -> Iterator[None]:
    """TF32 would leave three digits."""
    before: Any = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
