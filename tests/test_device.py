"""One law: latents on a device give what latents on the host give, to float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tacfast
from tacfast.device import collapse
from tacfast.solver import solve_on_device

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
DEFAULTS = {"classes": None, "quantile": 1.0, "engine": "auto", "tol": 1e-9, "threads": None, "progress": None}


def head(classes: int = 60, dim: int = 24, samples: int = 700) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    w, b = rng.normal(size=(classes, dim)).astype(np.float32), rng.normal(size=classes).astype(np.float32)
    return w, b, np.maximum(rng.normal(size=(samples, dim)), 0).astype(np.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quantile", [1.0, 0.97, 0.5])
def test_it_solves_the_same_problem(device, quantile):
    w, b, z = head()
    here = tacfast.solve(w, b, z, quantile=quantile)
    there = solve_on_device(torch.tensor(w), torch.tensor(b), torch.tensor(z, device=device), **{**DEFAULTS, "quantile": quantile})
    assert there.status.tolist() == here.status.tolist()
    np.testing.assert_allclose(there.norms, here.norms, rtol=1e-5)
    np.testing.assert_allclose(there.perturbations, here.perturbations, atol=1e-4)
    assert there.stage_seconds["collapse"] > 0


@pytest.mark.parametrize("device", DEVICES)
def test_margins_are_the_order_statistics_and_samples_attain_them(device):
    w, _, z = head()
    targets = np.array([5, 0, 59])
    found = collapse(w.astype(np.float64), torch.tensor(z, device=device), targets, 0.9)
    margins = (z.astype(np.float64) @ (w[None].astype(np.float64) - w[targets, None]).transpose(0, 2, 1)).transpose(1, 0, 2)
    want = np.sort(margins, axis=0)[int(np.ceil(0.9 * len(z))) - 1]
    np.testing.assert_allclose(found.margins * found.unit, want, atol=1e-4)
    attained = np.take_along_axis(margins, found.samples[None].astype(np.int64), axis=0)[0]
    np.testing.assert_allclose(attained, want, atol=1e-4)
    assert found.longest == pytest.approx(np.linalg.norm(z, axis=1).max())


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_nearly_agree_keep_their_difference(device):
    w, b, z = head()
    w[7] = w[3] * (1 + np.float32(3e-7))
    w[9] = w[3]
    here = tacfast.solve(w, b, z, classes=[3, 7, 9])
    there = solve_on_device(w, b, torch.tensor(z, device=device), **{**DEFAULTS, "classes": [3, 7, 9]})
    assert there.status.tolist() == here.status.tolist()
    np.testing.assert_allclose(there.norms, here.norms, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e-60, 1e60])
def test_tiny_and_huge_products_keep_their_digits(scale):
    w, z = np.array([[1.0, 0.0], [0.0, 1.0]]) * scale, torch.tensor([[1.0, 2.0]], dtype=torch.float64) * scale
    here, there = tacfast.solve(w, None, z.numpy()), solve_on_device(w, None, z, **DEFAULTS)
    assert there.status.tolist() == here.status.tolist()
    np.testing.assert_allclose(there.norms, here.norms, rtol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_solve_takes_cuda_latents_as_they_are():
    w, b, z = head()
    solutions = tacfast.solve(torch.tensor(w).cuda(), torch.tensor(b).cuda(), torch.tensor(z).cuda())
    np.testing.assert_allclose(solutions.norms, tacfast.solve(w, b, z).norms, rtol=1e-5)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(5, 3), "latents must have 24 columns"),
        (torch.zeros(0, 24), "at least one row"),
        (torch.full((5, 24), torch.nan), "latents must be finite"),
        (torch.zeros(5, 24, dtype=torch.int64), "latents must be a dense float32 or float64 tensor"),
        (torch.zeros(5, 24, dtype=torch.float16), "latents must be float32 or float64"),
        (torch.zeros(5), "latents must be a dense float32 or float64 tensor"),
    ],
)
def test_malformed_latents_are_named(latents, message):
    w, b, _ = head()
    with pytest.raises(tacfast.ProblemError, match=message):
        solve_on_device(w, b, latents, **DEFAULTS)
