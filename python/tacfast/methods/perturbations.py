"""Universal perturbations of the input along a backdoor's routes, which a repair trains against. May import: torch, universal, warping,
routes, heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

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
#: Root mean square of a warping's shifts, along each axis, as a share of the image's side; points of their lattice, along each.
_SHIFT, _LATTICE = 0.02, 5
#: Share of the pixels that one of few may change.
_PIXELS = 0.03


class Perturbation(ABC):
    """One perturbation, the same for all images, adapted to the network as that changes."""

    uses = 0

    @abstractmethod
    def adapt(self, model: nn.Module, images: Tensor, wanted: Tensor) -> Tensor:
        """A few steps towards the wanted classes of some images (n, ...); returns these images under it."""


class Short(Perturbation):
    """A short pattern, spread over the image."""

    def __init__(self, shape: torch.Size, room: Room, generator: torch.Generator) -> None:
        self.room, self.radii = room, [room.radius]
        self.parts = [fresh(shape, room.radius, generator).to(room.low)]

    def adapt(self, model: nn.Module, images: Tensor, wanted: Tensor) -> Tensor:
        for _ in range(_STEPS if self.uses else _FIRST):
            parts = [part.detach().requires_grad_() for part in self.parts]
            with torch.enable_grad():
                loss = cross_entropy(logits_of(model(self._put(images, *parts))), wanted)
                slopes = torch.autograd.grad(loss, parts)
            self.parts = [follow(*each) for each in zip(parts, slopes, self.radii, strict=True)]
        return self._put(images, *self.parts)

    def _put(self, images: Tensor, pattern: Tensor, *shifts: Tensor) -> Tensor:
        return self.room.put(warped(images, *shifts) if shifts else images, pattern)


class Warping(Short):
    """A short pattern on the image slightly and smoothly warped, where it has pixels. What a warping trigger changes (WaNet: Nguyen & Tran
    2021, arXiv:2102.10369) is next to nothing in the mean over images, so no pattern stands for it."""

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

    def adapt(self, model: nn.Module, images: Tensor, wanted: Tensor) -> Tensor:
        ways = [0.0] * _STEPS if self.uses else [1 - (n + 1) / (_FIRST - 1) for n in range(_FIRST - 1)] + [0.0]
        for left in ways:
            self.pattern = sparse_step(model, images, wanted, self.pattern, self.room, _PIXELS, left)
        return self.room.put(images, self.pattern)


#: Of each route, in this order; they take turns.
_KINDS: tuple[type[Short] | type[FewPixels], ...] = (Warping, Short, FewPixels, FewPixels)


class Perturbations:
    """A few universal perturbations along each of some routes. `room` is of RADIUS, `shape` that of an image."""

    def __init__(self, routes: tuple[Route, ...], room: Room, shape: torch.Size, seed: int) -> None:
        self.routes, self.room, self.shape = routes, room, shape
        self.generator = torch.Generator().manual_seed(seed)
        self.slots: list[Perturbation | None] = [None] * (len(routes) * len(_KINDS))
        self.turn = 0

    def stamp(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Images under the perturbations whose turn it is: an equal share of the batch for each route, four routes at a time.

        The model must be in eval mode; its weights get no gradients.
        """
        count = min(len(self.routes), len(_KINDS))
        stamped = []
        for share, part in enumerate(torch.arange(len(images)).tensor_split(count)):
            if len(part):
                kind, route = divmod((self.turn + share) % len(self.slots), len(self.routes))
                wanted = self.routes[route].wanted[labels[part]]
                stamped.append(self._use(kind, route, model, images[part], wanted))
        self.turn = (self.turn + count) % len(self.slots)
        return torch.cat(stamped)

    def _use(self, kind: int, route: int, model: nn.Module, images: Tensor, wanted: Tensor) -> Tensor:
        slot = kind * len(self.routes) + route
        kept = self.slots[slot]
        if kept is None or kept.uses >= _LIFE:
            kept = self.slots[slot] = _KINDS[kind](self.shape, self.room, self.generator)
        stamped = kept.adapt(model, images, wanted)
        kept.uses += 1
        return stamped
