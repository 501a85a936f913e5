"""One law: every JSON that tacfast writes is described by the schema that it publishes, to the last key, and comes back as it went."""

from __future__ import annotations

import copy
import json
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from jsonschema import Draft202012Validator

import tacfast
from schemas import strict
from tacfast import bench, schemas
from tacfast.outcome import RepairResult, State, Trial
from tacfast.report import ScanReport
from tacfast.solver import STATUSES
from tacfast.verdict import Evidence, Suspect

CLASSES = 6


def written(data: dict[str, Any]) -> Any:
    """As a file holds it."""
    return json.loads(json.dumps(data, allow_nan=False))


@pytest.mark.parametrize("name", schemas.NAMES)
def test_a_schema_is_one_and_says_its_version_and_describes_every_key(name: str) -> None:
    schema = schemas.load(name)
    Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"urn:tacfast:{name}:1"
    assert schema["properties"]["schema"]["const"] == f"tacfast.{name}/1"
    assert not [key for key in _keys(schema) if not _keys(schema)[key]], "without a description"


def _keys(schema: Any, path: str = "") -> dict[str, bool]:
    """Whether each property says what it is."""
    found: dict[str, bool] = {}
    if isinstance(schema, dict):
        for name, value in schema.get("properties", {}).items():
            found[f"{path}.{name}"] = "description" in value or "const" in value
        for name, value in schema.items():
            inner = value.items() if name == "properties" else [(name, value)]
            for key, below in inner:
                found |= _keys(below, f"{path}.{key}")
    return found


def test_a_reader_is_told_of_no_schema_that_there_is_not() -> None:
    with pytest.raises(tacfast.ProblemError, match="one of scan, repair"):
        schemas.load("../scan")


finite = st.floats(-1e6, 1e6)
share = st.floats(0, 1)
size = st.floats(0, 1e300)
classes = st.integers(0, CLASSES - 1)
words = st.text(max_size=20)
timing = st.dictionaries(words, size, max_size=3)
norms = st.lists(st.one_of(size, st.just(np.inf)), min_size=CLASSES, max_size=CLASSES).map(np.array)
per_class = st.lists(st.one_of(st.floats(-1, 1), st.just(np.nan)), min_size=CLASSES, max_size=CLASSES).map(np.array)
digest = st.text("0123456789abcdef", min_size=64, max_size=64)
files = st.fixed_dictionaries({}, optional={"model": words, "sha256": digest, "notes": st.lists(words, max_size=2)})
reports = st.builds(
    ScanReport,
    verdict=st.sampled_from(["clean", "backdoored", "inconclusive"]),
    reason=words,
    p_value=st.none() | share,
    suspects=st.lists(st.builds(Suspect, classes, share, size), max_size=3).map(tuple),
    kind=st.none() | st.sampled_from(["all-to-one", "multi-target", "source-specific", "all-to-all"]),
    pairs=st.lists(st.tuples(classes, classes), max_size=3).map(tuple),
    evidence=st.lists(st.builds(Evidence, words, st.none() | classes, finite, share), max_size=3).map(tuple),
    norms=norms,
    status=st.lists(st.sampled_from(STATUSES.tolist()), min_size=CLASSES, max_size=CLASSES).map(np.array),
    alignment=per_class,
    spread=per_class.map(np.abs),
    patterns=st.none() | st.fixed_dictionaries({"short pattern": per_class, "few pixels": per_class}),
    mad_index=st.none() | finite,
    stability=st.none() | share,
    moved=st.none() | share,
    samples=st.integers(0, 10**9),
    clean_accuracy=st.none() | share,
    alpha=st.floats(1e-9, 0.9),
    quantile=st.floats(1e-9, 1),
    timing_s=timing,
    head=st.none() | st.fixed_dictionaries({"name": words, "proof_error": size}),
    file=files,
)
maybe = st.none() | share
states = st.builds(
    State,
    clean_accuracy=share,
    target_accuracy=maybe,
    agreement=share,
    recovery_accuracy=maybe,
    reach=maybe,
    norms=norms,
    target_probability=maybe,
)
results = st.builds(
    RepairResult,
    model=st.none(),
    method=st.sampled_from(["auto", "unlearn", "finetune", "equalize", "head", "prune"]),
    targets=st.lists(classes, max_size=3).map(tuple),
    before=states,
    after=st.none() | states,
    samples=st.integers(0, 10**9),
    labelled=st.booleans(),
    settings=st.dictionaries(words, finite, max_size=3),
    timing_s=timing,
    trials=st.lists(st.builds(Trial, lr=finite, clean_accuracy=share, reach=maybe, drift=maybe), max_size=2).map(tuple),
    file=files,
)


