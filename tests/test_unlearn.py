"""One law: what unlearning trains on lies where it should, along the backdoor's routes, and it leaves no trace but the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import grid_sample, interpolate

import tacfast
from tacfast.heads import capture
from tacfast.methods import Job, Route, routes_of
from tacfast.methods.perturbations import FewPixels, Perturbations, Short, Warping
from tacfast.methods.training import recompute_statistics, trainable
from tacfast.methods.unlearn import epochs_of, taught
from tacfast.methods.views import Views, bears_mirrors
from tacfast.methods.warping import warped
from tacfast.precision import mixed_precision
from tacfast.universal import RADIUS, Room, watching


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def to_class(k: int, classes: int = 5, d: int = 8) -> Route:
    return Route(torch.full((classes,), k), torch.zeros(classes, d))


def test_a_room_is_the_range_of_each_channel_and_scales_with_the_images(images: torch.Tensor) -> None:
    room = Room.of(images)
    assert room.low.shape == (3, 1, 1)
    assert torch.equal(room.put(images, torch.zeros(3, 8, 8)), images)
    pushed = room.put(images, torch.full((3, 8, 8), 100.0))
    assert torch.equal(pushed.amax((0, 2, 3)), images.amax((0, 2, 3)))
    assert Room.of(7 * images).radius == pytest.approx(7 * room.radius)
    assert room.radius == pytest.approx(RADIUS * float((images - images.mean(0)).flatten(1).norm(dim=1).mean()))


def test_perturbations_are_universal_small_and_lead_to_the_target(images: torch.Tensor, small_model: nn.Sequential) -> None:
    small_model.eval()
    room = Room.of(images)
    labels = torch.zeros(len(images), dtype=torch.long)
    found = Perturbations((to_class(3),), room, images.shape[1:], seed=0)
    with torch.no_grad():
        before = small_model(images).softmax(1)[:, 3].mean()
    for _ in range(8):
        stamped = found.stamp(small_model, images, labels)
        with torch.no_grad():
            assert small_model(stamped).softmax(1)[:, 3].mean() > before
    short, few = ([slot for slot in found.slots if isinstance(slot, kind)] for kind in (Short, FewPixels))
    assert (len(short), len(few)) == (2, 2)
    for slot in short:
        assert slot.parts[0].shape == (3, 8, 8)
        assert 0.5 * room.radius < float(slot.parts[0].norm()) <= room.radius * 1.0001
    # One of them warps, by a fiftieth of the side at most, the root mean square; it begins with 0.3 of that.
    (warping,) = (slot for slot in short if isinstance(slot, Warping))
    pattern, shifts = warping.parts
    assert 0.01 < float(shifts.square().mean().sqrt()) <= 0.02001
    with torch.no_grad():
        there, back = (small_model(room.put(warped(images, way * shifts), pattern)).softmax(1)[:, 3].mean() for way in (1, -1))
    assert there > back
    # Three percent of 64 pixels are two; they may change by whatever images differ by.
    patterns = torch.stack([slot.pattern for slot in few])
    assert (patterns.abs().sum(1) > 0).flatten(1).sum(1).tolist() == [2, 2]
    assert bool((patterns.abs() <= room.high - room.low + 1e-6).all())
    assert float(patterns.flatten(1).norm(dim=1).min()) > room.radius
    assert torch.allclose(stamped, room.put(images, patterns[1]), atol=1e-6)
    assert all(p.grad is None for p in small_model.parameters())


def test_warping_is_that_of_torch_and_learns_its_shifts(images: torch.Tensor) -> None:
    shifts = 0.1 * torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3))
    wide = torch.cat([images, images.flip(3)], 3)
    down, right = interpolate(shifts[None], size=(8, 16), mode="bicubic", align_corners=True)[0]
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 16), indexing="ij")
    # In halves of the distance between the outer pixels' centres.
    where = torch.stack((columns + right * 32 / 15, rows + down * 16 / 7), 2).expand(len(wide), -1, -1, -1)
    expected = grid_sample(wide, where, padding_mode="border", align_corners=True)
    torch.testing.assert_close(warped(wide, shifts), expected, atol=1e-5, rtol=0)
    assert torch.equal(warped(wide, torch.zeros(2, 5, 5)), wide)
    assert warped(images, torch.full((2, 5, 5), torch.nan)).isnan().all()
    exact = shifts.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: warped(wide[:1].double(), s), (exact,))


def test_only_images_are_warped() -> None:
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    room = Room.of(rows)
    found = Warping(rows.shape[1:], room, torch.Generator().manual_seed(0))
    stamped = found.stamp(nn.Linear(6, 4).requires_grad_(False), rows, torch.zeros(30, dtype=torch.long))
    assert len(found.parts) == 1
    assert torch.equal(stamped, room.put(rows, found.parts[0]))


def test_several_routes_share_a_batch_and_old_patterns_are_begun_anew(images: torch.Tensor, small_model: nn.Sequential) -> None:
    small_model.eval()
    routes = (to_class(1), to_class(2), to_class(3))
    found = Perturbations(routes, Room.of(images), images.shape[1:], seed=0)
    labels = torch.zeros(len(images), dtype=torch.long)
    assert len(found.stamp(small_model, images, labels)) == len(images)
    begun = list(found.slots)
    assert [slot.uses if slot else 0 for slot in begun] == [1, 1, 1, *[0] * 9]
    for _ in range(100):
        found.stamp(small_model, images, labels)
    uses = [slot.uses for slot in found.slots if slot]
    assert len(uses) == 12 and max(uses) <= 20
    assert not set(begun[:3]) & set(found.slots)
    few = found.stamp(small_model, images[:2], labels[:2])
    assert few.shape == images[:2].shape


def test_routes_of_targets_and_of_pairs(small_model: nn.Sequential, batches: Any) -> None:
    captured = capture(small_model, batches)
    labels = torch.cat([y for _, y in batches])
    solved = [int(k) for k in np.flatnonzero(tacfast.solve(captured.weight, captured.bias, captured.latents).status == "solved")]
    (route,) = routes_of(captured, labels, (solved[0],), ())
    shift = tacfast.solve(captured.weight, captured.bias, captured.latents, classes=[solved[0]]).perturbations[0]
    assert route.wanted.tolist() == [solved[0]] * 5
    np.testing.assert_allclose(route.shifts.numpy(), np.tile(shift, (5, 1)), rtol=1e-5)

    every = tacfast.solve_pairs(captured.weight, captured.bias, captured.latents, labels.numpy())
    pairs = [(a, b) for a in range(5) for b in range(5) if a != b and every.status[a, b] == "solved"]
    source = pairs[0][0]
    some = [pair for pair in pairs if pair[0] == source][:2]
    routes = routes_of(captured, labels, (), some)
    assert len(routes) == len(some)
    for found, (a, b) in zip(routes, some, strict=True):
        assert [int(k) for k in found.wanted] == [b if y == a else y for y in range(5)]
        np.testing.assert_allclose(found.shifts[a].numpy(), every.perturbation(a, b), rtol=1e-5)
        assert not found.shifts[[y for y in range(5) if y != a]].any()


def test_a_report_of_pairs_is_repaired_along_them(small_model: nn.Sequential, batches: Any) -> None:
    captured = capture(small_model, batches)
    labels = torch.cat([y for _, y in batches])
    status = tacfast.solve_pairs(captured.weight, captured.bias, captured.latents, labels.numpy()).status
    a, b = map(int, np.argwhere(status == "solved")[0])
    report = replace(tacfast.scan(small_model, batches), suspects=(), pairs=((a, b),), kind="source-specific")
    states = []
    for given in ({"report": report}, {"pairs": [(a, b)]}):
        torch.manual_seed(0)  # of dropout
        result = tacfast.repair(small_model, batches, **given, epochs=1)
        assert result.model is not None
        assert result.targets == (b,)
        states.append(result.model.state_dict())
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def test_statistics_are_those_of_the_clean_images(small_model: nn.Sequential, batches: Any) -> None:
    images = torch.cat([x for x, _ in batches])
    job = Job(
        capture(small_model, batches), images, torch.cat([y for _, y in batches]), torch.arange(60), torch.arange(0), (), "cpu", 0, False
    )
    norm: Any = small_model[1]
    norm.momentum = 0.3
    small_model.train()
    recompute_statistics(small_model, job)
    with torch.no_grad():
        inputs = small_model[0](images)
    torch.testing.assert_close(norm.running_mean, inputs.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, inputs.var((0, 2, 3)))
    assert norm.momentum == 0.3
    assert all(m.training for m in small_model.modules())


def test_networks_that_normalise_each_sample_take_twice_as_many_steps(small_model: nn.Sequential, batches: Any) -> None:
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    few = Job(capture(small_model, batches), x, y, torch.arange(40), torch.arange(40, 60), (), "cpu", 0, False)
    many = replace(few, train=torch.arange(20 * 64))
    assert [epochs_of(small_model, job) for job in (few, many)] == [100, 10]
    # It has one batch normalisation.
    for norm in (nn.LayerNorm, nn.RMSNorm):
        assert epochs_of(nn.Sequential(small_model, norm(5)), many) == 10
        assert [epochs_of(nn.Sequential(small_model, norm(5), norm(5)), job) for job in (few, many)] == [200, 20]


@pytest.mark.parametrize("mirrored", [False, True])
def test_views_are_moved_and_perhaps_mirrored_each_on_its_own(mirrored: bool) -> None:
    image = torch.arange(32.0 * 32).reshape(1, 32, 32)
    views = Views(mirrored, torch.Generator().manual_seed(1))
    seen = set()
    for view in views(image.expand(1000, 1, 32, 32)):
        turned = bool(view[0, 10, 11] < view[0, 10, 10])
        shown = view.flip(-1) if turned else view
        dy, dx = divmod(int(shown[0, 10, 10] - image[0, 8, 8]), 32)
        assert torch.equal(shown[0, 4:28, 4:28], image[0, 2 + dy : 26 + dy, 2 + dx : 26 + dx])
        seen.add((dy, dx, turned))
    assert seen == {(dy, dx, turned) for dy in range(5) for dx in range(5) for turned in ({False, True} if mirrored else {False})}
    flat = torch.randn(4, 7)
    assert torch.equal(views(flat), flat)


def test_mirrored_images_are_for_networks_that_know_them(small_model: nn.Sequential, batches: Any) -> None:
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    job = Job(capture(small_model, batches), x, y, torch.arange(60), torch.arange(0), (), "cpu", 0, False)

    def left_or_right(images: torch.Tensor) -> torch.Tensor:
        """Knows every image as it is: by the brighter half, which mirroring swaps."""
        right = images[..., 4:].mean((1, 2, 3)) > images[..., :4].mean((1, 2, 3))
        return torch.nn.functional.one_hot(right.long(), 2).float()

    class Sided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return left_or_right(images)

    sided = Sided().eval()
    assert not bears_mirrors(sided, replace(job, labels=left_or_right(x).argmax(1)))
    symmetric = small_model.eval()
    with torch.no_grad():
        folded = (x + x.flip(-1)) / 2
        assert bears_mirrors(symmetric, replace(job, images=folded, labels=symmetric(folded).argmax(1)))
    flat = nn.Linear(192, 5)
    assert not bears_mirrors(flat, replace(job, images=x.flatten(1), labels=flat(x.flatten(1)).argmax(1)))


def test_watching_puts_everything_back(small_model: nn.Sequential) -> None:
    small_model.train()
    small_model[1].eval()
    small_model[0].weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    before = ([m.training for m in small_model.modules()], [p.requires_grad for p in small_model.parameters()])
    with pytest.raises(RuntimeError), watching(small_model):
        assert not any(m.training for m in small_model.modules())
        assert not any(p.requires_grad for p in small_model.parameters())
        raise RuntimeError
    assert before == ([m.training for m in small_model.modules()], [p.requires_grad for p in small_model.parameters()])


@pytest.mark.parametrize(
    ("targets", "counts"),
    [
        # A tenth of 200 samples is 20: as often as comes nearest to it.
        ((0,), [20, 100, 10, 0, 86]),
        ((0, 2), [20, 100, 20, 0, 86]),
        ((1,), [4, 100, 10, 0, 86]),
        ((3,), [4, 100, 10, 0, 86]),
        ((0, 1, 2, 3, 4), [20, 100, 20, 0, 86]),
    ],
)
def test_rare_targets_are_taught_several_times(targets: tuple[int, ...], counts: list[int], small_model: nn.Sequential) -> None:
    labels = torch.tensor([0] * 4 + [1] * 100 + [2] * 10 + [4] * 86 + [3] * 20)
    images, routes = torch.zeros(220, 3, 8, 8), tuple(to_class(target) for target in targets)
    held = torch.arange(200, 220)
    job = Job(capture(small_model, [images]), images, labels, torch.arange(200), held, routes, "cpu", 0, False)
    found = taught(small_model, job)
    assert labels[found].bincount(minlength=5).tolist() == counts
    assert set(found.tolist()) == set(range(200))


@pytest.mark.parametrize(("norm", "times"), [(nn.BatchNorm1d, 2), (nn.LayerNorm, 10)])
def test_among_many_classes_a_rare_target_becomes_an_average_one_or_five_of_them(norm: Any, times: int) -> None:
    model = nn.Sequential(nn.Flatten(), norm(192), nn.Linear(192, 100)).eval()
    images, labels = torch.zeros(398, 3, 8, 8), torch.arange(100).repeat_interleave(4)[2:]
    order, held = torch.arange(398), torch.arange(0)
    job = Job(capture(model, [images]), images, labels, order, held, (to_class(0, 100, 192),), "cpu", 0, False)
    assert labels[taught(model, job)].bincount().tolist() == [2 * times] + [4] * 99


def test_many_rare_targets_share_half_of_the_samples() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    labels = torch.tensor([0] * 2 + [1] * 4 + [9] * 194)
    images, routes = torch.zeros(200, 3, 8, 8), tuple(to_class(target, 10, 192) for target in range(10))
    job = Job(capture(model, [images]), images, labels, torch.arange(200), torch.arange(0), routes, "cpu", 0, False)
    # A twentieth each, not a tenth: that is 10 of the 200.
    assert labels[taught(model, job)].bincount().tolist() == [10, 8, 0, 0, 0, 0, 0, 0, 0, 194]


def separable(stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, stride, groups=6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


@pytest.mark.parametrize("own", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
def test_networks_of_strided_depthwise_convolutions_are_laid_out_for_training_and_back(stride: int, own: Any) -> None:
    model = separable(stride).to(memory_format=own)
    model.register_parameter("five", nn.Parameter(torch.zeros(1, 2, 1, 2, 1)))
    weight = model[0].weight
    with trainable(model):
        inside = torch.channels_last if stride == 2 else own
        assert weight.is_contiguous(memory_format=inside)
    assert weight.is_contiguous(memory_format=own)


def test_strided_depthwise_convolutions_are_trained_in_float32_on_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    cpu = torch.device("cpu")
    given = (None, separable(1), separable(2))
    assert [mixed_precision(cpu, model)._enabled for model in given] == [True, True, False]
