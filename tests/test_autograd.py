"""One law: the gradient of ½‖s_k‖² is what finite differences say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tacfast
from tacfast.autograd import tac_norm


@pytest.fixture
def head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = (6, 9), (6,), (7, 9)
    weight, bias, latents = (torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    return weight, bias, latents


@pytest.mark.parametrize("quantile", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_are_those_of_finite_differences(
    head: tuple[torch.Tensor, torch.Tensor, torch.Tensor], quantile: float, with_bias: bool
) -> None:
    weight, bias, latents = head
    if with_bias:
        assert torch.autograd.gradcheck(lambda w, b, z: tac_norm(w, b, z, [0, 3, 5], quantile=quantile), (weight, bias, latents))
    else:
        assert torch.autograd.gradcheck(lambda w, z: tac_norm(w, None, z, [0, 3, 5], quantile=quantile), (weight, latents))


def test_values_are_half_the_squared_norms_and_a_step_uphill_raises_them(head: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    weight, bias, latents = head
    value = tac_norm(weight, bias, latents, [2])
    arrays = weight.detach().numpy(), bias.detach().numpy(), latents.detach().numpy()
    np.testing.assert_allclose(value.detach().numpy(), 0.5 * tacfast.solve(*arrays, classes=[2]).norms ** 2)
    value.sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        higher = tac_norm(weight + 1e-3 * weight.grad, bias, latents, [2])
    assert bool((higher > value).all())


def test_float32_heads_and_classes_without_a_norm() -> None:
    rng = np.random.default_rng(0)
    w, z = torch.tensor(rng.normal(size=(5, 8)), dtype=torch.float32), torch.tensor(rng.normal(size=(9, 8)), dtype=torch.float32)
    value = tac_norm(w.requires_grad_(), None, z, [1, 4])
    assert value.dtype == torch.float32
    value.sum().backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.float32
    hull = w.detach().double()
    hull[0] = 0.5 * hull[1] + 0.5 * hull[2]
    with pytest.raises(tacfast.SolveError, match="class 0 is unreachable"):
        tac_norm(hull, None, z.double(), [0])
