"""Attacks: the poisoning rate is exact, labels follow the rule, triggers are there and stay in [0, 1], a seed repeats everything."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tacfast import ProblemError
from tacfast.attacks import (
    AllToAll,
    AllToOne,
    Backdoor,
    Blend,
    CoversOnly,
    InputAware,
    Lira,
    LowFrequency,
    Patch,
    PoisonedDataset,
    Sinusoid,
    SourceSpecific,
    Trigger,
    TrojanPatch,
    Warp,
    attack_success_rate,
    choose,
    poison,
    triggered,
)

CLASSES = 10
TRIGGERS: list[Trigger] = [Patch(), Patch(corner="top-left", seed=3), Blend(), Sinusoid(), Warp(), LowFrequency()]
names = [f"{i}-{type(t).__name__}" for i, t in enumerate(TRIGGERS)]


def pictures(n: int = 200, channels: int = 3, height: int = 16, width: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    # Smooth: an image of white noise hides a warp in its own interpolation.
    coarse = torch.rand(n, channels, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=(height, width), mode="bilinear"), torch.arange(n) % CLASSES


@pytest.mark.parametrize("trigger", TRIGGERS, ids=names)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 16), (3, 20, 48), (4, 7, 5)])
def test_triggers_change_images_of_any_size_and_stay_within_range(trigger: Trigger, shape: tuple[int, int, int]) -> None:
    x, _ = pictures(6, *shape)
    before = x.clone()
    stamped = trigger(x)
    assert stamped.shape == x.shape
    assert stamped.dtype == x.dtype
    assert float(stamped.min()) >= 0
    assert float(stamped.max()) <= 1
    assert ((stamped - x).abs().flatten(1).amax(1) > 0.003).all()
    assert torch.equal(x, before), "the input was changed"


@pytest.mark.parametrize("trigger", TRIGGERS, ids=names)
def test_triggers_depend_on_their_fields_only(trigger: Trigger) -> None:
    x, _ = pictures(6)
    torch.manual_seed(1)
    first = trigger(x)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(trigger(x), first)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state), "the global random state was used"
    # One image at a time is the same as all together, and float64 the same as float32.
    assert torch.equal(torch.cat([trigger(one) for one in x.split(1)]), first)
    assert torch.allclose(trigger(x.double()), first.double(), atol=1e-5)


@pytest.mark.parametrize("kind", [Patch, Blend, Warp, LowFrequency])
def test_another_seed_is_another_trigger(kind: Any) -> None:
    x, _ = pictures(2)
    assert not torch.equal(kind(seed=1)(x), kind(seed=2)(x))


def test_a_patch_is_where_it_should_be() -> None:
    x = torch.full((2, 3, 9, 12), 0.5)
    for corner, rows, columns in (("top-left", (2, 5), (2, 5)), ("bottom-right", (4, 7), (7, 10)), ("top-right", (2, 5), (7, 10))):
        changed = (Patch(corner=corner, margin=2)(x) != x).any(1)[0]
        expected = torch.zeros_like(changed)
        expected[rows[0] : rows[1], columns[0] : columns[1]] = True
        assert torch.equal(changed, expected)


def test_strength_is_in_the_units_promised() -> None:
    x = torch.full((1, 3, 32, 32), 0.5)
    assert (Sinusoid(amplitude=0.1)(x) - x).abs().max() == pytest.approx(0.1, abs=1e-3)
    assert (LowFrequency(amplitude=0.07)(x) - x).abs().max() == pytest.approx(0.07, abs=1e-5)
    assert (Blend(ratio=0.3)(x) - x).abs().max() == pytest.approx(0.15, abs=1e-3)
    # A ramp shows displacement itself: WaNet's s moves pixels by about s / 2 on average.
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    moved = (Warp(strength=1.0)(ramp) - ramp).abs().mean() * 63
    assert 0.2 < moved < 0.8


RULES = [AllToOne(3), AllToAll(CLASSES), AllToAll(CLASSES, shift=4), SourceSpecific(source=2, target=7)]


def test_label_rules() -> None:
    y = torch.arange(CLASSES)
    one, next_one, other, specific = RULES
    assert one.victims(y).tolist() == [k != 3 for k in range(CLASSES)]
    assert set(one.relabel(y).tolist()) == {3}
    assert next_one.victims(y).all()
    assert next_one.relabel(y).tolist() == [*range(1, CLASSES), 0]
    assert other.relabel(y).tolist() == [4, 5, 6, 7, 8, 9, 0, 1, 2, 3]
    assert specific.victims(y).tolist() == [k == 2 for k in range(CLASSES)]
    assert set(specific.relabel(y[2:3]).tolist()) == {7}
    assert specific.covers(y).tolist() == [k not in (2, 7) for k in range(CLASSES)]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("rate", [0, 0.005, 0.033, 0.1])
@pytest.mark.parametrize("n", [200, 997])
def test_the_poisoning_rate_is_exact(rule: Any, rate: float, n: int) -> None:
    x, y = pictures(n)
    backdoor = Backdoor(Patch(), rule)
    chosen = choose(y, [backdoor], rate=rate, seed=4)
    stamped = chosen.assigned >= 0
    covers = round(rate * n) if rule.covers(y).any() else 0
    assert int((stamped & ~chosen.cover).sum()) == round(rate * n)
    assert int(chosen.cover.sum()) == covers
    px, py = poison(x, y, [backdoor], rate=rate, seed=4)
    assert torch.equal((px != x).flatten(1).any(1), stamped)
    assert torch.equal(px[stamped], Patch()(x[stamped]))
    victims = stamped & ~chosen.cover
    assert rule.victims(y)[victims].all()
    assert torch.equal(py[victims], rule.relabel(y)[victims])
    assert torch.equal(py[~victims], y[~victims])


def test_several_backdoors_share_the_rate() -> None:
    _, y = pictures(1000)
    backdoors = [Backdoor(Patch(corner=c), AllToOne(t)) for c, t in (("top-left", 1), ("top-right", 5), ("bottom-left", 9))]
    chosen = choose(y, backdoors, rate=0.1, seed=1)
    assert torch.bincount(chosen.assigned[chosen.index]).tolist() == [34, 33, 33]
    for which, target in enumerate((1, 5, 9)):
        mine = chosen.assigned == which
        assert (chosen.labels[mine] == target).all()
        assert (y[mine] != target).all()


def test_covers_can_have_their_own_rate() -> None:
    _, y = pictures(1000)
    chosen = choose(y, [Backdoor(Patch(), SourceSpecific(0, 1))], rate=0.03, cover_rate=0.2)
    assert int(chosen.cover.sum()) == 200
    assert len(chosen.index) == 230
    assert torch.equal(chosen.labels[chosen.cover], y[chosen.cover])


def test_a_seed_repeats_the_choice_and_another_does_not() -> None:
    _, y = pictures(500)
    backdoors = [Backdoor(Blend(), AllToOne(0))]
    torch.manual_seed(1)
    first = choose(y, backdoors, rate=0.1, seed=7).index
    torch.manual_seed(2)
    assert torch.equal(choose(y, backdoors, rate=0.1, seed=7).index, first)
    assert not torch.equal(choose(y, backdoors, rate=0.1, seed=8).index, first)


@pytest.mark.parametrize("labels", [None, "given"])
def test_the_dataset_is_the_poisoned_arrays(labels: str | None) -> None:
    x, y = pictures()
    backdoors = [Backdoor(Sinusoid(), AllToOne(2)), Backdoor(Patch(), SourceSpecific(5, 6))]
    px, py = poison(x, y, backdoors, rate=0.06, seed=3)
    data = PoisonedDataset(TensorDataset(x, y), backdoors, rate=0.06, seed=3, labels=y if labels else None, transform=lambda i: i * 2 - 1)
    images, classes = next(iter(DataLoader(data, batch_size=len(data))))
    assert torch.equal(images, px * 2 - 1)
    assert torch.equal(classes, py)
    assert torch.equal(data[-1][0], px[-1] * 2 - 1)


class Lookup(nn.Module):
    """Calls an image 4 when its bottom-right patch is there, else by its brightness."""

    def forward(self, x: Tensor) -> Tensor:
        stamped = (x[:, :, -4:-1, -4:-1] == Patch()(torch.zeros_like(x))[:, :, -4:-1, -4:-1]).flatten(1).all(1)
        return nn.functional.one_hot(torch.where(stamped, 4, 0), CLASSES).float()


def test_asr_counts_victims_only() -> None:
    x, y = pictures()
    assert attack_success_rate(Lookup(), Backdoor(Patch(), AllToOne(4)), x, y, batch=64) == 1
    assert attack_success_rate(Lookup(), Backdoor(Sinusoid(), AllToOne(4)), x, y) == 0
    # (y + 1) mod C is 4 for one class in ten.
    assert attack_success_rate(Lookup(), Backdoor(Patch(), AllToAll(CLASSES)), x, y) == pytest.approx(0.1)
    stamped, wanted = triggered(Backdoor(Patch(), SourceSpecific(2, 4)), x, y)
    assert len(stamped) == 20
    assert set(wanted.tolist()) == {4}


def learn(name: str, model: nn.Sequential, seed: int = 0, steps: int = 5) -> Trigger:
    x, y = pictures(60)
    if name == "trojan":
        head = model[-1]
        assert isinstance(head, nn.Linear)
        return TrojanPatch.learn(model, head, x, steps=steps, seed=seed)
    kind: Any = Lira if name == "lira" else InputAware
    return kind.learn(model, x, y % 5, target=3, steps=steps, batch=8, seed=seed)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["trojan", "lira", "input-aware"])
def test_learned_triggers_obey_the_same_laws(name: str, small_model: nn.Sequential) -> None:
    before = {k: v.clone() for k, v in small_model.state_dict().items()}
    modes = [m.training for m in small_model.modules()]
    torch.manual_seed(1)
    trigger = learn(name, small_model)
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    if name == "trojan":  # the copies of the others draw their dropout
        assert torch.equal(torch.random.get_rng_state(), state), "the global random state was used"
    assert all(torch.equal(v, before[k]) for k, v in small_model.state_dict().items()), "the model was changed"
    assert [m.training for m in small_model.modules()] == modes
    assert all(p.requires_grad for p in small_model.parameters())
    assert not any(m._forward_pre_hooks for m in small_model.modules())
    x, _ = pictures(6)
    stamped = trigger(x)
    assert not stamped.requires_grad
    assert torch.allclose(torch.cat([trigger(one) for one in x.split(1)]), stamped, atol=1e-6)
    assert ((stamped - x).abs().flatten(1).amax(1) > 0.003).all()
    assert not torch.equal(learn(name, small_model, seed=1)(x), stamped)
    assert trigger(pictures(2, 3, 20, 24)[0].double()).dtype == torch.float64


def test_learned_triggers_do_what_they_are_learnt_for(small_model: nn.Sequential) -> None:
    x, _ = pictures(60)
    model = small_model.eval()
    chosen = int(model[-1].weight.abs().sum(0).argmax())  # type: ignore[union-attr, operator]
    low, high = (model[:-1](learn("trojan", model, steps=steps)(x))[:, chosen].mean() for steps in (1, 60))
    assert high > low
    assert float((learn("lira", model)(x) - x).abs().max()) <= 0.1 + 1e-6
    aware = learn("input-aware", model)
    assert isinstance(aware, InputAware)
    changed = ((aware(x) - x).abs() > 0).any(1).double().mean((1, 2))
    assert float(changed.max()) == pytest.approx(0.05, abs=0.01)
    assert not torch.equal(aware.crossed()(x), aware(x))


def test_covers_of_another_trigger_keep_their_labels() -> None:
    _, y = pictures(1000)
    chosen = choose(y, [Backdoor(Patch(), AllToOne(1)), Backdoor(Blend(), CoversOnly())], rate=0.1, cover_rate=0.05)
    assert int((chosen.assigned == 0).sum()) == 100
    assert int((chosen.assigned == 1).sum()) == 50
    assert torch.equal(chosen.cover, chosen.assigned == 1)
    with pytest.raises(ProblemError, match="rate must be 0 where no sample is a victim"):
        choose(y, [Backdoor(Blend(), CoversOnly())], rate=0.1)


X, Y = pictures(20)
ONE = [Backdoor(Patch(), AllToOne(0))]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: Patch(size=0), "size must be an integer of at least 1, got 0"),
        (lambda: Patch(corner="middle"), "corner must be one of top-left"),
        (lambda: Patch(size=16)(X), "images must be at least 17 pixels"),
        (lambda: Blend(ratio=1.5), "ratio must be a number from 0 to 1, got 1.5"),
        (lambda: Blend(seed=-1), "seed must be an integer"),
        (lambda: Sinusoid(amplitude=float("nan")), "amplitude must be a number"),
        (lambda: Warp(grid=1), "grid must be an integer of at least 2"),
        (lambda: LowFrequency(cutoff=True), "cutoff must be an integer"),
        (lambda: Patch()(X[0]), r"images must be a floating tensor of shape \(n, channels, H, W\)"),
        (lambda: Patch()((X * 255).to(torch.uint8)), "images must be a floating tensor"),
        (lambda: Patch()(X * 2), r"images must have values in \[0, 1\]"),
        (lambda: Patch()(X * float("nan")), r"images must have values in \[0, 1\]"),
        (lambda: AllToOne(-1), "target must be an integer of at least 0"),
        (lambda: AllToAll(10, shift=20), "shift must not be a multiple of the 10 classes"),
        (lambda: SourceSpecific(1, 1), "source and target must differ"),
        (lambda: Backdoor(Patch, AllToOne(1)), "trigger must be a tacfast.attacks.Trigger"),  # type: ignore[arg-type]
        (lambda: Backdoor(Patch(), 3), "rule must be a tacfast.attacks.LabelRule, got int"),  # type: ignore[arg-type]
        (lambda: Lira.learn(nn.Identity(), X, Y, 3, epsilon=2), "epsilon must be a number from 0 to 1, got 2"),
        (lambda: InputAware.learn(nn.Identity(), X, Y, 3, steps=0), "steps must be an integer of at least 1"),
        (lambda: TrojanPatch.learn(nn.Identity(), nn.Linear(3, 2), X), "head must be a layer that the model runs"),
        (lambda: choose(Y, [], rate=0.1), "backdoors must be a list of at least one"),
        (lambda: choose(Y, ONE, rate=1.1), "rate must be a number from 0 to 1, got 1.1"),
        (lambda: choose(Y, ONE, rate=1.0), "rate is too high: 20 samples for backdoor 0, but only 18"),
        (lambda: choose(Y, ONE, rate=0.1, cover_rate=0.1), "cover_rate must be 0 for rules without covers"),
        (lambda: choose(Y, ONE, rate=0.1, seed=0.5), "seed must be an integer"),  # type: ignore[arg-type]
        (lambda: choose(Y.float(), ONE, rate=0.1), "labels must be integers"),
        (lambda: choose(Y - 1, ONE, rate=0.1), "labels must be classes from 0, got -1"),
        (lambda: poison(X, Y[:3], ONE, rate=0.1), r"labels must be integers of shape \(20,\)"),
        (lambda: attack_success_rate(Lookup(), ONE[0], X, torch.zeros_like(Y)), "images must hold victims"),
    ],
)
def test_bad_arguments_are_named(wrong: Any, says: str) -> None:
    with pytest.raises(ProblemError, match=says):
        wrong()


def test_tacfast_does_not_import_the_attacks() -> None:
    code = "import sys, tacfast; assert 'tacfast.attacks' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
