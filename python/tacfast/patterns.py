"""How far a short pattern of the input goes towards each class. May import: torch, universal, precision, heads, openness, progress, errors.

A backdoor opens a way from the input that no clean class has: one small pattern that sends any image to the target (Wang et al. 2019,
S&P, "Neural Cleanse"; Moosavi-Dezfooli et al. 2017, CVPR). Each class gets two patterns, of a fixed small size and by a fixed number of
gradient steps, and what is compared is how far they go, not how large a pattern must be: that would take a search for each class. Triggers
that are spread over the image (Blend, WaNet, LIRA) have a short pattern near by, patches (BadNets) one of few pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tacfast.heads import evaluating, logits_of
from tacfast.openness import FEW_PIXELS, SHORT, Patterns
from tacfast.precision import mixed_precision
from tacfast.progress import track
from tacfast.universal import SPARSE_RADIUS, Room, fresh, sparse_step, step, watching

#: Images that are asked for: half of them make the patterns, half measure them.
IMAGES = 400
#: With fewer, what a pattern does says more about the images than about the class.
FEWEST_IMAGES = 50
#: Length of a short pattern, relative to the mean distance of an image from the mean image.
_LENGTH = 0.05
#: Share of the pixels that the other pattern may change.
_PIXELS = 0.01
_STEPS, _BATCH = {SHORT: 12, FEW_PIXELS: 16}, 32
#: Of the steps, those in which the pixels become few.
_THINNING = 0.7
_FORWARD = 250


def passes(classes: int, images: int) -> int:
    """Passes of one image, forward or backward, that `measure` takes."""
    return classes * sum(3 * steps * _BATCH + images // 2 for steps in _STEPS.values())


def measure(
    model: nn.Module, images: Tensor, classes: NDArray[np.int64], *, device: torch.device, seed: int = 0, progress: bool = False
) -> Patterns:
    """Make the patterns of some classes and measure them on other images.

    Args:
        model: from images to logits. Left as found.
        images: floating point (n, ...), n >= FEWEST_IMAGES, as the model expects them.
        classes: int64 (m,).
        seed: of the start and the batches, which are the same for all classes.

    Returns:
        Margins: the mean, over the images that the model does not call k by itself, of the logit of k minus the largest other one.
    """
    given = images.dtype
    # Lengths of patterns would overflow in half precision.
    images = images if given == torch.float64 else images.float()

    def run(batch: Tensor) -> Tensor:
        return logits_of(model(batch.to(given)))

    making, measured = images[: len(images) // 2], images[len(images) // 2 :]
    faster = mixed_precision(device) if given == torch.float32 else nullcontext()
    with evaluating(model, device), watching(model), faster:
        before = torch.cat([run(part.to(device)).argmax(1).cpu() for part in measured.split(_FORWARD)])
        makers = {SHORT: _short(images, seed, device), FEW_PIXELS: _few_pixels(images, device)}
        margins: dict[str, list[float]] = {kind: [] for kind in makers}
        order = torch.Generator().manual_seed(seed)
        batches = [making[torch.randint(len(making), (_BATCH,), generator=order)] for _ in range(max(_STEPS.values()))]
        for k in track(classes.tolist(), "patterns", shown=progress, total=len(classes)):
            for kind, (room, make) in makers.items():
                pattern = make(run, batches[: _STEPS[kind]], k)
                margins[kind].append(_margin(run, measured[before != k], pattern, room, k))
    return Patterns(classes, {kind: np.array(values) for kind, values in margins.items()})


_Run = Callable[[Tensor], Tensor]
_Maker = Callable[[_Run, list[Tensor], int], Tensor]


def _short(images: Tensor, seed: int, device: torch.device) -> tuple[Room, _Maker]:
    room = Room.of(images, _LENGTH).to(device)
    start = fresh(images.shape[1:], room.radius, torch.Generator().manual_seed(seed)).to(room.low)

    def make(run: _Run, batches: list[Tensor], k: int) -> Tensor:
        pattern = start
        for batch in batches:
            pattern = step(run, batch.to(device), _all(k, batch, device), pattern, room)
        return pattern

    return room, make


def _few_pixels(images: Tensor, device: torch.device) -> tuple[Room, _Maker]:
    room = Room.of(images, SPARSE_RADIUS).to(device)

    def make(run: _Run, batches: list[Tensor], k: int) -> Tensor:
        pattern = torch.zeros(images.shape[1:], dtype=images.dtype, device=device)
        for number, batch in enumerate(batches):
            left = max(0.0, 1 - (number + 1) / (_THINNING * len(batches)))
            pattern = sparse_step(run, batch.to(device), _all(k, batch, device), pattern, room, _PIXELS, left)
        return pattern

    return room, make


def _all(k: int, batch: Tensor, device: torch.device) -> Tensor:
    return torch.full((len(batch),), k, device=device)


@torch.no_grad()
def _margin(run: _Run, images: Tensor, pattern: Tensor, room: Room, k: int) -> float:
    """NaN without images."""
    if len(images) == 0:
        return float("nan")
    found = []
    for part in images.split(_FORWARD):
        logits = run(room.put(part.to(pattern.device), pattern)).float()
        wanted = logits[:, k].clone()
        logits[:, k] = -torch.inf
        found.append(wanted - logits.amax(1))
    return float(torch.cat(found).mean())
