"""Time per class of the solver's engines, on heads with ReLU-like latents. Accuracy first: nothing uncertified is timed."""

from __future__ import annotations

import numpy as np
import pytest

import tacfast

CASES = [(10, 512, 2000), (43, 512, 2000), (200, 512, 4000)]


@pytest.mark.parametrize("engine", ["active-set", "clarabel", "clarabel-full"])
@pytest.mark.parametrize("case", CASES, ids=["C{}-d{}-n{}".format(*c) for c in CASES])
def test_engine(benchmark, case, engine):
    classes, dim, samples = case
    rng = np.random.default_rng(0)
    w = rng.normal(size=(classes, dim)).astype(np.float32)
    z = np.maximum(rng.normal(size=(samples, dim)), 0).astype(np.float32)
    reference = tacfast.solve(w, None, z)
    solutions = tacfast.solve(w, None, z, engine=engine, threads=1)
    assert solutions.certified.all()
    np.testing.assert_allclose(solutions.norms, reference.norms, rtol=1e-7)
    benchmark.extra_info.update(
        classes=classes, dim=dim, samples=samples, threads=1,
        active_max=int(np.diff(solutions.indptr).max()), iterations_mean=float(solutions.iterations.mean()),
    )  # fmt: skip
    benchmark.pedantic(tacfast.solve, (w, None, z), {"engine": engine, "threads": 1}, rounds=5, warmup_rounds=1)
