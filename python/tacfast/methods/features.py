"""What inner layers say of clean images, which a repair keeps. May import: torch, inner, training.

A network's answer to an image is a few numbers, one a class; what its inner layers say of it is thousands. So a few hundred clean images
hold a network much better by these than by its answers alone (hints: Romero et al. 2015, arXiv:1412.6550). They hold no backdoor: no image
has the trigger.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tacfast.methods.inner import Site
from tacfast.methods.training import wide

#: What each of some layers said last, gradients and all; nothing of those that did not run.
Outputs = Mapping[nn.Module, Tensor]


@contextmanager
def outputs_of(layers: Iterable[nn.Module], images: int) -> Iterator[Outputs]:
    """While this lasts, filled whenever the layers run, with what they say of the first images of a batch."""
    latest: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: Any, output: Tensor) -> None:
        # A copy, as the next layer may change it in place.
        latest[module] = output[:images].clone()

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield latest
    finally:
        for hook in hooks:
            hook.remove()


def feature_loss(said: Outputs, wanted: Outputs, teachers: Mapping[Site, nn.Module]) -> Tensor:
    """Squared distance between what sites and their teachers say of the same images, relative to the site's spread: the mean over images
    and sites."""
    losses = [
        (wide(said[site.module]) - wide(wanted[teacher])).flatten(1).square().sum(1).mean() / site.spread**2
        for site, teacher in teachers.items()
        if site.module in said and teacher in wanted
    ]
    return torch.stack(losses).mean() if losses else torch.zeros(())
