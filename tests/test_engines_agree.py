"""One law: all engines give the same status and the same norm, and every solved class carries its certificate."""

from __future__ import annotations

import numpy as np
import pytest

import tacfast
from problems import random_problem

ENGINES = ("active-set", "clarabel", "clarabel-full")


@pytest.mark.parametrize("block", range(8))
def test_engines_agree_on_200_random_problems(block: int) -> None:
    seen: set[str] = set()
    for seed in range(block * 25, (block + 1) * 25):
        p = random_problem(seed)
        # The full interior point takes every class of a small problem, and a sample of a large one.
        classes = np.unique(np.linspace(0, len(p.weight) - 1, 25).astype(int))
        reference = tacfast.solve(p.weight, p.bias, p.latents, classes=classes)
        seen.update(reference.status)
        assert reference.certified.all(), f"seed {seed}"
        for engine in ENGINES:
            other = tacfast.solve(p.weight, p.bias, p.latents, classes=classes, engine=engine)
            where = f"seed {seed}, {p.kind}, {p.weight.shape}, {engine}"
            assert other.status.tolist() == reference.status.tolist(), where
            solved = other.status == "solved"
            np.testing.assert_allclose(other.norms[solved], reference.norms[solved], rtol=1e-7, err_msg=where)
            for residual in (other.primal_residual, other.dual_residual, other.gap):
                assert residual[solved].max(initial=0) <= 1e-9, where
    assert {"solved", "unreachable"} <= seen


def test_auto_is_never_worse_than_the_kernel_alone() -> None:
    """On rows that lie within 1e-7 of a line, the kernel alone misses a tolerance of 1e-12."""
    rng = np.random.default_rng(0)
    w = np.outer(rng.normal(size=12), rng.normal(size=8)) + 1e-7 * rng.normal(size=(12, 8))
    z = np.maximum(rng.normal(size=(50, 8)), 0)
    alone = tacfast.solve(w, None, z, engine="active-set", tol=1e-12)
    missed = np.flatnonzero(alone.status == "not-converged")
    assert len(missed)
    both = tacfast.solve(w, None, z, tol=1e-12)
    others = np.setdiff1d(np.arange(len(w)), missed)
    assert both.status[others].tolist() == alone.status[others].tolist()
    assert set(both.engine[others]) == {"active-set"}
    assert (_miss(both)[missed] <= _miss(alone)[missed]).all()


def _miss(solutions: tacfast.TacSolutions) -> np.ndarray:
    return np.fmax.reduce([solutions.primal_residual, solutions.dual_residual, solutions.gap])
