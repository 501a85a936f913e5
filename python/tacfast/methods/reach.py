"""How far a backdoor's route is still open from the input. May import: torch, training, universal, precision, routes, heads."""

from __future__ import annotations

import torch
from torch import nn

from tacfast.heads import choose_device, logits_of
from tacfast.methods.routes import Route
from tacfast.methods.training import Job, wide
from tacfast.precision import mixed_precision
from tacfast.universal import Room, fresh, step, watching

#: Gradient steps of a perturbation, images of a step, perturbations of a route.
_STEPS, _BATCH, _TRIALS = 30, 48, 2
_FORWARD = 250


def reach(model: nn.Module, job: Job) -> float | None:
    """The share of held-out images that one universal perturbation sends along the route, of the worst route.

    The perturbation is made anew, on the training images, the best of two; its length is that of `unlearn`. A backdoor is a pattern that
    works on every image, so near 1 one may still be there, however normal the norms look; a class that nobody attacked has about a half.
    None where no held-out image belongs to another class than it is sent to.
    """
    where = choose_device(model, job.device)
    model.to(where)
    room = Room.of(wide(job.images)).to(where)
    with watching(model), mixed_precision(where, model):
        found = [_open(model, job, route, room, trial) for route in job.routes for trial in range(_TRIALS)]
    return max((share for share in found if share is not None), default=None)


def _open(model: nn.Module, job: Job, route: Route, room: Room, trial: int) -> float | None:
    where = room.low.device
    movable = job.held[route.wanted[job.labels[job.held]] != job.labels[job.held]]
    if not len(movable):
        return None
    generator = torch.Generator().manual_seed(job.seed + trial)
    pattern = fresh(job.images.shape[1:], room.radius, generator).to(where)
    for _ in range(_STEPS):
        index = job.train[torch.randint(len(job.train), (_BATCH,), generator=generator)]
        pattern = step(model, wide(job.images[index]).to(where), route.wanted[job.labels[index]].to(where), pattern, room)
    reached = 0
    with torch.no_grad():
        for index in movable.split(_FORWARD):
            answers = logits_of(model(room.put(wide(job.images[index]).to(where), pattern))).argmax(1).cpu()
            reached += int((answers == route.wanted[job.labels[index]]).sum())
    return reached / len(movable)
