"""Laws that hold for every problem: how norms change, or do not, when the problem is changed in a known way."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tacfast
from problems import random_problem

seeds = st.integers(0, 10_000)
some = settings(max_examples=25, deadline=None)


def same(changed: tacfast.TacSolutions, base: tacfast.TacSolutions, factor: float = 1.0, rtol: float = 1e-6) -> None:
    assert changed.status.tolist() == base.status.tolist()
    solved = base.status == "solved"
    np.testing.assert_allclose(changed.norms[solved], base.norms[solved] * factor, rtol=rtol)


@given(seeds)
@some
def test_more_samples_never_shrink_a_norm_and_a_quantile_never_grows_one(seed: int) -> None:
    p = random_problem(seed)
    every = tacfast.solve(p.weight, p.bias, p.latents)
    half = tacfast.solve(p.weight, p.bias, p.latents[: (len(p.latents) + 1) // 2])
    lower = tacfast.solve(p.weight, p.bias, p.latents, quantile=0.9)
    assert (half.norms <= every.norms * (1 + 1e-7)).all()
    assert (lower.norms <= every.norms * (1 + 1e-7)).all()


@given(seeds, st.integers(-40, 40), st.integers(-40, 40))
@some
def test_scales_pass_through(seed: int, weight_exponent: int, latent_exponent: int) -> None:
    """W and b scaled alike change no norm; latents scaled (and b with them) scale it."""
    p = random_problem(seed)
    base = tacfast.solve(p.weight, p.bias, p.latents)
    a, c = 10.0**weight_exponent, 10.0**latent_exponent
    same(tacfast.solve(p.weight * a, p.bias * a * c, p.latents * c), base, c)


@given(seeds)
@some
def test_classes_and_samples_have_no_order(seed: int) -> None:
    p, rng = random_problem(seed), np.random.default_rng(seed)
    order, shuffle = rng.permutation(len(p.weight)), rng.permutation(len(p.latents))
    base = tacfast.solve(p.weight, p.bias, p.latents, classes=order)
    same(tacfast.solve(p.weight[order], p.bias[order], p.latents[shuffle]), base)


@given(seeds)
@some
def test_what_every_class_shares_does_not_matter(seed: int) -> None:
    """A vector added to every row of W, or a number to every bias, changes no difference of logits."""
    p, rng = random_problem(seed), np.random.default_rng(seed)
    base = tacfast.solve(p.weight, p.bias, p.latents)
    shared = rng.normal(size=p.weight.shape[1]) * np.abs(p.weight).mean()
    same(tacfast.solve(p.weight + shared, p.bias + rng.normal() * np.abs(p.bias).max(), p.latents), base, rtol=1e-5)


@given(seeds)
@some
def test_no_bias_is_zero_bias(seed: int) -> None:
    p = random_problem(seed)
    none, zeros = (tacfast.solve(p.weight, b, p.latents) for b in (None, np.zeros(len(p.weight))))
    np.testing.assert_array_equal(none.norms, zeros.norms)


@given(seeds, st.integers(1, 7), st.sampled_from([1.0, 0.9]))
@some
def test_threads_change_no_bit(seed: int, threads: int, quantile: float) -> None:
    p = random_problem(seed)
    one, more = (tacfast.solve(p.weight, p.bias, p.latents, threads=t, quantile=quantile) for t in (1, threads))
    for name in ("status", "norms", "perturbations", "active", "multipliers", "samples", "bound", "gap"):
        np.testing.assert_array_equal(getattr(more, name), getattr(one, name), err_msg=name)


@given(seeds)
@some
def test_float32_is_float64_of_the_same_numbers(seed: int) -> None:
    p = random_problem(seed)
    w, b, z = (a.astype(np.float32) for a in (p.weight, p.bias, p.latents))
    narrow, wide = tacfast.solve(w, b, z), tacfast.solve(*(a.astype(np.float64) for a in (w, b, z)))
    np.testing.assert_array_equal(narrow.norms, wide.norms)
    np.testing.assert_array_equal(narrow.perturbations, wide.perturbations)


def test_a_cap_on_threads_is_kept() -> None:
    """The processor time of one thread cannot exceed the time that passes."""
    rng = np.random.default_rng(0)
    w, z = rng.normal(size=(400, 256)).astype(np.float32), rng.normal(size=(3000, 256)).astype(np.float32)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(3):
        tacfast.solve(w, None, z, threads=1)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert cpu <= 1.1 * wall + 0.02


def test_progress_counts_up_to_all_classes_and_may_stop_the_solve() -> None:
    rng = np.random.default_rng(0)
    w, z = rng.normal(size=(300, 64)), rng.normal(size=(200, 64))
    seen: list[tuple[int, int]] = []
    tacfast.solve(w, None, z, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (300, 300)
    assert seen == sorted(seen)

    def stop(done: int, total: int) -> None:
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        tacfast.solve(w, None, z, progress=stop, engine="clarabel")
