"""One law: a scan as SARIF is valid by the official schema, has what code scanning needs, and claims no more than the scan did."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import tacfast
from schemas import sarif
from tacfast.report import ScanReport
from tacfast.sarif import to_sarif
from tacfast.verdict import Suspect

SHA = "ab" * 32
KINDS = {
    "all-to-one": ((3,), ()),
    "multi-target": ((3, 1), ()),
    "source-specific": ((3,), ((5, 3),)),
    "all-to-all": ((), tuple((k, (k + 1) % 8) for k in range(8))),
}


@pytest.fixture(scope="module")
def clean() -> ScanReport:
    rng = np.random.default_rng(0)
    file = {"model": "a model.pth", "sha256": SHA, "notes": ["float16 converted"]}
    return tacfast.scan_head(rng.normal(size=(8, 6)), None, rng.normal(size=(80, 6)), file=file)


def found(report: ScanReport, kind: str) -> ScanReport:
    suspects, pairs = KINDS[kind]
    named = tuple(Suspect(k, 0.001, 1.0) for k in suspects)
    return replace(report, verdict="backdoored", kind=kind, suspects=named, pairs=pairs, reason="the shift is small", p_value=0.001)  # type: ignore[arg-type]


def log(report: ScanReport, **options: Any) -> Any:
    made = json.loads(json.dumps(to_sarif(report, **options), allow_nan=False))
    sarif().validate(made)
    return made["runs"][0]


def test_a_clean_scan_has_no_result_and_says_no_more_than_no_evidence(clean: ScanReport) -> None:
    run = log(clean)
    assert run["results"] == []
    assert run["invocations"][0]["exitCode"] == 0
    said = [note["message"]["text"] for note in run["invocations"][0]["toolExecutionNotifications"]]
    assert said == [clean.reason, "float16 converted"]
    assert "no evidence" in said[0]
    assert run["artifacts"][0]["hashes"] == {"sha-256": SHA}


@pytest.mark.parametrize("kind", KINDS)
def test_a_finding_is_one_result_of_its_own_rule(kind: str, clean: ScanReport) -> None:
    run = log(found(clean, kind), uri="models/a model.pth")
    (result,) = run["results"]
    rule = run["tool"]["driver"]["rules"][result["ruleIndex"]]
    assert (rule["id"], rule["defaultConfiguration"]["level"]) == (result["ruleId"], result["level"]) == (kind, "error")
    assert run["invocations"][0]["exitCode"] == 1
    place = result["locations"][0]["physicalLocation"]
    assert place["artifactLocation"] == {"uri": "models/a%20model.pth", "uriBaseId": "%SRCROOT%", "index": 0}
    assert place["region"]["startLine"] == 1
    assert run["automationDetails"]["id"] == "tacfast/models/a model.pth/"
    assert "Evidence of" in result["message"]["text"]
    assert "not proof" in result["message"]["text"]
    # References lead where they say.
    for taxon, where in zip(result["taxa"], run["taxonomies"], strict=True):
        assert run["taxonomies"][taxon["toolComponent"]["index"]]["name"] == taxon["toolComponent"]["name"] == where["name"]
        assert where["taxa"][taxon["index"]]["id"] == taxon["id"]
    assert [t["id"] for t in result["taxa"]] == ["AML.T0018", "ML10:2023"]


def test_an_inconclusive_scan_is_a_warning_that_names_no_threat(clean: ScanReport) -> None:
    run = log(replace(clean, verdict="inconclusive", reason="only 3 clean samples", p_value=None))
    (result,) = run["results"]
    assert (result["ruleId"], result["level"]) == ("inconclusive", "warning")
    assert "taxa" not in result
    assert "relationships" not in run["tool"]["driver"]["rules"][result["ruleIndex"]]
    assert run["invocations"][0]["exitCode"] == 3
    assert "backdoor" not in result["message"]["text"]


def test_the_same_finding_is_the_same_alert_and_another_is_not(clean: ScanReport) -> None:
    def mark(report: ScanReport) -> str:
        marks = log(report)["results"][0]["partialFingerprints"]
        assert len(set(marks.values())) == 1
        return str(marks["primaryLocationLineHash"])

    first = found(clean, "all-to-one")
    assert mark(first) == mark(replace(first, p_value=0.01, samples=99, file={"model": "a model.pth", "sha256": "cd" * 32}))
    others = [mark(found(clean, kind)) for kind in KINDS]
    assert len({*others, mark(replace(first, suspects=(Suspect(4, 0.001, 1.0),)))}) == len(KINDS) + 1


def test_a_report_of_arrays_is_valid_without_a_location(clean: ScanReport) -> None:
    run = log(replace(found(clean, "all-to-one"), file={}))
    assert "locations" not in run["results"][0]
    assert "artifacts" not in run


def test_damage_is_seen(clean: ScanReport) -> None:
    made = to_sarif(found(clean, "all-to-one"))
    made["runs"][0]["results"][0]["level"] = "fatal"
    assert not sarif().is_valid(made)
    del made["runs"][0]["tool"]
    assert not sarif().is_valid(made)
