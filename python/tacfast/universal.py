"""Universal perturbations: one small pattern that, added to any image, should send it to a class. May import: torch, heads.

A trigger works on (nearly) every image, so a backdoored network is open to *universal* perturbations towards its target, even where the
trigger itself is no pattern. They are to the input what s_p is to the latents, and found by projected gradient steps (universal
perturbations: Moosavi-Dezfooli et al. 2017, CVPR). Two kinds: short patterns, near triggers that are spread over the image, and patterns
of few pixels and any strength, near patches (Brown et al. 2017, arXiv:1712.09665).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tacfast.heads import logits_of

#: Length of a perturbation, relative to the mean distance of an image from the mean image.
RADIUS = 0.15
#: Length of a gradient step, relative to the radius.
_STEP = 0.3
#: Radius of the steps of the other kind of pattern, relative as above.
SPARSE_RADIUS = 2.0
#: In place of the length of what vanished.
_TINY = 1e-12


#: From images to whatever holds logits.
Model = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Room:
    """Where stamped images may lie: each channel's range over the clean images, and the longest perturbation."""

    low: Tensor
    high: Tensor
    radius: float

    @classmethod
    def of(cls, images: Tensor, radius: float = RADIUS) -> Room:
        """From all clean images (n, ...), as they are shown to the network; `radius` is relative to their mean distance from the mean."""
        over = [d for d in range(images.ndim) if d != 1]
        spread = (images - images.mean(0)).flatten(1).norm(dim=1).mean()
        return cls(images.amin(over, keepdim=True)[0], images.amax(over, keepdim=True)[0], radius * float(spread))

    def put(self, images: Tensor, pattern: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(images + pattern, self.low), self.high)

    def to(self, device: torch.device) -> Room:
        return Room(self.low.to(device), self.high.to(device), self.radius)


def fresh(shape: Sequence[int], radius: float, generator: torch.Generator) -> Tensor:
    """A random pattern, as long as one step."""
    noise = torch.randn(torch.Size(shape), generator=generator)
    pattern: Tensor = noise * (_STEP * radius / noise.norm())
    return pattern


def follow(pattern: Tensor, slope: Tensor, radius: float) -> Tensor:
    """One step of normalised length down the slope, projected onto the ball."""
    moved = _moved(pattern, slope, radius)
    shortened: Tensor = moved * (radius / moved.norm().clamp_min(_TINY)).clamp_max(1.0)
    return shortened


def step(model: Model, images: Tensor, wanted: Tensor, pattern: Tensor, room: Room) -> Tensor:
    """One step of normalised length towards the wanted classes, projected onto the ball."""
    return follow(pattern, _slope(model, images, wanted, pattern, room), room.radius)


def sparse_step(model: Model, images: Tensor, wanted: Tensor, pattern: Tensor, room: Room, share: float, left: float) -> Tensor:
    """One step towards the wanted classes, after which only the pixels that change most stay, over all channels.

    Args:
        room: of SPARSE_RADIUS.
        share: of the pixels that stay in the end.
        left: what is left of the way from all pixels (1) to that share (0). Each equal part of it divides their number by the same factor.
    """
    moved = _moved(pattern, _slope(model, images, wanted, pattern, room), room.radius)
    energy = moved.square().sum(0) if moved.ndim > 1 else moved.square()
    pixels = energy.numel()
    fewest = max(1, round(share * pixels))
    keep = torch.zeros_like(energy).flatten()
    keep[energy.flatten().topk(round(fewest * (pixels / fewest) ** left)).indices] = 1
    # No image can change by more.
    span = room.high - room.low
    kept: Tensor = torch.minimum(torch.maximum(moved * keep.view_as(energy), -span), span)
    return kept


def _slope(model: Model, images: Tensor, wanted: Tensor, pattern: Tensor, room: Room) -> Tensor:
    pattern = pattern.detach().requires_grad_()
    with torch.enable_grad():
        loss = cross_entropy(logits_of(model(room.put(images, pattern))), wanted)
        (slope,) = torch.autograd.grad(loss, pattern)
    return slope


def _moved(pattern: Tensor, slope: Tensor, radius: float) -> Tensor:
    moved: Tensor = pattern.detach() - slope * (_STEP * radius / slope.norm().clamp_min(_TINY))
    return moved


@contextmanager
def watching(model: nn.Module) -> Iterator[None]:
    """The model in eval mode with weights that get no gradients; then as before."""
    modes = {m: m.training for m in model.modules()}
    learning = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)
        for m, training in modes.items():
            m.training = training
