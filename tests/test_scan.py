"""One law: a verdict follows from the norms by a test whose size is known, and a report survives JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tacfast
from problems import head_with_a_shortcut
from tacfast.outliers import FEWEST_CLASSES
from tacfast.verdict import Judgement, Suspect, with_labels


def test_a_shortcut_is_found_and_its_absence_is_not(rng: np.random.Generator) -> None:
    w, z, y = head_with_a_shortcut(rng)
    report = tacfast.scan_head(w, None, z, labels=y)
    assert report.verdict == "backdoored"
    assert bool(report)
    assert [s.target for s in report.suspects] == [3]
    assert report.p_value == report.suspects[0].p_value <= 0.05
    assert report.clean_accuracy == 1.0
    assert report.kind == "all-to-one"
    w[3, -1] = 0
    clean = tacfast.scan_head(w, None, z)
    assert clean.verdict == "clean"
    assert not clean
    assert clean.p_value is not None
    assert clean.p_value > 0.05


def test_what_cannot_be_tested_is_inconclusive(rng: np.random.Generator) -> None:
    z = rng.normal(size=(30, 8))
    few = tacfast.scan_head(rng.normal(size=(FEWEST_CLASSES - 1, 8)), None, z)
    assert (few.verdict, few.p_value) == ("inconclusive", None)
    bias = np.zeros(10)
    bias[4] = 1e6
    constant = tacfast.scan_head(rng.normal(size=(10, 8)), bias, z)
    assert constant.verdict == "inconclusive"
    assert "class 4" in constant.reason


def test_a_model_and_its_head_scan_alike(small_model: nn.Sequential, batches: Any) -> None:
    report = tacfast.scan(small_model, batches, patterns=False)
    assert (report.samples, report.patterns) == (60, None)
    assert set(report.timing_s) == {"latents", "solve", "pairs", "statistics"} | ({"stability"} if report.evidence else set())
    assert report.head is not None
    assert report.head["name"] == "6"
    small_model.eval()
    with torch.no_grad():
        z = torch.cat([small_model[:6](x) for x, _ in batches]).numpy()
    head = tacfast.scan_head(small_model[6].weight.detach().numpy(), small_model[6].bias.detach().numpy(), z)
    np.testing.assert_allclose(head.norms, report.norms, rtol=1e-5)


def test_a_report_survives_json(tmp_path: Path, rng: np.random.Generator) -> None:
    w, z, _ = head_with_a_shortcut(rng)
    w[0] = w[1:4].mean(axis=0)
    report = tacfast.scan_head(w, None, z)
    assert np.isinf(report.norms).sum() == 1
    file = tmp_path / "scan.json"
    file.write_text(json.dumps(report.to_dict(), allow_nan=False))
    assert tacfast.ScanReport.from_json(file).to_dict() == report.to_dict()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": "other/1"}', "[" * 100_000, '{"schema": "tacfast.scan/1"}',
                                  '{"schema": "tacfast.scan/1", "suspects": 3, "norms": []}'])  # fmt: skip
def test_damaged_reports_are_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "scan.json"
    file.write_text(text)
    with pytest.raises(tacfast.CheckpointError):
        tacfast.ScanReport.from_json(file)


@pytest.mark.parametrize(
    ("options", "name"), [({"alpha": 0}, "alpha"), ({"alpha": 2}, "alpha"), ({"labels": [1]}, "labels"), ({"quantile": 0}, "quantile")]
)
def test_bad_options_are_named(options: dict[str, Any], name: str, rng: np.random.Generator) -> None:
    with pytest.raises(tacfast.ProblemError, match=name):
        tacfast.scan_head(rng.normal(size=(5, 4)), None, rng.normal(size=(9, 4)), **options)


def test_no_class_is_accused_that_the_model_has_not_learnt(rng: np.random.Generator) -> None:
    predictions = np.repeat(np.arange(5), 20)
    found = Judgement("backdoored", "", 0.01, (Suspect(2, 0.01, 1.0),), "all-to-one")
    labels = predictions.copy()
    assert with_labels(found, predictions, labels) is with_labels(found, predictions, None) is found
    labels[[*range(60, 75), *range(80, 95)]] = 2
    held = with_labels(found, predictions, labels)
    assert (held.verdict, held.suspects, "only 40%" in held.reason) == ("inconclusive", (), True)
    # Labels that contradict the model everywhere, as those of another order, say nothing about one class.
    assert with_labels(found, predictions, (predictions + 1) % 5) is found
    # Other suspects stay.
    two = Judgement("backdoored", "", 0.01, (Suspect(2, 0.01, 1.0), Suspect(1, 0.02, 1.2)), "multi-target")
    left = with_labels(two, predictions, labels)
    assert ([s.target for s in left.suspects], left.verdict, left.kind) == ([1], "backdoored", "all-to-one")
    assert "class 2 is not accused" in left.reason
    clean = Judgement("clean", "", 0.5)
    assert with_labels(clean, predictions, labels) is clean
