"""One law: drift is how far what the last inner layer says of held-out images is from what it said before, whatever happened since."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tacfast.errors import SolveError
from tacfast.heads import capture, head_of
from tacfast.methods.drift import Drift
from tacfast.methods.inner import sites_of
from tacfast.methods.training import FORWARD, Job


def job_of(model: nn.Module, batches: Any, held: int) -> Job:
    images, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    images, labels = images.repeat(5, 1, 1, 1), labels.repeat(5)
    order = torch.arange(len(images))
    return Job(capture(model, batches), images, labels, order[held:], order[:held], (), "cpu", 0, False)


@pytest.mark.parametrize("held", [3, FORWARD + 20])
def test_drift_is_relative_to_the_spread(held: int, small_model: nn.Sequential, batches: Any) -> None:
    job = job_of(small_model, batches, held)
    start = copy.deepcopy(small_model.state_dict())
    drift = Drift(small_model, job)
    assert drift() == 0
    [site] = sites_of(small_model, job.images[job.train[:100]], head_of(small_model, job.captured.name))
    small_model.train()
    with torch.no_grad():
        # Each of the 8 x 6 x 6 numbers by as much, so that all of them are half the spread away.
        site.module.bias += 0.5 * site.spread / (8 * 6 * 6) ** 0.5
    assert drift() == pytest.approx(0.25, rel=1e-4)
    assert not small_model.training
    small_model.load_state_dict(start)
    assert drift() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_network_that_overflows_has_diverged(value: float, small_model: nn.Sequential, batches: Any) -> None:
    drift = Drift(small_model, job_of(small_model, batches, 3))
    with torch.no_grad():
        small_model[1].bias += value
    with pytest.raises(SolveError, match="diverged"):
        drift()


def test_a_model_without_inner_layers_has_no_drift(batches: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    assert Drift(model, job_of(model, batches, 3))() is None
