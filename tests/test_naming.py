"""One law: a target that is named less often than its label occurs is named as often, by its bias alone; nothing else changes."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tacfast.heads import MeanHead, capture, head_of
from tacfast.methods import Job, Route
from tacfast.methods.naming import missing, name_targets
from tacfast.methods.unlearn import unlearn


def job_of(model: nn.Module, batches: Any, *targets: int) -> Job:
    images, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    routes = tuple(Route(torch.full((5,), k), torch.zeros(5, 8)) for k in targets)
    return Job(capture(model, batches), images, labels, torch.arange(50), torch.arange(50, 60), routes, "cpu", 0, False)


def named(model: nn.Module, job: Job) -> torch.Tensor:
    """How often each class is the answer, on the training samples."""
    with torch.no_grad():
        return torch.bincount(model.eval()(job.images[job.train]).argmax(1), minlength=5)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), target=st.integers(0, 3), lowered=st.floats(0, 50))
def test_as_many_answers_as_labels_and_no_more_than_needed(seed: int, target: int, lowered: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (30,), generator=generator)
    logits[:, target] -= lowered
    by = missing(logits, labels, target)
    wanted, before = int((labels == target).sum()), int((logits.argmax(1) == target).sum())

    def count(more: float) -> int:
        raised = logits.clone()
        raised[:, target] += by + more
        return int((raised.argmax(1) == target).sum())

    assert (by == 0) == (before >= wanted)
    assert count(1e-9) >= max(wanted, before)
    if by > 0:
        assert count(-1e-9) < wanted


def test_a_target_is_named_as_often_as_it_occurs(small_model: nn.Sequential, batches: Any) -> None:
    with torch.no_grad():
        small_model[-1].bias[2] -= 100
    job = job_of(small_model, batches, 2)
    assert named(small_model, job)[2] == 0
    before = copy.deepcopy(small_model.state_dict())
    name_targets(small_model, job)
    assert abs(int(named(small_model, job)[2]) - 10) <= 1  # a sample on the border may go either way
    after = small_model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{len(small_model) - 1}.bias"}
    assert (before[changed.pop()] != after[f"{len(small_model) - 1}.bias"]).nonzero().flatten().tolist() == [2]


def test_what_is_named_often_enough_or_has_no_bias_or_no_sample_stays(small_model: nn.Sequential, batches: Any) -> None:
    job = job_of(small_model, batches, 2)
    with torch.no_grad():
        small_model[-1].bias[2] += 100
    for changed in ("often", "no sample", "no bias"):
        if changed == "no sample":
            small_model[-1].bias.data[2] -= 200
            job = replace(job, labels=job.labels.clamp(max=1))
        if changed == "no bias":
            small_model[-1].bias, job = None, job_of(small_model, batches, 2)
        before = copy.deepcopy(small_model.state_dict())
        name_targets(small_model, job)
        assert all(torch.equal(value, before[name]) for name, value in small_model.state_dict().items()), changed


@pytest.mark.parametrize("biases", [(True, True), (True, False)])
def test_two_heads_rise_together(biases: tuple[bool, bool], batches: Any) -> None:
    class Distilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Linear(192, 5, bias=biased) for biased in biases)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            z = images.flatten(1)
            return (self.one(z) + self.two(z.flip(1))) / 2

    torch.manual_seed(0)
    model = Distilled().eval()
    with torch.no_grad():
        model.one.bias[3] -= 100
    job = job_of(model, batches, 3)
    assert isinstance(head_of(model, job.captured.name), MeanHead)
    name_targets(model, job)
    assert abs(int(named(model, job)[3]) - 10) <= 1


@pytest.mark.parametrize("delicate", [True, False])
def test_only_where_samples_are_normalised_one_by_one(delicate: bool, batches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(1, 8) if not delicate else nn.LayerNorm([8, 6, 6])
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
    called = []
    monkeypatch.setattr(import_module("tacfast.methods.unlearn"), "name_targets", lambda *_: called.append(True))
    job = replace(job_of(model, batches, 2), routes=(Route(torch.full((5,), 2), torch.zeros(5, 288)),))
    unlearn(model, job, epochs=1)
    assert bool(called) is delicate
