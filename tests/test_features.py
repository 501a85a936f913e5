"""One law: what the inner layers of a network say of clean images is compared with what its teacher's say, layer by layer."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tacfast
from tacfast.methods.features import Features, mean_of
from tacfast.methods.inner import Site, sites_of


@pytest.fixture
def images() -> Tensor:
    return torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(4))


def distances_of(model: nn.Module, teacher: nn.Module, images: Tensor, sites: list[Site], count: int = 40) -> list[Tensor]:
    features = Features(model, teacher, sites)
    with torch.no_grad(), features.taught():
        teacher(images[:count])
    with features.compared() as distances:
        model(images)
    assert not features.wanted
    assert not any(m._forward_hooks for network in (model, teacher) for m in network.modules())
    return distances


@pytest.mark.parametrize("in_place", [False, True])
def test_the_loss_is_the_mean_squared_distance_relative_to_the_spread(images: Tensor, in_place: bool) -> None:
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU(in_place)) for a, b in ((3, 6), (6, 4)))
    model = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(64, 5)).eval()
    sites = sites_of(model, images, model[-1])
    teacher = copy.deepcopy(model)
    assert [x.item() for x in distances_of(model, teacher, images, sites)] == [0, 0]
    with torch.no_grad():
        # Of the last site only, by half its spread.
        sites[1].module.bias += 0.5 * sites[1].spread / 64**0.5
    for count in (7, 40):
        distances = distances_of(model, teacher, images, sites, count)
        torch.testing.assert_close(torch.stack(distances), torch.tensor([0, 0.25]))
        assert mean_of(distances).item() == pytest.approx(0.125)
    mean_of(distances).backward()
    assert float(model[0].weight.grad.abs().sum()) > 0
    assert all(p.grad is None for p in teacher.parameters())


class Skipping(nn.Module):
    """Leaves its second normalisation layer out in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.head((z if self.training else self.second(z)).flatten(1))


def test_layers_that_do_not_run_are_left_out(images: Tensor, batches: Any) -> None:
    model = Skipping().eval()
    sites = sites_of(model, images, model.head)
    features = Features(model, copy.deepcopy(model), sites)
    with features.taught():
        pass
    with features.compared() as distances:
        model(images)
    assert distances == []
    assert mean_of(distances).item() == 0
    assert len(sites) == 2
    repaired = tacfast.repair(model, batches, targets=[2], method="unlearn", epochs=1, device="cpu")
    assert repaired.model is not None


def test_a_repair_goes_by_what_inner_layers_say(small_model: nn.Sequential, batches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("tacfast.methods.unlearn")
    seen: list[list[Tensor]] = []

    def spy(distances: list[Tensor]) -> Tensor:
        seen.append(distances)
        return mean_of(distances)

    monkeypatch.setattr(module, "mean_of", spy)
    weights = []
    for weight in (0.0, 0.0, 6.0):
        monkeypatch.setattr(module, "_FEATURES", weight)
        torch.manual_seed(0)  # of dropout
        repaired = tacfast.repair(small_model, batches, targets=[2], method="unlearn", epochs=1, device="cpu").model
        assert repaired is not None
        weights.append(repaired[0].weight.detach())
    assert all(len(distances) == 1 and float(distances[0].detach()) > 0 for distances in seen)
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])
