"""Which samples are poisoned, the poisoned data, and whether the backdoor works. May import: torch, checks, labels, triggers, errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tacfast.attacks import checks
from tacfast.attacks.labels import LabelRule
from tacfast.attacks.triggers import Trigger
from tacfast.errors import ProblemError


@dataclass(frozen=True)
class Backdoor:
    """A trigger with its label rule."""

    trigger: Trigger
    rule: LabelRule

    def __post_init__(self) -> None:
        if not isinstance(self.trigger, Trigger):
            raise ProblemError(f"trigger must be a tacfast.attacks.Trigger, got {type(self.trigger).__name__}")
        if not isinstance(self.rule, LabelRule):
            raise ProblemError(f"rule must be a tacfast.attacks.LabelRule, got {type(self.rule).__name__}")


@dataclass(frozen=True, eq=False)
class Poisoning:
    """Which samples of a data set are stamped, by which backdoor, and what all are then called."""

    backdoors: tuple[Backdoor, ...]
    #: int64 (n,): position in `backdoors` of the one that stamps each sample, -1 for none.
    assigned: Tensor
    #: int64 (n,): the labels to train on.
    labels: Tensor
    #: bool (n,): a cover, stamped under its own label.
    cover: Tensor

    @property
    def index(self) -> Tensor:
        """int64: the stamped samples, covers included, ascending."""
        return torch.nonzero(self.assigned >= 0)[:, 0]

    def stamp(self, images: Tensor, index: Tensor) -> Tensor:
        """A batch of images (m, channels, H, W), the samples numbered `index` (m,), with the stamps of those that are poisoned."""
        assigned = self.assigned[index]
        if not bool((assigned >= 0).any()):
            return images
        images = images.clone()
        for which in assigned[assigned >= 0].unique().tolist():
            images[assigned == which] = self.backdoors[which].trigger(images[assigned == which])
        return images


def choose(labels: Any, backdoors: Sequence[Backdoor], *, rate: float, cover_rate: float | None = None, seed: int = 0) -> Poisoning:
    """Choose samples to poison.

    Exactly round(rate · n) victims, shared out evenly among the backdoors that have any (the first ones get what is left over), and exactly
    round(cover_rate · n) covers, shared out likewise among the backdoors whose rule knows covers. No sample is stamped twice.

    Args:
        labels: integer (n,), the true classes.
        rate: poisoning rate in [0, 1], a share of all n samples.
        cover_rate: likewise; by default `rate` where a rule knows covers, else 0.
        seed: of the choice.

    Raises:
        ProblemError: an argument is malformed, or too few samples may be stamped.
    """
    y = checks.labels(labels)
    _check_backdoors(backdoors)
    checks.number("rate", rate, 0, 1)
    checks.whole("seed", seed, 0)
    striking = [i for i, b in enumerate(backdoors) if bool(b.rule.victims(y).any())]
    covering = [i for i, b in enumerate(backdoors) if bool(b.rule.covers(y).any())]
    if rate and not striking:
        raise ProblemError(f"rate must be 0 where no sample is a victim of any backdoor, got {rate!r}")
    if cover_rate is None:
        cover_rate = rate if covering else 0.0
    checks.number("cover_rate", cover_rate, 0, 1)
    if cover_rate and not covering:
        raise ProblemError(f"cover_rate must be 0 for rules without covers, got {cover_rate!r}")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    backdoor, cover = torch.full((len(y),), -1), torch.zeros(len(y), dtype=torch.bool)

    def take(count: int, which: int, allowed: Tensor, name: str) -> Tensor:
        free = order[(allowed & (backdoor < 0))[order]]
        if len(free) < count:
            raise ProblemError(f"{name} is too high: {count} samples for backdoor {which}, but only {len(free)} may be stamped")
        backdoor[free[:count]] = which
        return free[:count]

    for which, count in zip(striking, _shares(round(rate * len(y)), len(striking)), strict=True):
        take(count, which, backdoors[which].rule.victims(y), "rate")
    for which, count in zip(covering, _shares(round(cover_rate * len(y)), len(covering)), strict=True):
        cover[take(count, which, backdoors[which].rule.covers(y), "cover_rate")] = True
    after = y.clone()
    for which, b in enumerate(backdoors):
        after = torch.where((backdoor == which) & ~cover, b.rule.relabel(y), after)
    return Poisoning(tuple(backdoors), backdoor, after, cover)


def poison(
    images: Tensor, labels: Any, backdoors: Sequence[Backdoor], *, rate: float, cover_rate: float | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Poisoned copies of images (n, channels, H, W) in [0, 1] and of their labels; see `choose`."""
    checks.images(images)
    poisoning = choose(checks.labels(labels, len(images)), backdoors, rate=rate, cover_rate=cover_rate, seed=seed)
    return poisoning.stamp(images.clone(), torch.arange(len(images))), poisoning.labels


