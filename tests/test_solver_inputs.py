"""One law: any layout of the same numbers gives the same answer, and malformed input an error that names the argument."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import numpy as np
import pytest

import tacfast


@pytest.fixture
def head(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return rng.normal(size=(70, 24)), rng.normal(size=70), np.maximum(rng.normal(size=(300, 24)), 0)


def test_layouts_and_dtypes_agree(head: tuple[np.ndarray, ...]) -> None:
    w, b, z = head
    base = tacfast.solve(w, b, z)
    wide = np.zeros((600, 48))
    wide[::2, ::2] = z
    for layout in (np.asfortranarray(z), wide[::2, ::2], z[::-1][::-1], z.astype(">f8")):
        np.testing.assert_array_equal(tacfast.solve(w, b, layout).norms, base.norms)
    np.testing.assert_array_equal(tacfast.solve(np.asfortranarray(w), b, z).norms, base.norms)
    single = tacfast.solve(w.astype(np.float32), b.astype(np.float32), z.astype(np.float32))
    np.testing.assert_allclose(single.norms, base.norms, rtol=1e-5)
    same = tacfast.solve(w.astype(np.float32).astype(np.float64), b.astype(np.float32).astype(float), z.astype(np.float32).astype(float))
    np.testing.assert_array_equal(single.norms, same.norms)


def test_no_bias_is_zero_bias(head: tuple[np.ndarray, ...]) -> None:
    w, _, z = head
    np.testing.assert_array_equal(tacfast.solve(w, None, z).norms, tacfast.solve(w, np.zeros(70), z).norms)


@pytest.mark.parametrize("engine", ["auto", "clarabel"])
def test_threads_change_nothing(head: tuple[np.ndarray, ...], engine: tacfast.solver.Engine) -> None:
    w, b, z = head
    one, three = (tacfast.solve(w, b, z, threads=t, engine=engine) for t in (1, 3))
    for name in ("norms", "perturbations", "active", "multipliers", "samples", "bound", "iterations"):
        np.testing.assert_array_equal(getattr(one, name), getattr(three, name))


def test_classes_keep_their_order_and_permuting_them_permutes_norms(head: tuple[np.ndarray, ...], rng: np.random.Generator) -> None:
    w, b, z = head
    base = tacfast.solve(w, b, z)
    chosen = tacfast.solve(w, b, z, classes=[5, 2, 69, 2])
    np.testing.assert_array_equal(chosen.norms, base.norms[[5, 2, 69, 2]])
    np.testing.assert_array_equal(chosen.classes, [5, 2, 69, 2])
    assert tacfast.solve(w, b, z, classes=[]).norms.shape == (0,)
    order = rng.permutation(70)
    np.testing.assert_allclose(tacfast.solve(w[order], b[order], z).norms, base.norms[order], rtol=1e-9)


BAD = [
    ("weight", lambda w, b, z: (w[0], b, z, {})),
    ("weight", lambda w, b, z: (w[:1], b[:1], z, {})),
    ("weight", lambda w, b, z: (w.astype(int), b, z, {})),
    ("weight", lambda w, b, z: (np.where(np.arange(24) == 3, np.nan, w), b, z, {})),
    ("weight", lambda w, b, z: ([[1.0, 2.0], [3.0]], b, z, {})),
    ("bias", lambda w, b, z: (w, b[:-1], z, {})),
    ("bias", lambda w, b, z: (w, np.where(b == b[4], np.inf, b), z, {})),
    ("bias", lambda w, b, z: (w, b[:, None], z, {})),
    ("latents", lambda w, b, z: (w, b, z[:, :-1], {})),
    ("latents", lambda w, b, z: (w, b, z[:0], {})),
    ("latents", lambda w, b, z: (w, b, (z * 100).astype(np.uint8), {})),
    ("latents", lambda w, b, z: (w, b, z.astype(complex), {})),
    ("latents", lambda w, b, z: (w, b, np.where(z == z.max(), -np.inf, z), {})),
    ("classes", lambda w, b, z: (w, b, z, {"classes": [70]})),
    ("classes", lambda w, b, z: (w, b, z, {"classes": [-1]})),
    ("classes", lambda w, b, z: (w, b, z, {"classes": [0.5]})),
    ("classes", lambda w, b, z: (w, b, z, {"classes": 3})),
    ("classes", lambda w, b, z: (w, b, z, {"classes": [2**70]})),
    ("quantile", lambda w, b, z: (w, b, z, {"quantile": 0.0})),
    ("quantile", lambda w, b, z: (w, b, z, {"quantile": 1.1})),
    ("quantile", lambda w, b, z: (w, b, z, {"quantile": float("nan")})),
    ("engine", lambda w, b, z: (w, b, z, {"engine": "simplex"})),
    ("tol", lambda w, b, z: (w, b, z, {"tol": 0.0})),
    ("threads", lambda w, b, z: (w, b, z, {"threads": 0})),
    ("threads", lambda w, b, z: (w, b, z, {"threads": 2.5})),
]


@pytest.mark.parametrize(("name", "spoil"), BAD, ids=[f"{i}-{name}" for i, (name, _) in enumerate(BAD)])
def test_malformed_input_is_named(head: tuple[np.ndarray, ...], name: str, spoil: object) -> None:
    w, b, z, options = spoil(*head)  # type: ignore[operator]
    with pytest.raises(tacfast.ProblemError, match=name):
        tacfast.solve(w, b, z, **options)


def test_the_row_of_a_bad_value_is_named(head: tuple[np.ndarray, ...]) -> None:
    w, b, z = head
    z = z.copy()
    z[17, 3] = np.nan
    with pytest.raises(tacfast.ProblemError, match=r"latents must be finite, found NaN in row 17"):
        tacfast.solve(w, b, z)


def test_solutions_are_ready_for_json(head: tuple[np.ndarray, ...]) -> None:
    w, b, z = head
    w = w.copy()
    w[0] = w[1:4].mean(axis=0)
    solutions = tacfast.solve(w, b - 5 * (np.arange(70) == 0), z)
    text = json.dumps(solutions.to_dict(), allow_nan=False)
    assert json.loads(text)["norms"][0] is None
    assert "70 classes" in repr(solutions)


def test_ctrl_c_stops_a_long_solve() -> None:
    """About twenty seconds of interior points, interrupted after a fraction of one."""
    rng = np.random.default_rng(0)
    w, z = rng.normal(size=(600, 64)), rng.normal(size=(50, 64))
    # Whoever starts the tests in the background may have told them to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            tacfast.solve(w, None, z, engine="clarabel-full")
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - started < 5
