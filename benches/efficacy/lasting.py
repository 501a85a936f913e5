"""Does a repair last? What becomes of it under an attacker who goes on, and what a second scan says. May import: subjects,
zoo_models, scores, tacfast.

`retuned`: the attacker fine-tunes the repaired network with a few poisoned images (the retuning attack of Min, Qin, Zhang, Shen & Cheng
2024, arXiv:2410.09838: 2 % of the training images, 5 of them poisoned, rate 0.01; here 40 steps of 128 images, as many as theirs take on
CIFAR-10). `reoptimised`: the attacker changes the trigger, within its own place or bound, until the repaired network follows it. A strong
enough trigger fools any network: compare with the networks that were never poisoned.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from data import Data
from scores import Behaviour, behaviour
from subjects import Pair, Subject
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from zoo_models import Stamp

import tacfast
from tacfast.attacks import Backdoor, Blend, Lira, LowFrequency, Patch, Sinusoid, Trigger, TrojanPatch, triggered

#: Of the retuning attack. POISONED images are stamped by each trigger.
OWNED, POISONED, RATE, STEPS, BATCH = 0.02, 5, 0.01, 40, 128
#: Of the new trigger: steps of Adam, each of this share of the bound, on batches of 64.
SEARCH_STEPS, SEARCH_STEP, SEARCH_BATCH = 100, 0.1, 64
#: Training images at most that a new trigger is sought with.
VICTIMS = 1000


def lasting(subject: Subject, repaired: nn.Module, clean: Pair, seed: int, scan: bool) -> dict[str, Any]:
    """What the repaired network does after retuning and under new triggers, and, on request, what a scan with the defender's images says
    of it."""

    def measure(model: nn.Module, doors: Sequence[Backdoor]) -> Behaviour:
        return behaviour(model, doors, subject.targets, *subject.rest)

    again = retuned(repaired, subject.doors, _owned(subject.data, subject.doors, seed), seed)
    found: dict[str, Any] = {"retuned": measure(again, subject.doors), "reoptimised": None, "scan": None}
    if all(reach(door.trigger, subject.data.x_train.shape[1:]) for door in subject.doors):
        doors = []
        for door in subject.doors:
            victims = _drawn(subject.data, _victims(subject.data, door, seed)[:VICTIMS])
            doors.append(Backdoor(reoptimised(repaired, door, victims, seed), door.rule))
        found["reoptimised"] = measure(repaired, doors)
    if scan:
        report = tacfast.scan(repaired, list(zip(clean[0].split(250), clean[1].split(250), strict=True)), device="cpu")
        found["scan"] = {"verdict": report.verdict, "targets": list(report.targets), "p_value": report.p_value}
    return found


def _drawn(data: Data, index: Tensor) -> Pair:
    """Training images, float32, and labels: they are the attacker's."""
    return data.x_train[index].float() / 255, data.y_train[index]


def _victims(data: Data, door: Backdoor, seed: int) -> Tensor:
    """int64: the training images that a backdoor is for, in random order."""
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(seed))
    return order[door.rule.victims(data.y_train)[order]]


def _owned(data: Data, doors: Sequence[Backdoor], seed: int) -> Pair:
    """Images for the retuning attack, enough victims of every backdoor among them."""
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(seed))
    victims = [_victims(data, door, seed)[: POISONED * len(doors)] for door in doors]
    return _drawn(data, torch.cat((*victims, order[: round(OWNED * len(order))])).unique())


def retuned(model: nn.Module, doors: Sequence[Backdoor], owned: Pair, seed: int) -> nn.Module:
    """A copy of the network after the retuning attack, in eval mode."""
    images, labels = owned[0].clone(), owned[1].clone()
    for number, door in enumerate(doors):
        victims = torch.nonzero(door.rule.victims(owned[1]))[number * POISONED : (number + 1) * POISONED, 0]
        images[victims], labels[victims] = triggered(door, owned[0][victims], owned[1][victims])
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.long)
    for _ in range(STEPS):
        if len(queue) < 2:
            queue = torch.randperm(len(images), generator=generator)
        index, queue = queue[:BATCH], queue[BATCH:]
        loss = cross_entropy(model(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@dataclass(frozen=True, eq=False)
class Changed(Trigger):
    """A trigger and one change (channels, H, W) for all images; together they move no value by more than `bound`."""

    trigger: Trigger
    change: Tensor
    bound: float

    def stamp(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            stamped = self.trigger(images)
        return images + (stamped + self.change - images).clamp(-self.bound, self.bound)


def reach(trigger: Trigger, shape: Sequence[int]) -> tuple[Tensor, float] | None:
    """Where a trigger may be changed, 1.0 there and 0.0 elsewhere, (channels, H, W), and by how much it may move a value; None for
    triggers that are neither put into a place nor added."""
    if isinstance(trigger, (Patch, TrojanPatch)):
        size = trigger.size if isinstance(trigger, Patch) else trigger.values.shape[-1]
        place = Patch(size=size, corner=trigger.corner, margin=trigger.margin)
        return place.put(torch.zeros(1, *shape), torch.ones(shape[0], size, size))[0], 1.0
    if isinstance(trigger, Stamp):
        return _probed(trigger, shape)
    if isinstance(trigger, Blend):
        return torch.ones(*shape), trigger.ratio
    if isinstance(trigger, (Sinusoid, LowFrequency)):
        return torch.ones(*shape), trigger.amplitude
    return (torch.ones(*shape), trigger.epsilon) if isinstance(trigger, Lira) else None


def _probed(trigger: Trigger, shape: Sequence[int]) -> tuple[Tensor, float] | None:
    """The same of a trigger that is known by what it does only: it replaces some values, or blends all of them in one ratio."""
    with torch.no_grad():
        kept = trigger(torch.ones(1, *shape))[0] - trigger(torch.zeros(1, *shape))[0]
    replaced = kept.abs() < 1e-6
    if replaced.any() and bool((kept[~replaced] == 1).all()):
        return replaced.float(), 1.0
    ratio = 1 - float(kept.mean())
    blended = ratio > 1e-6 and bool(((1 - kept) - ratio).abs().max() < 1e-5)
    return (torch.ones(*shape), ratio) if blended else None


def reoptimised(model: nn.Module, door: Backdoor, owned: Pair, seed: int) -> Changed:
    """The trigger after a search, from itself, for the change that sends most victims where the attacker wants them."""
    shape = owned[0].shape[1:]
    within = reach(door.trigger, shape)
    assert within is not None
    mask, bound = within
    rows = torch.nonzero(door.rule.victims(owned[1]))[:, 0]
    images, wanted = owned[0][rows], door.rule.relabel(owned[1][rows])
    change = torch.zeros(shape, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=SEARCH_STEP * bound)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(SEARCH_STEPS):
        index = torch.randint(0, len(images), (SEARCH_BATCH,), generator=generator)
        with torch.no_grad():
            stamped = Changed(door.trigger, change * mask, bound)(images[index])
        # The gradient passes the clamps: a value that overshot could never come back.
        open_ended = change * mask
        loss = cross_entropy(model(stamped + open_ended - open_ended.detach()), wanted[index])
        (change.grad,) = torch.autograd.grad(loss, change)
        optimizer.step()
        with torch.no_grad():
            change.clamp_(-2 * bound, 2 * bound)
    return Changed(door.trigger, (change * mask).detach(), bound)
