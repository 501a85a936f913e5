"""One law: perturbations of inner layers are one short number a channel, lead along the backdoor's routes, and leave other images alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tacfast.methods import Route
from tacfast.methods.inner import InnerPerturbations, Site, added, sites_of
from tacfast.methods.perturbations import Perturbations, Warping
from tacfast.methods.unlearn import with_perturbed
from tacfast.methods.warping import warped
from tacfast.universal import Room


@pytest.fixture
def images() -> Tensor:
    return torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(40) % 5


def to_class(k: int, classes: int = 5, d: int = 8) -> Route:
    return Route(torch.full((classes,), k), torch.zeros(classes, d))


class Tokens(nn.Module):
    """Images as rows of tokens, two normalisation layers, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.twice, self.head = nn.Linear(24, 6), nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.embed(x.flatten(1).unflatten(1, (8, 24))))
        return self.head(self.twice(self.twice(tokens).relu()).mean(1))


def test_sites_are_the_normalisation_layers_that_run_once(images: Tensor, small_model: nn.Sequential) -> None:
    small_model.eval()
    (site,) = sites_of(small_model, images, small_model[-1])
    assert site.module is small_model[1]
    assert site.shape == (8, 1, 1)
    tokens = Tokens()
    (site,) = sites_of(tokens, images, tokens.head)
    assert site.module is tokens.norm
    assert site.shape == (1, 6)


def test_without_normalisation_the_convolutions_then_the_linear_layers_but_never_the_head(images: Tensor) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 7), nn.Linear(7, 5))
    assert [(s.module, s.shape) for s in sites_of(plain, images, plain[-1])] == [(plain[0], (4, 1, 1))]
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.ReLU(), nn.Linear(7, 5))
    assert [(s.module, s.shape) for s in sites_of(linear, images, linear[-1])] == [(linear[1], (7,))]
    only = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    assert sites_of(only, images, only[-1]) == []
    assert not any(m._forward_hooks for model in (plain, linear, only) for m in model.modules())


class Branches(nn.Module):
    """Two normalisation layers that the logits do not depend on, one that says the same of all images, and one site."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.detached, self.constant, self.norm = (nn.BatchNorm2d(3) for _ in range(4))
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        z = self.norm(x + self.detached(x).detach()) + self.constant(torch.ones_like(x))
        return self.head(z.mean((2, 3)))


def test_layers_that_do_not_matter_are_no_sites(images: Tensor) -> None:
    model = Branches().eval()
    (site,) = sites_of(model, images, model.head)
    assert site.module is model.norm


def test_a_perturbation_as_long_as_allowed_moves_an_output_by_half_its_spread(images: Tensor, small_model: nn.Sequential) -> None:
    small_model.eval()
    (site,) = sites_of(small_model, images, small_model[-1])
    output = small_model[:2](images)
    spread = (output - output.mean(0)).flatten(1).norm(dim=1).mean()
    pattern = torch.randn(site.shape)
    pattern *= site.radius / pattern.norm()
    torch.testing.assert_close(pattern.expand(output.shape[1:]).norm(), spread / 2)


def test_what_is_added_reaches_the_later_images_only(images: Tensor, small_model: nn.Sequential) -> None:
    small_model.eval()
    site = Site(small_model[1], (8, 1, 1), 1.0, 2.0)
    with torch.no_grad():
        plain = small_model(images)
        with added(site, torch.ones(8, 1, 1), first=30):
            changed = small_model(images)
        assert torch.equal(changed[:30], plain[:30])
        assert not (changed[30:] == plain[30:]).all(1).any()
        assert torch.equal(small_model(images), plain)


def test_perturbations_are_short_lead_to_the_target_and_are_begun_anew(images: Tensor, labels: Tensor, small_model: nn.Sequential) -> None:
    small_model.eval()
    found = InnerPerturbations(sites_of(small_model, images, small_model[-1]), (to_class(3), to_class(1)), seed=0)
    with torch.no_grad():
        before = small_model(images).softmax(1).mean(0)
    for turn in range(60):
        site, pattern = found.adapt(small_model, images, labels)
        assert float(pattern.norm()) <= site.radius * 1.0001
        with torch.no_grad(), added(site, pattern):
            after = small_model(images).softmax(1).mean(0)
        target = 3 if turn % 2 == 0 else 1
        assert after[target] > before[target]
        assert max(found.uses.values()) <= 20
    assert len(found.patterns) == 2
    assert all(p.grad is None for p in small_model.parameters())


def test_a_batch_is_perturbed_half_in_the_input_half_inside(images: Tensor, labels: Tensor, small_model: nn.Sequential) -> None:
    small_model.eval()
    routes = (to_class(3),)
    outer = Perturbations(routes, Room.of(images), images.shape[1:], 0)
    none = InnerPerturbations([], routes, 0)
    both = InnerPerturbations(sites_of(small_model, images, small_model[-1]), routes, 0)
    with torch.no_grad():
        plain = small_model(images)
        batch, inside = with_perturbed(small_model, images, labels, outer, both)
        with inside:
            clean, perturbed = small_model(batch).tensor_split(2)
        torch.testing.assert_close(clean, plain)
        ((site, pattern),) = ((both.sites[place[1]], p) for place, p in both.patterns.items())
        with added(site, pattern):
            further_in = small_model(images[20:])
        torch.testing.assert_close(perturbed[20:], further_in)
        first = outer.slots[0]
        assert isinstance(first, Warping)
        pattern, shifts = first.parts
        torch.testing.assert_close(perturbed[:20], small_model(outer.room.put(warped(images[:20], shifts), pattern)))
        batch, inside = with_perturbed(small_model, images, labels, outer, none)
        with inside:
            _, perturbed = small_model(batch).tensor_split(2)
    assert len(perturbed) == 40
    assert not torch.equal(perturbed[20:], plain[20:])
