"""Universal perturbations along a backdoor's routes, which a repair trains against. May import: torch, universal, routes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from tacfast.methods.routes import Route
from tacfast.universal import RADIUS, SPARSE_RADIUS, Room, fresh, sparse_step, step

#: Steps whenever a perturbation is used, and before its first use.
_STEPS, _FIRST = 2, 6
#: Perturbations of a route that take turns, short ones before those of few pixels, half of each, and uses after which one is begun anew: a
#: network that met only one would unlearn only one.
_SLOTS, _LIFE = 4, 20
#: Share of the pixels that those of few may change.
_PIXELS = 0.03


class Perturbations:
    """A few universal perturbations along each of some routes, adapted to the network as it changes."""

    def __init__(self, routes: tuple[Route, ...], room: Room, shape: torch.Size, seed: int) -> None:
        self.routes, self.room, self.shape = routes, room, shape
        self.wide = replace(room, radius=room.radius * SPARSE_RADIUS / RADIUS)
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
        begun = pattern is None or self.uses[slot] >= _LIFE
        if begun:
            self.uses[slot] = 0
        adapted = self._few_pixels if slot // len(self.routes) >= _SLOTS // 2 else self._short
        pattern = adapted(None if begun else pattern, model, images, route.wanted[labels])
        self.patterns[slot], self.uses[slot] = pattern, self.uses[slot] + 1
        return self.room.put(images, pattern)

    def _short(self, pattern: Tensor | None, model: nn.Module, images: Tensor, wanted: Tensor) -> Tensor:
        """Adapted, or a new one for None."""
        steps = _STEPS if pattern is not None else _FIRST
        if pattern is None:
            pattern = fresh(self.shape, self.room, self.generator).to(images)
        for _ in range(steps):
            pattern = step(model, images, wanted, pattern, self.room)
        return pattern

    def _few_pixels(self, pattern: Tensor | None, model: nn.Module, images: Tensor, wanted: Tensor) -> Tensor:
        """Adapted, or a new one for None, which starts from all pixels."""
        ways = [0.0] * _STEPS if pattern is not None else [1 - (n + 1) / (_FIRST - 1) for n in range(_FIRST - 1)] + [0.0]
        if pattern is None:
            pattern = torch.zeros(self.shape).to(images)
        for left in ways:
            pattern = sparse_step(model, images, wanted, pattern, self.wide, _PIXELS, left)
        return pattern
