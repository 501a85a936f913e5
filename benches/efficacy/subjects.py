"""The backdoored networks that a removal is measured on, each with its triggers and its images. May import: benches/calibration,
tacfast."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from data import Data
from defences import NotApplicable
from learned import learned_backdoors
from networks import Line, Seeds, is_clean, read_networks, targets, works
from plan import LEARNED, Job, backdoors
from recipe import ARCHITECTURES, augment, load_net
from scores import Behaviour, behaviour
from torch import Tensor, nn

from tacfast.attacks import Backdoor, CoversOnly
from tacfast.files import atomic

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Subject:
    """A network of the calibration that is to be repaired."""

    #: Its line in the results.
    line: Line
    data: Data
    #: In eval mode; from images in [0, 1].
    model: nn.Module
    #: Those that change labels; covers are no attack.
    doors: tuple[Backdoor, ...]

    @classmethod
    def of(cls, line: Line, data: Data, doors: Sequence[Backdoor] = ()) -> Subject:
        model = load_net(line["folder"] / "models" / f"{line['key']}.safetensors", line["arch"], data.classes, data.x_train.shape[1])
        return cls(line, data, model, tuple(door for door in doors if not isinstance(door.rule, CoversOnly)))

    @property
    def key(self) -> str:
        return str(self.line["key"])

    @property
    def targets(self) -> tuple[int, ...]:
        return tuple(sorted(targets(self.line)))

    @cached_property
    def before(self) -> Behaviour:
        """What the network does before it is repaired."""
        return behaviour(self.model, self.doors, self.targets, *self.rest)

    @cached_property
    def _parts(self) -> tuple[Pair, Pair]:
        return self.data.split(self.line["seed"])

    def clean(self, share: float) -> Pair:
        """As many of the defender's images, and labels, as `share` of the training set is; all of them where there are not that many."""
        images, labels = self._parts[0]
        count = min(len(images), max(2, round(share * len(self.data.x_train))))
        return images[:count], labels[:count]

    @property
    def rest(self) -> Pair:
        """Test images that are not the defender's."""
        return self._parts[1]

    def view(self) -> Callable[[Tensor, torch.Generator], Tensor]:
        """The augmentation that the network was trained with."""
        schedule = self.data.schedule
        return lambda images, generator: augment(images, schedule, generator)

    @property
    def bfloat16(self) -> bool:
        """Whether this kind of network is trained faster in bfloat16."""
        return ARCHITECTURES[self.line["arch"]].bfloat16

    def twin(self) -> nn.Module:
        """The clean network of the same seed.

        Raises:
            NotApplicable: it was not trained.
        """
        job = Job(self.line["dataset"], self.line["arch"], "clean", 0.0, None, self.line["seed"])
        file = self.line["folder"] / "models" / f"{job.key}.safetensors"
        if not file.exists():
            raise NotApplicable("its clean twin is not in the folder")
        return self.load(file)

    def load(self, file: Path) -> nn.Module:
        """Weights for a network of this kind, in eval mode."""
        return load_net(file, self.line["arch"], self.data.classes, self.data.x_train.shape[1])

    def copied(self) -> nn.Module:
        return copy.deepcopy(self.model)


def chosen(
    folders: Sequence[Path], data: Sequence[str], archs: Sequence[str], attacks: Sequence[str], seeds: Seeds, keys: Sequence[str]
) -> list[Line]:
    """The backdoored networks, in the order of their training, whose backdoors work and that pass all filters; no filter, no limit."""
    found = []
    for line in read_networks(folders):
        wanted = (not archs or line["arch"] in archs) and (not attacks or line["attack"] in attacks) and (not keys or line["key"] in keys)
        if not is_clean(line) and works(line) and line["dataset"] in data and seeds.holds(line["seed"], line["key"]) and wanted:
            found.append(line)
    return found


def open_subject(line: Line, data: Data, cache: Path) -> Subject:
    """The network with its triggers; those that are learnt are kept in the folder `cache`."""
    job = Job(**{name: line[name] for name in ("dataset", "arch", "attack", "rate", "target", "seed")})
    doors = _learnt(job, data, line["folder"], cache) if job.attack in LEARNED else backdoors(job, data.classes)
    return Subject.of(line, data, doors)


def _learnt(job: Job, data: Data, folder: Path, cache: Path) -> list[Backdoor]:
    """Triggers are learnt again as they were for training: the same clean network, images and seed give the same trigger. That takes a
    minute, so they are kept as a pickle; it is our own, from a folder that nobody else writes to."""
    file = cache / f"{job.key}.pt"
    if file.exists():
        return list(torch.load(file, weights_only=False))
    doors: list[Any] = learned_backdoors(job, data, folder, tick=lambda: None)
    cache.mkdir(parents=True, exist_ok=True)
    with atomic(file) as stream:
        torch.save(doors, stream)
    return doors
