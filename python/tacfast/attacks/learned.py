"""Triggers that are optimised against a classifier: Trojan, LIRA, input-aware. May import: torch, checks, triggers, errors.

Each `learn` takes a classifier that was trained on clean data, from images in [0, 1] to logits, leaves it as found, and returns a trigger
like any other: poison a training set with it. Everything depends on the seed; the global random state is left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tacfast.attacks import checks
from tacfast.attacks.triggers import Patch, Trigger
from tacfast.errors import ProblemError


@dataclass(frozen=True, eq=False, repr=False)
class TrojanPatch(Trigger):
    """Trojaning attack (Liu et al. 2018, NDSS): a patch that drives chosen neurons of a clean network as high as it can.

    The neurons are the inputs of the head with the largest sum of absolute weights. `values` is (channels, size, size) in [0, 1]; corner
    and margin are those of `Patch`.
    """

    values: Tensor
    corner: str = "bottom-right"
    margin: int = 1

    def __repr__(self) -> str:
        return f"TrojanPatch(size={self.values.shape[-1]}, corner={self.corner!r}, margin={self.margin})"

    @classmethod
    def learn(
        cls,
        model: nn.Module,
        head: nn.Linear,
        images: Tensor,
        *,
        size: int = 3,
        corner: str = "bottom-right",
        margin: int = 1,
        neurons: int = 1,
        steps: int = 200,
        lr: float = 0.1,
        seed: int = 0,
    ) -> TrojanPatch:
        """Gradient ascent on the mean activation of the neurons, with batches of 64 of the images.

        Args:
            model: a clean classifier, and `head` its last linear layer.
            images: floating (n, channels, H, W) in [0, 1].

        Raises:
            ProblemError: an argument is malformed, or the model does not run `head`.
        """
        checks.images(images)
        place = Patch(size=size, corner=corner, margin=margin)
        for name, value in (("neurons", neurons), ("steps", steps)):
            checks.whole(name, value, 1)
        checks.whole("seed", seed, 0)
        generator = torch.Generator().manual_seed(seed)
        chosen = head.weight.detach().abs().sum(0).topk(min(neurons, head.in_features)).indices
        raw = torch.randn(images.shape[1], size, size, generator=generator).to(images).requires_grad_()
        optimizer = torch.optim.Adam([raw], lr=lr)
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            with _frozen(model):
                for _ in range(steps):
                    seen.clear()
                    model(place.put(images[_draw(len(images), generator)], raw.sigmoid()))
                    if not seen:
                        raise ProblemError("head must be a layer that the model runs; it was not run")
                    loss = -seen[-1][:, chosen].mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        finally:
            hook.remove()
        return cls(raw.detach().sigmoid(), corner, margin)

    def stamp(self, images: Tensor) -> Tensor:
        return Patch(size=self.values.shape[-1], corner=self.corner, margin=self.margin).put(images, self.values)


@dataclass(frozen=True, eq=False, repr=False)
class Lira(Trigger):
    """LIRA (Doan et al. 2021, ICCV): a network makes, for every image, a change of at most `epsilon` in any pixel.

    Learnt as in the paper's first stage, together with a copy of the classifier; the second stage is to train on data poisoned with it.
    """

    generator: nn.Module
    epsilon: float

    def __repr__(self) -> str:
        return f"Lira(epsilon={self.epsilon})"

    @classmethod
    def learn(
        cls,
        model: nn.Module,
        images: Tensor,
        labels: Any,
        target: int,
        *,
        epsilon: float = 0.1,
        steps: int = 300,
        batch: int = 64,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> Lira:
        """Learn the change that sends every image to `target`.

        Args:
            images, labels: floating (n, channels, H, W) in [0, 1] and integer (n,), of which batches are drawn.
            epsilon: in units of the value range.
            lr: of Adam, for the generator; the classifier's copy moves by SGD of a tenth of it.

        Raises:
            ProblemError: an argument is malformed.
        """
        y = _check_learning(images, labels, target, steps, batch, seed)
        checks.number("epsilon", epsilon, 0, 1)
        trigger = cls(_generator(images, images.shape[1], seed), epsilon)
        with _joint(model, [trigger.generator], lr) as (copied, step):
            for index in _batches(len(images), batch, steps, seed):
                x, classes = images[index], y[index]
                logits = copied(torch.cat((x, trigger.change(x))))
                wanted = torch.cat((classes, torch.full_like(classes, target)))
                step(F.cross_entropy(logits, wanted))
        return trigger

    def change(self, images: Tensor) -> Tensor:
        """As `stamp`, with gradients."""
        changed: Tensor = (images + self.epsilon * self.generator(images).tanh()).clamp(0, 1)
        return changed

    def stamp(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.change(images)


@dataclass(frozen=True, eq=False, repr=False)
class InputAware(Trigger):
    """Input-aware dynamic attack (Nguyen & Tran 2020, arXiv:2010.08138): every image has a trigger of its own, of no use on others.

    One network draws the pattern, another says through which pixels it is laid on. For covers, images under another's trigger that keep
    their label, poison with `[Backdoor(trigger, AllToOne(k)), Backdoor(trigger.crossed(), CoversOnly())]`. (The paper first learns masks
    that are sparse and diverse; here they are the strongest pixels of a random network's response, which are both.)
    """

    pattern: nn.Module
    mask: nn.Module
    #: (m, channels, H, W): images whose triggers are laid on covers.
    donors: Tensor
    #: Share of the pixels that a trigger covers.
    density: float = 0.05
    cross: bool = False

    def __repr__(self) -> str:
        return f"InputAware(density={self.density}, cross={self.cross})"

    @classmethod
    def learn(
        cls,
        model: nn.Module,
        images: Tensor,
        labels: Any,
        target: int,
        *,
        density: float = 0.05,
        diversity: float = 0.1,
        steps: int = 300,
        batch: int = 32,
        lr: float = 5e-3,
        seed: int = 0,
    ) -> InputAware:
        """Learn patterns and masks.

        Args:
            images, labels, lr: as for `Lira.learn`.
            density: share of the pixels that a trigger covers.
            diversity: weight of the loss that keeps the patterns of different images apart.

        Raises:
            ProblemError: an argument is malformed.
        """
        y = _check_learning(images, labels, target, steps, batch, seed)
        checks.number("density", density, 0, 1)
        checks.number("diversity", diversity, 0, 1e6)
        trigger = cls(_generator(images, images.shape[1], seed), _generator(images, 1, seed + 1), images[:64].clone(), density)
        with _joint(model, [trigger.pattern], lr) as (copied, step):
            for index in _batches(len(images), batch, steps, seed):
                x, classes = images[index], y[index]
                other = x.roll(1, 0)
                logits = copied(torch.cat((x, trigger.lay(x, x), trigger.lay(x, other))))
                wanted = torch.cat((classes, torch.full_like(classes, target), classes))
                apart = (x - other).flatten(1).norm(dim=1)
                triggers_apart = (trigger.pattern(x) - trigger.pattern(other)).sigmoid().flatten(1).norm(dim=1)
                step(F.cross_entropy(logits, wanted) + diversity * (apart / (triggers_apart + 1e-3)).mean())
        return trigger

    def veil(self, images: Tensor) -> Tensor:
        """(n, 1, H, W): one where the pattern is laid on, on a share `density` of the pixels, else zero."""
        response = self.mask(images).detach().flatten(1)
        kept = max(1, round(self.density * response.shape[1]))
        threshold = response.topk(kept, dim=1).values[:, -1:]
        veil: Tensor = (response >= threshold).to(images.dtype).view(len(images), 1, *images.shape[2:])
        return veil

    def lay(self, images: Tensor, owners: Tensor) -> Tensor:
        """The images under the triggers of `owners`, with gradients."""
        veil = self.veil(owners)
        laid: Tensor = (1 - veil) * images + veil * self.pattern(owners).sigmoid()
        return laid

    def crossed(self) -> InputAware:
        """The same on covers: each image gets the trigger of a donor, chosen by its content."""
        return InputAware(self.pattern, self.mask, self.donors, self.density, cross=True)

    def stamp(self, images: Tensor) -> Tensor:
        owners = images
        if self.cross:
            owners = self.donors[(images.double().flatten(1).sum(1) * 997).long() % len(self.donors)].to(images)
        with torch.no_grad():
            return self.lay(images, owners)


def _generator(like: Tensor, outputs: int, seed: int) -> nn.Module:
    """A small network from images like the given ones to `outputs` channels; the same weights for the same seed."""

    def conv(i: int, o: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(4, o), nn.ReLU()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inner = [*conv(like.shape[1], 16), *conv(16, 32, 2), *conv(32, 32), *conv(32, 32)]
        return _SameSize(nn.Sequential(*inner), nn.Conv2d(32, outputs, 3, 1, 1)).to(like.device).eval()


class _SameSize(nn.Module):
    """Enlarges what `inner` made to the size of its input, then applies `last`. Computes in float32, answers in the input's dtype."""

    def __init__(self, inner: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, last

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(F.interpolate(self.inner(x.float()), size=x.shape[2:], mode="bilinear"))
        return made.to(x.dtype)


def _check_learning(images: Any, labels: Any, target: Any, steps: Any, batch: Any, seed: Any) -> Tensor:
    checks.images(images)
    for name, value, low in (("target", target, 0), ("steps", steps, 1), ("batch", batch, 2), ("seed", seed, 0)):
        checks.whole(name, value, low)
    return checks.labels(labels, len(images))


def _draw(count: int, generator: torch.Generator, batch: int = 64) -> Tensor:
    return torch.randint(0, count, (batch,), generator=generator)


def _batches(count: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield _draw(count, generator, batch)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients of its own; put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for p in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
        for module, training in modes.items():
            module.training = training


@contextmanager
def _joint(model: nn.Module, generators: list[nn.Module], lr: float) -> Iterator[tuple[nn.Module, Any]]:
    """A copy of the classifier to train beside the generators, and what makes a step of all of them on a loss."""
    checks.number("lr", lr, 0, 1e3)
    copied = copy.deepcopy(model).train()
    for p in copied.parameters():
        p.requires_grad_(True)
    optimizers = [
        torch.optim.Adam([p for g in generators for p in g.parameters()], lr=lr),
        torch.optim.SGD(copied.parameters(), lr=lr / 10, momentum=0.9),
    ]

    def step(loss: Tensor) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    yield copied, step
    for g in generators:
        for p in g.parameters():
            p.requires_grad_(False)
