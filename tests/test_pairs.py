"""One law: a pair's shift is the shift of its target for its source's samples alone, whatever else is solved beside it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tacfast
from tacfast import PairSolutions, ProblemError, solve, solve_pairs


def head(classes: int, dim: int, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    w, b = rng.normal(size=(classes, dim)), rng.normal(size=classes)
    z = np.maximum(rng.normal(size=(samples, dim)), 0).astype(np.float32)
    return w, b, z, rng.integers(0, classes, size=samples)


@settings(max_examples=25, deadline=None)
@given(
    classes=st.integers(2, 20),
    dim=st.integers(1, 12),
    samples=st.integers(1, 300),
    quantile=st.sampled_from([1.0, 0.9, 0.5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_pair_is_the_problem_of_its_source_alone(classes, dim, samples, quantile, seed):
    w, b, z, labels = head(classes, dim, samples, seed)
    pairs = solve_pairs(w, b, z, labels, quantile=quantile)
    for source in range(classes):
        mine = z[labels == source]
        if len(mine) == 0:
            assert (pairs.status[source] == "none").all()
            continue
        alone = solve(w, b, mine, quantile=quantile)
        others = np.arange(classes) != source
        np.testing.assert_array_equal(pairs.status[source][others], alone.status[others])
        np.testing.assert_allclose(pairs.norms[source][others], alone.norms[others], rtol=1e-8, atol=1e-12)
        assert pairs.status[source, source] == "none"
        assert np.isnan(pairs.norms[source, source])


def test_a_source_is_put_together_with_its_shifts_and_verifies():
    w, b, z, labels = head(30, 16, 400, 0)
    pairs = solve_pairs(w, b, z, labels)
    assert pairs.certified.all()
    for source in (0, 17, 29):
        solutions = pairs.source(source)
        assert solutions.classes.tolist() == [k for k in range(30) if k != source]
        np.testing.assert_array_equal(labels[solutions.samples], source)
        checked = solutions.verify(w, b, z[labels == source])
        solved = solutions.status == "solved"
        assert solved.any()
        for name in ("primal", "dual", "gap", "stationarity"):
            assert checked[name][solved].max() < 1e-9
        np.testing.assert_array_equal(pairs.perturbation(source, int(solutions.classes[3])), solutions.perturbations[3])


def test_what_has_no_problem_or_no_shift_gives_nan():
    # Class 1 lies between 0 and 2 on a line: one shift can take one sample there, but not two.
    w = np.array([[-1.0], [0.0], [1.0]])
    z = np.array([[-0.5], [0.5], [0.4]])
    pairs = solve_pairs(w, None, z, [0, 2, 2])
    assert pairs.status.tolist() == [["none", "solved", "solved"], ["none"] * 3, ["solved", "unreachable", "none"]]
    assert pairs.norms[0, 1] == 0.5
    assert pairs.norms[2, 1] == np.inf
    assert np.isnan(pairs.perturbation(2, 1)).all()
    assert np.isnan(pairs.perturbation(1, 0)).all()
    assert pairs.counts.tolist() == [1, 0, 2]
    assert len(pairs.source(1)) == 0
    json.dumps(pairs.to_dict(), allow_nan=False)
    assert "3 classes" in repr(pairs)


def test_some_targets_and_any_number_of_threads_give_the_same():
    w, b, z, labels = head(40, 24, 500, 1)
    every = solve_pairs(w, b, z, labels, threads=1)
    some = solve_pairs(w, b, z, labels, targets=[7, 3], threads=2)
    np.testing.assert_array_equal(some.norms[:, [3, 7]], every.norms[:, [3, 7]])
    assert (np.delete(some.status, [3, 7], axis=1) == "none").all()


def test_progress_reaches_the_number_of_pairs():
    w, b, z, labels = head(12, 6, 100, 2)
    seen: list[tuple[int, int]] = []
    pairs = solve_pairs(w, b, z, labels, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == ((pairs.index >= 0).sum(),) * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1]}, "labels must have one entry per sample"),
        ({"labels": [0.0, 1.0, 2.0]}, "labels must be integers"),
        ({"labels": [[0], [1, 2]]}, "labels cannot be read|labels must be integers"),
        ({"progress": 5}, "progress must be None or a function"),
        ({"labels": [0, 1, 3]}, "labels must be from 0 to 2, got 3"),
        ({"labels": [0, 1, -1]}, "labels must be from 0 to 2, got -1"),
        ({"targets": [0, 0]}, "targets must not name a class twice"),
        ({"targets": [3]}, "from 0 to 2"),
        ({"quantile": 0.0}, "quantile"),
    ],
)
def test_malformed_input_is_named(change, message):
    arguments = {"weight": np.eye(3), "bias": None, "latents": np.eye(3), "labels": [0, 1, 2], **change}
    with pytest.raises(ProblemError, match=message):
        solve_pairs(**arguments)


def test_a_class_that_is_none_is_named():
    pairs = solve_pairs(np.eye(3), None, np.eye(3), [0, 1, 2])
    assert isinstance(pairs, PairSolutions)
    with pytest.raises(tacfast.ProblemError, match="source must be an integer from 0 to 2, got 3"):
        pairs.source(3)
    with pytest.raises(tacfast.ProblemError, match="target must be an integer from 0 to 2, got -1"):
        pairs.perturbation(0, -1)
    with pytest.raises(tacfast.ProblemError, match="source must be an integer from 0 to 2, got True"):
        pairs.source(True)
