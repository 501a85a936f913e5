"""One law: what the inner layers of a network say is compared, layer by layer, with what its teacher's say of the same images, clean."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tacfast
from tacfast.methods.features import Features, spread_out
from tacfast.methods.inner import Site, sites_of
from tacfast.methods.unlearn import mean_of


@pytest.fixture
def images() -> Tensor:
    return torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(4))


def distances_of(model: nn.Module, teacher: nn.Module, batch: Tensor, sites: list[Site], count: int) -> Tensor:
    """Of a batch of which the teacher sees the first `count` images: a row a site."""
    features = Features(model, teacher, sites)
    with torch.no_grad(), features.taught():
        teacher(batch[:count])
    with features.compared() as distances:
        model(batch)
    assert not features.wanted
    assert not any(m._forward_hooks for network in (model, teacher) for m in network.modules())
    return torch.stack(distances)


@pytest.mark.parametrize("in_place", [False, True])
def test_distances_are_mean_squares_relative_to_the_spread(images: Tensor, in_place: bool) -> None:
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU(in_place)) for a, b in ((3, 6), (6, 4)))
    model = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(64, 5)).eval()
    sites = sites_of(model, images, model[-1])
    teacher = copy.deepcopy(model)
    twice = torch.cat([images, images])
    assert distances_of(model, teacher, twice, sites, 40).tolist() == [[0, 0], [0, 0]]
    other = distances_of(model, teacher, torch.cat([images, 0 * images]), sites, 40)
    assert not other[:, 0].any() and bool((other[:, 1] > 0.1).all())
    with torch.no_grad():
        # Of the last site only, by half its spread.
        sites[1].module.bias += 0.5 * sites[1].spread / 64**0.5
    found = distances_of(model, teacher, twice, sites, 40)
    torch.testing.assert_close(found, torch.tensor([[0, 0], [0.25, 0.25]]))
    torch.testing.assert_close(mean_of([*found]), torch.tensor([0.125, 0.125]))
    mean_of([*found])[1].backward()
    assert float(model[0].weight.grad.abs().sum()) > 0
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("sites", "taken"), [(0, []), (1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (7, [1, 4, 6]), (9, [2, 5, 8]), (49, [15, 32, 48])]
)
def test_layers_are_taken_evenly_up_to_the_last(sites: int, taken: list[int]) -> None:
    every = [Site(nn.Identity(), (4,), 1.0, 1.0) for _ in range(sites)]
    assert [every.index(site) for site in spread_out(every)] == taken


class Skipping(nn.Module):
    """Leaves its second normalisation layer out in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.head((z if self.training else self.second(z)).flatten(1))


class Dropping(nn.Module):
    """Looks at fewer rows of an image in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.head(self.second(z[:, :, :5] if self.training else z).mean((2, 3)))


def test_layers_that_say_less_in_training_are_left_out(images: Tensor, batches: Any) -> None:
    model = Dropping().eval()
    sites = sites_of(model, images, model.head)
    assert len(sites) == 2
    features = Features(model, copy.deepcopy(model), sites)
    with features.taught():
        features.teachers[sites[0]](images)
        features.teachers[sites[1]](images)
    with features.compared() as distances:
        model.train()(images)
    assert len(distances) == 1
    assert tacfast.repair(model.eval(), batches, targets=[2], method="unlearn", epochs=1, device="cpu").model is not None


def test_layers_that_do_not_run_are_left_out(images: Tensor, batches: Any) -> None:
    model = Skipping().eval()
    sites = sites_of(model, images, model.head)
    features = Features(model, copy.deepcopy(model), sites)
    with features.taught():
        pass
    with features.compared() as distances:
        model(images)
    assert distances == []
    assert mean_of(distances).tolist() == [0, 0]
    assert len(sites) == 2
    repaired = tacfast.repair(model, batches, targets=[2], method="unlearn", epochs=1, device="cpu")
    assert repaired.model is not None


def test_a_repair_goes_by_what_inner_layers_say(small_model: nn.Sequential, batches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("tacfast.methods.unlearn")
    weights = []
    # Of clean images alone, of perturbed ones too, of none.
    for part in ((1, 0), (1, 0), (1, 1), (0, 0)):
        monkeypatch.setattr(module, "mean_of", lambda distances, part=part: torch.tensor(part) * mean_of(distances))
        torch.manual_seed(0)  # of dropout
        repaired = tacfast.repair(small_model, batches, targets=[2], method="unlearn", epochs=1, device="cpu").model
        assert repaired is not None
        weights.append(repaired[0].weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not any(torch.allclose(weights[a], weights[b]) for a, b in ((0, 2), (0, 3), (2, 3)))
