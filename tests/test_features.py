"""One law: what the inner layers of a network say of clean images is compared with what its teacher's say, layer by layer."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tacfast
from tacfast.methods.features import feature_loss, outputs_of
from tacfast.methods.inner import Site, sites_of


@pytest.fixture
def images() -> Tensor:
    return torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(4))


def loss_between(model: nn.Module, teacher: nn.Module, images: Tensor, sites: list[Site], count: int = 40) -> Tensor:
    same = dict(zip(model.modules(), teacher.modules(), strict=True))
    teachers = {site: same[site.module] for site in sites}
    with outputs_of((site.module for site in sites), count) as said, outputs_of(teachers.values(), count) as wanted:
        model(images)
        teacher(images[:count])
    return feature_loss(said, wanted, teachers)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_loss_is_the_mean_squared_distance_relative_to_the_spread(images: Tensor, in_place: bool) -> None:
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU(in_place)) for a, b in ((3, 6), (6, 4)))
    model = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(64, 5)).eval()
    sites = sites_of(model, images, model[-1])
    teacher = copy.deepcopy(model)
    assert loss_between(model, teacher, images, sites).item() == 0
    with torch.no_grad():
        # Of the last site only, by half its spread.
        sites[1].module.bias += 0.5 * sites[1].spread / 64**0.5
    assert loss_between(model, teacher, images, sites, 7).item() == pytest.approx(0.25 / 2, rel=1e-4)
    loss_between(model, teacher, images, sites).backward()
    # Down to the first layer, and the teacher's too, as nothing here forbids it.
    assert all(float(m.weight.grad.abs().sum()) > 0 for m in (model[0], model[3], teacher[0]))


def test_layers_that_do_not_run_are_left_out(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)).eval()
    (site,) = sites_of(model, images, model[-1])
    assert float(feature_loss({}, {site.module: images}, {site: site.module})) == 0
    assert float(feature_loss({}, {}, {})) == 0
    assert not any(m._forward_hooks for m in model.modules())


def test_a_repair_keeps_what_inner_layers_say(small_model: nn.Sequential, batches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.cat([images for images, _ in batches])
    small_model.eval()
    sites = sites_of(small_model, x, small_model[-1])
    lost = []
    for weight in (0.0, 3.0):
        monkeypatch.setattr(importlib.import_module("tacfast.methods.unlearn"), "_FEATURES", weight)
        torch.manual_seed(0)  # of dropout
        repaired = tacfast.repair(small_model, batches, targets=[2], method="unlearn", epochs=20, device="cpu").model
        assert repaired is not None
        lost.append(loss_between(small_model, repaired.eval(), x, sites, len(x)).item())
    assert 0 < lost[1] < 0.5 * lost[0]
