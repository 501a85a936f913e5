"""The one training recipe of the calibration, for clean and poisoned networks alike.

Initial weights, order of the samples, crops and flips depend on the seed alone. A pair of one seed differs in the poisoned samples only.
Poisoned images are stamped after crop and flip: the attacker is the one who trains and publishes the network, and the trigger then looks in
training as it does in use, so that attacks work at low poisoning rates too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from nets import NETS
from torch import Tensor, nn
from torch.nn import functional as F

from tacfast.checkpoints import load_weights, read_weights
from tacfast.precision import mixed_precision

#: Goes into every result; results of different recipes are never mixed.
RECIPE = 1
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Architecture:
    """How one kind of network is made and trained."""

    #: See nets.py; the side of the images for lite0.
    width: int
    optimizer: str
    lr: float
    weight_decay: float
    #: bfloat16 in the forward and backward pass, on CPUs that have it: faster for dense convolutions, slower for the others.
    bfloat16: bool
    #: Times the epochs of the data set's schedule.
    more_epochs: float = 1.0


ARCHITECTURES = {
    "resnet": Architecture(32, "sgd", 0.2, 5e-4, True),
    "resnet-wide": Architecture(48, "sgd", 0.2, 5e-4, True, more_epochs=1.5),
    # Hardly trained: scanners meet such networks too.
    "resnet-short": Architecture(32, "sgd", 0.2, 5e-4, True, more_epochs=0.5),
    # Beyond 85 % on CIFAR-10; several times as expensive as "resnet", so none of them is in the plan.
    "resnet-long": Architecture(48, "sgd", 0.2, 5e-4, True, more_epochs=2.5),
    "vgg": Architecture(48, "sgd", 0.1, 5e-4, True),
    "mobilenet": Architecture(32, "sgd", 0.2, 5e-4, False),
    "vit": Architecture(16, "adamw", 2e-3, 0.05, False, more_epochs=1.2),
    # Not from scratch: fine-tuned from ImageNet, at 96 x 96 pixels.
    "lite0": Architecture(96, "sgd", 0.03, 5e-4, False),
}


@dataclass(frozen=True)
class Schedule:
    """Epochs and augmentation of a data set."""

    epochs: int
    #: Mirror images at random: no for traffic signs, whose mirror image can be another sign.
    flip: bool
    #: Shift by at most this many pixels, filling with the reflected border.
    crop: int
    batch: int = 128


def precision(arch: str) -> str:
    """Of the products while this kind of network is trained here: the same seed gives another network in another precision."""
    return "bfloat16" if ARCHITECTURES[arch].bfloat16 and mixed_precision(_CPU)._enabled else "float32"


def make_net(arch: str, classes: int, channels: int, seed: int) -> nn.Module:
    """The network with the initial weights of `seed`; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETS[arch](classes, channels=channels, width=ARCHITECTURES[arch].width)


def load_net(file: Path, arch: str, classes: int, channels: int) -> nn.Module:
    """A network that train.py saved, in eval mode."""
    model = make_net(arch, classes, channels, seed=0)
    load_weights(model, read_weights(file).tensors)
    return model.eval()


def augment(images: Tensor, schedule: Schedule, generator: torch.Generator) -> Tensor:
    """Shift, and perhaps mirror, each image of a batch (n, c, H, W) on its own."""
    n, _, height, width = images.shape
    pad = schedule.crop
    draws = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
    mirrored = torch.rand(n, generator=generator) < 0.5
    rows = draws[0, :, None] + torch.arange(height)
    columns = draws[1, :, None] + torch.arange(width)
    if schedule.flip:
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad), mode="reflect")
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(
    images: Tensor,
    labels: Tensor,
    classes: int,
    *,
    arch: str,
    schedule: Schedule,
    seed: int,
    stamp: Callable[[Tensor, Tensor], Tensor] = lambda batch, index: batch,
    tick: Callable[[], None] = lambda: None,
) -> tuple[nn.Module, float]:
    """Train a network from scratch.

    Args:
        images: uint8 (n, c, H, W).
        labels: int64 (n,), those of poisoned samples included.
        stamp: from the augmented images of a batch in [0, 1] and their positions to what the network sees.
        tick: called before every batch; raises to stop.

    Returns:
        The network in eval mode, and the seconds of processor time.
    """
    how = ARCHITECTURES[arch]
    model = make_net(arch, classes, images.shape[1], seed).to(memory_format=torch.channels_last).train()
    optimizer = _optimizer(model, how)
    epochs = round(schedule.epochs * how.more_epochs)
    # The last, smaller batch of an epoch is left out: its batch statistics are poor.
    batches = len(images) // schedule.batch
    climb = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.lr, total_steps=epochs * batches, pct_start=0.2, cycle_momentum=False)
    generator = torch.Generator().manual_seed(seed)
    started = time.process_time()
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).split(schedule.batch)[:batches]:
            tick()
            batch = stamp(augment(images[index].float() / 255, schedule, generator), index).contiguous(memory_format=torch.channels_last)
            with mixed_precision(_CPU) if how.bfloat16 else nullcontext():
                logits = model(batch)
            loss = F.cross_entropy(logits.float(), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            climb.step()
    return model.eval(), time.process_time() - started


def _optimizer(model: nn.Module, how: Architecture) -> torch.optim.Optimizer:
    """Weight decay on matrices and kernels only."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    free = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": how.weight_decay}, {"params": free, "weight_decay": 0.0}]
    if how.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=how.lr)
    return torch.optim.SGD(groups, lr=how.lr, momentum=0.9, nesterov=True)
