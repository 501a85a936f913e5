"""Perturbations of inner layers along a backdoor's routes, which a repair trains against. May import: torch, heads, routes, universal.

Some triggers differ from image to image; no pattern of the input stands for all of them. What they have in common shows further in: the
channels in which the network notices them. A universal perturbation of an inner layer's output, one number a channel, is to that layer
what s_p is to the last one (latent adversarial training: Casper et al. 2024, arXiv:2403.05030; universal, in the embedding of language
models: Zeng et al. 2024, arXiv:2406.17092).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tacfast.heads import logits_of
from tacfast.methods.routes import Route
from tacfast.universal import follow, fresh

#: Length of a perturbation, relative to the mean distance of an output from the mean output.
_RADIUS = 0.5
#: Steps whenever a perturbation is used, and before its first use; uses after which one is begun anew.
_STEPS, _FIRST, _LIFE = 2, 6, 20

#: Images that tell how far apart what a layer says of them is.
SIZED_ON = 100
#: Relative spread of an output below which it is the same for all images.
_ROUNDING = 1e-5

#: Where perturbations are added: behind every layer of the first of these kinds that the model has.
_KINDS: tuple[tuple[type[nn.Module], ...], ...] = (
    (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    (nn.Linear,),
)


@dataclass(frozen=True, eq=False)
class Site:
    """A layer behind which something is added."""

    module: nn.Module
    #: Of a perturbation: one number a channel, the same wherever in the image and for all images.
    shape: tuple[int, ...]
    #: Length of a perturbation at most.
    radius: float
    #: Mean distance of an output from the mean output.
    spread: float


def sites_of(model: nn.Module, images: Tensor, head: nn.Module) -> list[Site]:
    """The inner layers of a model in eval mode that perturbations can be added behind, by running it on some images.

    Normalisation layers, or where there are none convolutions, or linear layers. The head is none of them, nor is a layer that runs
    more than once, whose output is not one tensor with a row an image, or that the logits do not depend on.
    """
    own = set(head.modules())
    for kinds in _KINDS:
        sites = _working(model, images, [m for m in model.modules() if isinstance(m, kinds) and m not in own])
        if sites:
            return sites
    return []


def _working(model: nn.Module, images: Tensor, layers: list[nn.Module]) -> list[Site]:
    """Those of some layers that can be sites."""
    found: dict[nn.Module, list[tuple[Site, Tensor] | None]] = {layer: [] for layer in layers}

    def see(module: nn.Module, _: Any, output: Any) -> Any:
        site = _site(module, output) if isinstance(output, Tensor) and output.ndim > 1 and len(output) == len(images) else None
        if site is None:
            found[module].append(None)
            return output
        # Nothing is added, but the gradient tells whether something would matter.
        nothing = torch.zeros(site.shape, dtype=output.dtype, device=output.device, requires_grad=True)
        found[module].append((site, nothing))
        return output + nothing

    hooks = [layer.register_forward_hook(see) for layer in found]
    try:
        with torch.enable_grad():
            total = logits_of(model(images)).sum()
    finally:
        for hook in hooks:
            hook.remove()
    once = [seen[0] for seen in found.values() if len(seen) == 1 and seen[0] is not None]
    if not once or not total.requires_grad:
        return []
    slopes = torch.autograd.grad(total, [nothing for _, nothing in once], allow_unused=True)
    return [site for (site, _), slope in zip(once, slopes, strict=True) if slope is not None]


def _site(module: nn.Module, output: Tensor) -> Site | None:
    """None where the layer says the same of all images, up to rounding."""
    rows = output.detach().flatten(1)
    spread, length = (float(part.norm(dim=1).mean()) for part in (rows - rows.mean(0), rows))
    axis = _channels(module, output)
    shape = tuple(size if a == axis else 1 for a, size in enumerate(output.shape))[1:]
    places = output[0].numel() / output.shape[axis]
    return Site(module, shape, _RADIUS * spread / places**0.5, spread) if spread > _ROUNDING * length else None


def _channels(module: nn.Module, output: Tensor) -> int:
    """The axis of the channels: the last one behind linear layers and most LayerNorms, the second behind all others."""
    normalised = getattr(module, "normalized_shape", None)
    last = isinstance(module, nn.Linear) or (normalised is not None and output.shape[-1] == normalised[-1])
    return output.ndim - 1 if last else 1


@contextmanager
def added(site: Site, pattern: Tensor, first: int = 0) -> Iterator[None]:
    """While this lasts, the model adds a pattern to the site's output, to that of all images from the `first` on."""

    def add(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:first], output[first:] + pattern.to(output.dtype)])

    hook = site.module.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


class InnerPerturbations:
    """Universal perturbations of a model's inner layers along some routes, one for each layer and route, adapted as it changes."""

    def __init__(self, sites: Sequence[Site], routes: tuple[Route, ...], seed: int) -> None:
        self.sites, self.routes = sites, routes
        self.generator = torch.Generator().manual_seed(seed)
        self.patterns: dict[tuple[int, int], Tensor] = {}
        self.uses: dict[tuple[int, int], int] = {}
        self.turn = 0

    def adapt(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Site, Tensor]:
        """The perturbation behind a layer drawn at random, for the route whose turn it is, adapted on a batch.

        The model must be in eval mode; its weights get no gradients.
        """
        place = self.turn % len(self.routes), int(torch.randint(len(self.sites), (), generator=self.generator))
        self.turn += 1
        route, site = self.routes[place[0]], self.sites[place[1]]
        pattern, steps = self.patterns.get(place), _STEPS
        if pattern is None or self.uses[place] >= _LIFE:
            pattern, self.uses[place], steps = fresh(site.shape, site.radius, self.generator).to(images.device), 0, _FIRST
        for _ in range(steps):
            pattern = _step(model, images, route.wanted[labels], site, pattern)
        self.patterns[place] = pattern
        self.uses[place] += 1
        return site, pattern


def _step(model: nn.Module, images: Tensor, wanted: Tensor, site: Site, pattern: Tensor) -> Tensor:
    """One step of normalised length towards the wanted classes, projected onto the ball."""
    pattern = pattern.detach().requires_grad_()
    with torch.enable_grad(), added(site, pattern):
        (slope,) = torch.autograd.grad(cross_entropy(logits_of(model(images)), wanted), pattern)
    return follow(pattern, slope, site.radius)
