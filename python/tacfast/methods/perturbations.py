"""Universal perturbations along a backdoor's routes, which a repair trains against. May import: torch, universal, routes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tacfast.methods.routes import Route
from tacfast.universal import Room, fresh, step

#: Steps whenever a perturbation is used, and before its first use.
_STEPS, _FIRST = 2, 6
#: Perturbations of a route that take turns, and uses after which one is begun anew: a network that met only one would unlearn only one.
_SLOTS, _LIFE = 4, 20


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