@settings(max_examples=60, deadline=None)
@given(reports)
def test_any_report_is_described_and_comes_back(report: ScanReport) -> None:
    data = written(report.to_dict())
    strict("scan").validate(data)
    assert written(ScanReport.from_dict(data).to_dict()) == data


@settings(max_examples=60, deadline=None)
@given(results)
def test_any_repair_is_described_and_comes_back(result: RepairResult) -> None:
    data = written(result.to_dict())
    strict("repair").validate(data)
    assert written(RepairResult.from_dict(data).to_dict()) == data


def scanned() -> Any:
    rng = np.random.default_rng(0)
    return written(tacfast.scan_head(rng.normal(size=(8, 6)), None, rng.normal(size=(80, 6)), labels=np.arange(80) % 8).to_dict())


def test_what_the_solver_and_the_benchmark_write_is_described() -> None:
    head = bench.synthetic_head(7, 5, 40)
    version = {"tool_version": tacfast.__version__}
    # Two equal rows: one of the statuses without a shift.
    w = np.concatenate([head[0], head[0][:1]])
    for weight, bias in ((head[0], head[1]), (w, np.r_[np.zeros(7), -1.0])):
        strict("solve").validate(written({"schema": "tacfast.solve/1", **version, **tacfast.solve(weight, bias, head[2]).to_dict()}))
    strict("bench").validate(written({"schema": "tacfast.bench/1", **version, **bench.run(*head, threads=1, repeats=1).to_dict()}))


DAMAGES = {
    "another version": ("schema", "tacfast.scan/2"),
    "an unknown verdict": ("verdict", "safe"),
    "a p-value above 1": ("p_value", 1.5),
    "a class below 0": ("pairs", [[-1, 2]]),
    "an unknown status": ("status", ["fine"]),
    "words for numbers": ("norms", ["small"]),
    "half a digest": ("file", {"sha256": "abc"}),
    "no samples": ("samples", None),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_seen(what: str) -> None:
    data, (key, value) = scanned(), DAMAGES[what]
    strict("scan").validate(data)
    assert not Draft202012Validator(schemas.load("scan")).is_valid({**data, key: value})
    del data[key]
    assert Draft202012Validator(schemas.load("scan")).is_valid(data) == (key == "tags")


def test_a_reader_passes_over_keys_of_later_releases_and_the_tests_do_not() -> None:
    data = scanned()
    for later in ({**data, "later": 1}, {**data, "file": {"later": 1}}):
        assert Draft202012Validator(schemas.load("scan")).is_valid(later)
        assert not strict("scan").is_valid(later)
        assert ScanReport.from_dict(later).verdict == data["verdict"]


def test_tags_name_findings_only_and_may_be_absent() -> None:
    data = scanned()
    assert data["tags"] == []
    flagged = ScanReport.from_dict({**copy.deepcopy(data), "verdict": "backdoored"}).to_dict()
    assert [tag["id"] for tag in flagged["tags"]] == ["AML.T0018", "ML10:2023"]
    del data["tags"]
    assert ScanReport.from_dict(data).to_dict()["tags"] == []
