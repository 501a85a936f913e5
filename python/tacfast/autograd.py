"""The smallest shift's length as something that can be trained on. May import: torch, solver, errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tacfast.errors import SolveError
from tacfast.solver import solve


def tac_norm(
    weight: Tensor, bias: Tensor | None, latents: Tensor, classes: Sequence[int], *, quantile: float = 1.0, threads: int | None = None
) -> Tensor:
    """½‖s_k‖² of the smallest latent shift into each of some classes, differentiable in the head and in the latents.

    By the envelope theorem the gradient of the optimal value of (P_k), arXiv:2511.08944, is that of its Lagrangian at the solution: only
    the multipliers and the samples that attain the active margins are needed. Where several solutions' samples tie it is a subgradient.

    Args:
        weight: W (C, d), float32 or float64.
        bias: b (C,), or None for zeros.
        latents: Z (n, d), on any device.
        classes: which classes k.
        quantile, threads: see `tacfast.solve`.

    Returns:
        (len(classes),), of the latents' dtype and device. Differentiable once.

    Raises:
        ProblemError: an argument is malformed.
        SolveError: a class is unreachable or could not be certified, so that there is no norm.
    """
    return _TacNorm.apply(weight, bias, latents, tuple(classes), quantile, threads)  # type: ignore[no-any-return]


class _TacNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, latents: Tensor, classes: tuple[int, ...], quantile: float, threads: int | None
    ) -> Tensor:
        w, b, z = (None if t is None else t.detach().cpu().numpy() for t in (weight, bias, latents))
        assert w is not None
        assert z is not None
        solutions = solve(w, b, z, classes=classes, quantile=quantile, threads=threads)
        for k, status in zip(classes, solutions.status, strict=True):
            if status not in ("solved", "trivial"):
                raise SolveError(f"class {k} is {status}: it has no smallest shift to differentiate; leave it out of the classes")
        counts = np.diff(solutions.indptr)
        at = (np.repeat(np.arange(len(classes)), counts), np.repeat(solutions.classes, counts), solutions.active, solutions.samples)
        places = [torch.as_tensor(np.asarray(v, dtype=np.int64), device=latents.device) for v in at]
        numbers = [torch.as_tensor(v, device=latents.device).to(latents.dtype) for v in (solutions.multipliers, solutions.perturbations)]
        ctx.save_for_backward(weight, latents, *places, *numbers)
        ctx.has_bias = bias is not None
        return torch.as_tensor(0.5 * solutions.norms**2, device=latents.device).to(latents.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, latents, which, target, rival, sample, multipliers, shifts = ctx.saved_tensors
        x = multipliers * grad[which]
        # The Lagrangian holds x (w_j - w_k)^T (z_i + s) + x (b_j - b_k) for every active rival j and its sample i.
        point = x[:, None] * (latents[sample] + shifts[which]).to(weight.dtype)
        of_weight = torch.zeros_like(weight).index_add_(0, rival, point).index_add_(0, target, -point)
        of_bias = None
        if ctx.has_bias:
            of_bias = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
            of_bias.index_add_(0, rival, x.to(weight.dtype)).index_add_(0, target, -x.to(weight.dtype))
        of_latents = torch.zeros_like(latents).index_add_(0, sample, x[:, None] * (weight[rival] - weight[target]).to(latents.dtype))
        return of_weight, of_bias, of_latents, None, None, None