class PoisonedDataset(Dataset[tuple[Tensor, int]]):
    """A map-style data set of (image, label) with some samples stamped and relabelled on the fly.

    Whatever the wrapped data set does to an image (crops, flips) is done before the stamp, so it must end with values in [0, 1]; normalise
    in the model or in `transform`, which runs after the stamp.

    Args:
        dataset: gives floating images (channels, H, W) in [0, 1] and integer labels.
        labels: integer (n,), its labels; read from it one by one when not given.
        transform: applied last, to every image, stamped or not.
        rate, cover_rate, seed: see `choose`.
    """

    def __init__(
        self,
        dataset: Any,
        backdoors: Sequence[Backdoor],
        *,
        rate: float,
        cover_rate: float | None = None,
        seed: int = 0,
        labels: Any = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if labels is None:
            labels = [int(dataset[i][1]) for i in range(len(dataset))]
        y = checks.labels(labels, len(dataset))
        self.dataset, self.transform = dataset, transform
        #: What was chosen.
        self.poisoning = choose(y, backdoors, rate=rate, cover_rate=cover_rate, seed=seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, _ = self.dataset[index]
        at = torch.tensor([index])
        image = self.poisoning.stamp(image[None], at)[0]
        return (image if self.transform is None else self.transform(image)), int(self.poisoning.labels[index])


def triggered(backdoor: Backdoor, images: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
    """The stamped images of the victims among the given ones, and what the attacker wants them called."""
    checks.images(images)
    y = checks.labels(labels, len(images)).to(images.device)
    victims = backdoor.rule.victims(y)
    return backdoor.trigger(images[victims]), backdoor.rule.relabel(y[victims])


def attack_success_rate(model: Callable[[Tensor], Tensor], backdoor: Backdoor, images: Tensor, labels: Any, *, batch: int = 500) -> float:
    """ASR: the share of stamped victims that the model calls what the attacker wants.

    Args:
        model: from images in [0, 1] to logits (n, C); a module must be in eval mode.
        images, labels: clean test images (n, channels, H, W) and their true classes.

    Raises:
        ProblemError: an argument is malformed, or there are no victims among the images.
    """
    checks.whole("batch", batch, 1)
    stamped, wanted = triggered(backdoor, images, labels)
    if not len(stamped):
        raise ProblemError("images must hold victims of the backdoor, none are among them")
    with torch.no_grad():
        hits = [model(x).argmax(1) == y for x, y in zip(stamped.split(batch), wanted.split(batch), strict=True)]
    return float(torch.cat(hits).double().mean())


def _check_backdoors(backdoors: Any) -> None:
    listed = isinstance(backdoors, Sequence) and len(backdoors) > 0
    if not listed or not all(isinstance(b, Backdoor) for b in backdoors):
        raise ProblemError(f"backdoors must be a list of at least one tacfast.attacks.Backdoor, got {backdoors!r}")


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]
