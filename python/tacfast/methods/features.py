"""What inner layers say of clean images, which a repair keeps and teaches of perturbed ones. May import: torch, inner, training.

A network's answer to an image is a few numbers, one a class; what its inner layers say of it is thousands. So a few hundred clean images
hold a network much better by these than by its answers alone, and tell it better what a perturbed image should look like (hints: Romero et
al. 2015, arXiv:1412.6550). They hold no backdoor: no image has the trigger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from tacfast.methods.inner import Site
from tacfast.methods.training import wide

#: Layers that are compared. All of them took longer and removed no more (docs/repair-choices.md).
_LAYERS = 3


def spread_out(sites: Sequence[Site], count: int = _LAYERS) -> list[Site]:
    """Some of a network's sites, evenly spread, the last one among them."""
    count = min(count, len(sites))
    return [sites[round((i + 1) * len(sites) / count) - 1] for i in range(count)]


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
        """While this lasts, filled with a tensor (k,) for each site that runs on k times the images that the teacher was shown: for each
        time the squared distance of what the site says from what the teacher said, relative to the site's spread; the mean over images."""
        distances: list[Tensor] = []

        def compare(site: Site, output: Tensor) -> None:
            wanted = self.wanted.pop(site, None)
            # Some networks leave tokens out in training.
            if wanted is not None and output.shape[1:] == wanted.shape[1:]:
                apart = wide(output).unflatten(0, (-1, len(wanted))) - wide(wanted)
                distances.append(apart.flatten(2).square().sum(2).mean(1) / site.spread**2)

        with _seen({site.module: partial(compare, site) for site in self.teachers}):
            yield distances


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
