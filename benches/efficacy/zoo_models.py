"""A folder of models that others trained, whose truth is known: NAME/model.safetensors, NAME/meta.json (architecture, data, mean, std),
NAME/truth.json, and triggers.py. The zoo's own code is run: use a zoo that you trust. May import: tacfast.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tacfast.architectures import build_model
from tacfast.attacks import AllToAll, AllToOne, Backdoor, Trigger
from tacfast.checkpoints import load_weights, read_weights

#: Stands for the architecture in lines and filters.
ARCH = "zoo"


class Normalised(nn.Module):
    """A network that takes images in [0, 1]."""

    def __init__(self, net: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.net = net
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Any:
        return self.net((images - self.mean) / self.std)


@dataclass(frozen=True)
class Stamp(Trigger):
    """A trigger of the zoo."""

    name: str
    how: Callable[[Tensor], Tensor]

    def stamp(self, images: Tensor) -> Tensor:
        return self.how(images)


class ZooModel:
    """What the zoo says of a model."""

    def __init__(self, zoo: Path, name: str) -> None:
        self.zoo, self.name = zoo, name
        self.meta: dict[str, Any] = json.loads((zoo / name / "meta.json").read_text())
        self.truth: dict[str, Any] = json.loads((zoo / name / "truth.json").read_text())

    def network(self) -> nn.Module:
        """In eval mode; from images in [0, 1]."""
        file, _, factory = self.meta["arch"].rpartition(":")
        net = build_model(f"{self.zoo / file}:{factory}", {k: json.dumps(v) for k, v in self.meta["arch_args"].items()})
        load_weights(net, read_weights(self.zoo / self.name / "model.safetensors").tensors)
        return Normalised(net, self.meta["mean"], self.meta["std"]).eval()

    def backdoors(self) -> tuple[Backdoor, ...]:
        attack, targets = self.truth["attack"], self.truth["targets"]
        if attack == "clean":
            return ()
        stamp = self._triggers().trigger(attack)
        if targets == "y+1":
            return (Backdoor(Stamp(attack, stamp), AllToAll(self.meta["arch_args"]["num_classes"])),)
        return tuple(Backdoor(Stamp(attack, partial(stamp, which=i)), AllToOne(target)) for i, target in enumerate(targets))

    def line(self) -> dict[str, Any]:
        """As benches/calibration/ describes its networks."""
        classes = int(self.meta["arch_args"]["num_classes"])
        shifted = self.truth["targets"] == "y+1"
        truth = {
            "targets": [] if shifted else sorted(self.truth["targets"]),
            "pairs": [[y, (y + 1) % classes] for y in range(classes)] if shifted else [],
        }
        network = {"key": self.name, "dataset": self.meta["data"], "arch": ARCH, "seed": 0, "classes": classes, "folder": self.zoo}
        return network | {"attack": self.truth["attack"], "rate": self.truth["poisoning_rate"], "target": None, "truth": truth}

    def _triggers(self) -> Any:
        spec = importlib.util.spec_from_file_location("triggers", self.zoo / "triggers.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def zoo_models(zoo: Path) -> list[ZooModel]:
    return [ZooModel(zoo, file.parent.name) for file in sorted(zoo.glob("*/truth.json"))]
