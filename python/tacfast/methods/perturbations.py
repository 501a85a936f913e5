"""Perturbations of the input that send every image along a backdoor's route. May import: torch, routes, heads.

A trigger works on (nearly) every image, so a backdoored network is open to *universal* perturbations towards its target: one small pattern,
added to any image, has the effect of the trigger, even where the trigger itself is no pattern. They are to the input what s_p is to the
latents, and found by projected gradient steps (universal perturbations: Moosavi-Dezfooli et al. 2017, CVPR).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tacfast.heads import logits_of
from tacfast.methods.routes import Route

#: Length of a perturbation, relative to the mean distance of an image from the mean image.
RADIUS = 0.15
#: Length of a gradient step, relative to the radius.
_STEP = 0.3
#: Steps whenever a perturbation is used, and before its first use.
_STEPS, _FIRST = 2, 6
#: Perturbations of a route that take turns, and uses after which one is begun anew: a network that met only one would unlearn only one.
_SLOTS, _LIFE = 4, 20


@dataclass(frozen=True)
class Room:
    """Where stamped images may lie: each channel's range over the clean images, and the longest perturbation."""

    low: Tensor
    high: Tensor
    radius: float

    @classmethod
    def of(cls, images: Tensor) -> Room:
        """From all clean images (n, ...), as they are shown to the network."""
        over = [d for d in range(images.ndim) if d != 1]
        spread = (images - images.mean(0)).flatten(1).norm(dim=1).mean()
        return cls(images.amin(over, keepdim=True)[0], images.amax(over, keepdim=True)[0], RADIUS * float(spread))

    def put(self, images: Tensor, pattern: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(images + pattern, self.low), self.high)

    def to(self, device: torch.device) -> Room:
        return Room(self.low.to(device), self.high.to(device), self.radius)


class Perturbations:
    """A few universal perturbations along each of some routes, adapted to the network as it changes."""

    def __init__(self, routes: tuple[Route, ...], room: Room, shape: torch.Size, seed: int) -> None:
        self.routes, self.room, self.shape = routes, room, shape
        self.generator = torch.Generator().manual_seed(seed)
        self.patterns: list[Tensor | None] = [None] * (len(routes) * _SLOTS)
        self.uses = [0] * len(self.patterns)
        self.turn = 0

    def stamp(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Images under the perturbations whose turn it is: an equal share of the batch for each route, four routes at a time.

        The model must be in eval mode; its weights get no gradients.
        """
        count = min(len(self.routes), _SLOTS)
        stamped = []
        for share, part in enumerate(torch.arange(len(images)).tensor_split(count)):
            if len(part):
                slot = (self.turn + share) % len(self.patterns)
                stamped.append(self._use(slot, model, images[part], labels[part]))
        self.turn = (self.turn + count) % len(self.patterns)
        return torch.cat(stamped)

    def _use(self, slot: int, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        route, pattern = self.routes[slot % len(self.routes)], self.patterns[slot]
        steps = _STEPS
        if pattern is None or self.uses[slot] >= _LIFE:
            pattern, self.uses[slot], steps = fresh(self.shape, self.room, self.generator).to(images), 0, _FIRST
        wanted = route.wanted[labels]
        for _ in range(steps):
            pattern = step(model, images, wanted, pattern, self.room)
        self.patterns[slot], self.uses[slot] = pattern, self.uses[slot] + 1
        return self.room.put(images, pattern)


def fresh(shape: torch.Size, room: Room, generator: torch.Generator) -> Tensor:
    """A random pattern, as long as one step."""
    noise = torch.randn(shape, generator=generator)
    pattern: Tensor = noise * (_STEP * room.radius / noise.norm())
    return pattern


def step(model: nn.Module, images: Tensor, wanted: Tensor, pattern: Tensor, room: Room) -> Tensor:
    """One step of normalised length towards the wanted classes, projected onto the ball."""
    pattern = pattern.detach().requires_grad_()
    with torch.enable_grad():
        loss = cross_entropy(logits_of(model(room.put(images, pattern))), wanted)
        (slope,) = torch.autograd.grad(loss, pattern)
    moved = pattern.detach() - slope * (_STEP * room.radius / slope.norm().clamp_min(1e-12))
    shortened: Tensor = moved * (room.radius / moved.norm()).clamp_max(1.0)
    return shortened


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
