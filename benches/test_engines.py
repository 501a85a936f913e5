"""Time per class of the solver's engines, on heads with ReLU-like latents. Accuracy first: nothing uncertified is timed."""

from __future__ import annotations

import numpy as np
import pytest

import tacfast

CASES = [(10, 512, 2000), (43, 512, 2000), (200, 512, 4000)]
#: The full interior point at 200 classes takes seconds a class; it is timed on fewer.
SAMPLE = {"clarabel-full": 4}


@pytest.mark.parametrize("engine", ["active-set", "clarabel", "clarabel-full"])
@pytest.mark.parametrize("case", CASES, ids=["C{}-d{}-n{}".format(*c) for c in CASES])
def test_engine(benchmark, case, engine):
    classes, dim, samples = case
    rng = np.random.default_rng(0)
    w = rng.normal(size=(classes, dim)).astype(np.float32)
    z = np.maximum(rng.normal(size=(samples, dim)), 0).astype(np.float32)
    chosen = np.arange(min(classes, SAMPLE.get(engine, classes)))
    reference = tacfast.solve(w, None, z, classes=chosen)
    solutions = tacfast.solve(w, None, z, classes=chosen, engine=engine, threads=1)
    assert solutions.certified.all()
    np.testing.assert_allclose(solutions.norms, reference.norms, rtol=1e-7)
    benchmark.extra_info.update(
        classes=classes, dim=dim, samples=samples, threads=1, solved=len(chosen),
        active_max=int(np.diff(solutions.indptr).max()), iterations_mean=float(solutions.iterations.mean()),
    )  # fmt: skip
    benchmark.pedantic(tacfast.solve, (w, None, z), {"classes": chosen, "engine": engine, "threads": 1}, rounds=5, warmup_rounds=1)
