"""The backdoored networks that a removal is measured on, each with its triggers and its images. May import: zoo_models,
benches/calibration, tacfast."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from data import Data
from defences import NotApplicable
from learned import learned_backdoors
from networks import Line, Seeds, is_clean, pairs, read_networks, targets, works
from plan import LEARNED, Job, backdoors
from recipe import ARCHITECTURES, augment, load_net
from scores import Behaviour, behaviour
from torch import Tensor, nn
from zoo_models import ARCH, ZooModel, zoo_models

from tacfast.attacks import Backdoor, CoversOnly
from tacfast.checkpoints import load_weights, read_weights
from tacfast.precision import strided_depthwise

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Subject:
    """A network that is to be repaired."""

    #: Its line in the results.
    line: Line
    data: Data
    #: In eval mode; from images in [0, 1].
    model: nn.Module
    #: Those that change labels; covers are no attack.
    doors: tuple[Backdoor, ...]

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
        arch = ARCHITECTURES.get(self.line["arch"])
        return arch is not None and arch.bfloat16

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(source, target) where not every class is a source."""
        return tuple(sorted(pairs(self.line)))

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
        model = self.copied()
        load_weights(model, read_weights(file).tensors)
        return model

    def copied(self) -> nn.Module:
        return copy.deepcopy(self.model)


@dataclass(frozen=True)
class Filter:
    """Which networks are wanted; what is empty does not filter."""

    data: Sequence[str]
    archs: Sequence[str] = ()
    attacks: Sequence[str] = ()
    seeds: Seeds = Seeds.all
    keys: Sequence[str] = ()

    def passes(self, line: Line) -> bool:
        by_name = ((self.archs, "arch"), (self.attacks, "attack"), (self.keys, "key"))
        wanted = all(not names or line[name] in names for names, name in by_name)
        return wanted and line["dataset"] in self.data and self.seeds.holds(line["seed"], line["key"])


def chosen(folders: Sequence[Path], zoo: Path | None, wanted: Filter, *, clean: bool = False) -> list[Line]:
    """The networks that pass, in the order of their training, then those of a zoo: clean ones, or those whose backdoors work. In a zoo
    all backdoors count, and so do those of networks that are wanted by key."""
    trained = [line for line in read_networks(folders) if is_clean(line) or works(line) or line["key"] in wanted.keys]
    others = [model.line() for model in zoo_models(zoo)] if zoo else []
    return [line for line in (*trained, *others) if is_clean(line) == clean and wanted.passes(line)]


def open_subject(line: Line, data: Data) -> Subject:
    """The network with its triggers."""
    if line["arch"] == ARCH:
        published = ZooModel(line["folder"], line["key"])
        return Subject(line, data, published.network(), published.backdoors())
    job = Job(**{name: line[name] for name in ("dataset", "arch", "attack", "rate", "target", "seed")})
    if job.attack in LEARNED:
        doors = learned_backdoors(job, data, line["folder"], tick=lambda: None)
    else:
        doors = backdoors(job, data.classes, data.side)
    model = load_net(line["folder"] / "models" / f"{line['key']}.safetensors", line["arch"], data.classes, data.x_train.shape[1])
    if strided_depthwise(model):
        # Half as fast again, for all defences alike.
        model.to(memory_format=torch.channels_last)
    return Subject(line, data, model, tuple(door for door in doors if not isinstance(door.rule, CoversOnly)))
