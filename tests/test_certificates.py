"""One law: what is returned can be checked from the problem alone, and agrees with solutions planted in advance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tacfast
from problems import random_problem


@given(st.integers(0, 10_000), st.sampled_from([0.7, 0.99, 1.0]))
@settings(max_examples=40, deadline=None)
def test_verify_recomputes_the_same_certificates(seed: int, quantile: float) -> None:
    p = random_problem(seed)
    solutions = tacfast.solve(p.weight, p.bias, p.latents, quantile=quantile)
    checked = solutions.verify(p.weight, p.bias, p.latents)
    solved = solutions.status == "solved"
    for name in ("primal", "dual", "gap", "stationarity"):
        assert checked[name][solved].max(initial=0) <= 1e-8, name
    # The proven bound concedes rounding, but no more than that.
    assert (solutions.bound[solved] <= solutions.norms[solved] * (1 + 1e-12)).all()
    np.testing.assert_allclose(solutions.bound[solved], solutions.norms[solved], rtol=1e-6)
    unreachable = solutions.status == "unreachable"
    longest = np.linalg.norm(p.latents, axis=1).max()
    assert (solutions.bound[unreachable] > 1e9 * longest).all()
    assert (checked["bound"][unreachable] > 1e9 * longest).all()


def test_planted_solutions_are_found(rng: np.random.Generator) -> None:
    """Choose the active rivals and their multipliers, set the biases so that exactly those are tight: the optimum is known in advance."""
    for _ in range(30):
        classes, dim, samples = int(rng.integers(4, 40)), int(rng.integers(40, 80)), int(rng.integers(1, 50))
        w = rng.normal(size=(classes, dim))
        z = np.maximum(rng.normal(size=(samples, dim)), 0)
        active = np.sort(rng.choice(np.arange(1, classes), size=int(rng.integers(1, classes - 1)), replace=False))
        multipliers = rng.uniform(0.1, 2, size=len(active))
        shift = multipliers @ (w[0] - w[active])
        worst = ((z @ w.T) - (z @ w[0])[:, None]).max(axis=0)
        slack = np.where(np.isin(np.arange(classes), active), 0.0, rng.uniform(0.1, 1, size=classes))
        bias = (w[0] - w) @ shift - worst - slack
        bias[0] = 0
        found = tacfast.solve(w, bias, z, classes=[0])
        assert found.status.tolist() == ["solved"]
        np.testing.assert_allclose(found.perturbations[0], shift, atol=1e-9 * np.linalg.norm(shift))
        np.testing.assert_array_equal(found.active, active)
        np.testing.assert_allclose(found.multipliers, multipliers, rtol=1e-6)


def test_the_shift_really_sends_every_sample_there(rng: np.random.Generator) -> None:
    w, b, z = rng.normal(size=(12, 30)), rng.normal(size=12), rng.normal(size=(200, 30))
    solutions = tacfast.solve(w, b, z)
    for k, s in zip(solutions.classes, solutions.perturbations * (1 + 1e-9), strict=True):
        logits = (z + s) @ w.T + b
        assert (logits[:, k] >= logits.max(axis=1) - 1e-8).all()


def test_samples_attain_the_margins(rng: np.random.Generator) -> None:
    w, b, z = rng.normal(size=(9, 20)), rng.normal(size=9), rng.normal(size=(100, 20))
    logits = z @ w.T + b
    for quantile in (1.0, 0.9):
        solutions = tacfast.solve(w, b, z, quantile=quantile)
        for t, k in enumerate(solutions.classes):
            part = slice(solutions.indptr[t], solutions.indptr[t + 1])
            for j, i in zip(solutions.active[part], solutions.samples[part], strict=True):
                margins = np.sort(logits[:, j] - logits[:, k])
                rank = int(np.ceil(quantile * len(z))) - 1
                assert logits[i, j] - logits[i, k] == pytest.approx(margins[rank], abs=1e-12)
