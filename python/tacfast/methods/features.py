"""What inner layers say of clean images, which a repair keeps. May import: torch, inner, training.

A network's answer to an image is a few numbers, one a class; what its inner layers say of it is thousands. So a few hundred clean images
hold a network much better by these than by its answers alone (hints: Romero et al. 2015, arXiv:1412.6550). They hold no backdoor: no image
has the trigger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tacfast.methods.inner import Site
from tacfast.methods.training import wide


class Features:
    """Compares what the sites of a network say of some images with what the same layers of its teacher, a copy, said of them before."""

    def __init__(self, model: nn.Module, teacher: nn.Module, sites: Sequence[Site]) -> None:
        same = dict(zip(model.modules(), teacher.modules(), strict=True))
        self.teachers = {site: same[site.module] for site in sites}
        self.wanted: dict[Site, Tensor] = {}

    @contextmanager
    def taught(self) -> Iterator[None]:
        """While this lasts, what the teacher says is kept."""

        def keep(site: Site, output: Tensor) -> None:
            # A copy, as the next layer may change it in place.
            self.wanted[site] = output.clone()

        with _seen({layer: partial(keep, site) for site, layer in self.teachers.items()}):
            yield

    @contextmanager
    def compared(self) -> Iterator[list[Tensor]]:
        """While this lasts, filled with one number for each site that runs: the squared distance of what it says, of the first images of
        the batch, from what the teacher said of them, relative to the site's spread; the mean over images."""
        distances: list[Tensor] = []

        def compare(site: Site, output: Tensor) -> None:
            wanted = self.wanted.pop(site, None)
            if wanted is not None:
                apart = wide(output[: len(wanted)]) - wide(wanted)
                distances.append(apart.flatten(1).square().sum(1).mean() / site.spread**2)

        with _seen({site.module: partial(compare, site) for site in self.teachers}):
            yield distances


def mean_of(distances: Sequence[Tensor]) -> Tensor:
    """Zero of none."""
    return torch.stack(list(distances)).mean() if distances else torch.zeros(())


@contextmanager
def _seen(by: Mapping[nn.Module, Callable[[Tensor], None]]) -> Iterator[None]:
    """While this lasts, functions are shown what layers say whenever they run."""

    def hook(see: Callable[[Tensor], None], _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        see(output)

    hooks = [layer.register_forward_hook(partial(hook, see)) for layer, see in by.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
