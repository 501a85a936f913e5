"""Universal perturbations of the input along a backdoor's routes, which a repair trains against. May import: torch, universal, warping,
routes, heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tacfast.heads import logits_of
from tacfast.methods.routes import Route
from tacfast.methods.warping import warped
from tacfast.universal import RADIUS, SPARSE_RADIUS, Room, follow, fresh, sparse_step

#: Steps whenever a perturbation is used, and before its first use; uses after which one is begun anew: a network that met only one would
#: unlearn only one.
_STEPS, _FIRST, _LIFE = 2, 6, 20
#: Largest root mean square of a warping's shifts, as a share of the image's side; points of their lattice, along each axis.
_SHIFT, _LATTICE = 0.02, 5
#: Share of the pixels that a pattern of few may change.
_PIXELS = 0.03


class Perturbation(ABC):
    """One perturbation, the same for all images, adapted to the network as that changes."""

    uses = 0

    def stamp(self, model: nn.Module, images: Tensor, wanted: Tensor) -> Tensor:
        """Adapt it towards the wanted classes (n,) of some images (n, ...); returns these images under it."""
        begun = [1 - (n + 1) / (_FIRST - 1) for n in range(_FIRST - 1)] + [0.0]
        for left in [0.0] * _STEPS if self.uses else begun:
            self.step(model, images, wanted, left)
        self.uses += 1
        return self.put(images)

    @abstractmethod
    def step(self, model: nn.Module, images: Tensor, wanted: Tensor, left: float) -> None:
        """One step; `left` is what is left of the first ones, from nearly 1 down to 0."""

    @abstractmethod
    def put(self, images: Tensor) -> Tensor:
        """The images under it."""


class Short(Perturbation):
    """A short pattern, spread over the image."""

    def __init__(self, shape: torch.Size, room: Room, generator: torch.Generator) -> None:
        self.room, self.radii = room, [room.radius]
        self.parts = [fresh(shape, room.radius, generator).to(room.low)]

    def step(self, model: nn.Module, images: Tensor, wanted: Tensor, left: float) -> None:
        parts = self.parts = [part.requires_grad_() for part in self.parts]
        with torch.enable_grad():
            slopes = torch.autograd.grad(cross_entropy(logits_of(model(self.put(images))), wanted), parts)
        self.parts = [follow(*each) for each in zip(parts, slopes, self.radii, strict=True)]

    def put(self, images: Tensor) -> Tensor:
        pattern, *shifts = self.parts
        return self.room.put(warped(images, *shifts) if shifts else images, pattern)


class Warping(Short):
    """A short pattern on the image slightly and smoothly warped, where it has height and width. What a warping trigger changes (WaNet:
    Nguyen & Tran 2021, arXiv:2102.10369) is next to nothing in the mean over images: patterns alone leave some of it."""

    def __init__(self, shape: torch.Size, room: Room, generator: torch.Generator) -> None:
        super().__init__(shape, room, generator)
        if len(shape) == 3:
            lattice = torch.Size((2, _LATTICE, _LATTICE))
            self.radii.append(_SHIFT * lattice.numel() ** 0.5)
            self.parts.append(fresh(lattice, self.radii[1], generator).to(room.low))


class FewPixels(Perturbation):
    """A pattern of few pixels and any strength, as patches are. It starts from all pixels."""

    def __init__(self, shape: torch.Size, room: Room, generator: torch.Generator) -> None:
        self.room = replace(room, radius=room.radius * SPARSE_RADIUS / RADIUS)
        self.pattern = torch.zeros(shape).to(room.low)

    def step(self, model: nn.Module, images: Tensor, wanted: Tensor, left: float) -> None:
        self.pattern = sparse_step(model, images, wanted, self.pattern, self.room, _PIXELS, left)

    def put(self, images: Tensor) -> Tensor:
        return self.room.put(images, self.pattern)


#: Of each route, in this order; they take turns.
_KINDS: tuple[type[Short] | type[FewPixels], ...] = (Warping, Short, FewPixels, FewPixels)


class Perturbations:
    """A few universal perturbations along each of some routes. `room` is of RADIUS, `shape` that of an image."""

    def __init__(self, routes: tuple[Route, ...], room: Room, shape: torch.Size, seed: int) -> None:
        self.room, self.shape = room, shape
        self.places = list(product(_KINDS, routes))
        self.slots: list[Perturbation | None] = [None] * len(self.places)
        self.together, self.turn = min(len(routes), len(_KINDS)), 0
        self.generator = torch.Generator().manual_seed(seed)

    def stamp(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Images under the perturbations whose turn it is: an equal share of the batch for each route, four routes at a time.

        The model must be in eval mode; its weights get no gradients.
        """
        stamped = []
        for share, part in enumerate(torch.arange(len(images)).tensor_split(self.together)):
            if len(part):
                slot = (self.turn + share) % len(self.slots)
                _, route = self.places[slot]
                stamped.append(self._kept(slot).stamp(model, images[part], route.wanted[labels[part]]))
        self.turn = (self.turn + self.together) % len(self.slots)
        return torch.cat(stamped)

    def _kept(self, slot: int) -> Perturbation:
        """A slot's perturbation, or a new one in its place."""
        kept = self.slots[slot]
        if kept is None or kept.uses >= _LIFE:
            kept = self.slots[slot] = self.places[slot][0](self.shape, self.room, self.generator)
        return kept
