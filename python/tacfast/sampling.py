"""An even sample of images that pass by batch after batch. May import: torch."""

from __future__ import annotations

import torch
from torch import Tensor


class Sample:
    """At most so many of all images, each as likely as any other, in the order in which they came: a reservoir, by random keys."""

    def __init__(self, most: int, seed: int = 0) -> None:
        self._most, self._generator = most, torch.Generator().manual_seed(seed)
        self._keys, self._images = torch.zeros(0), torch.zeros(0)
        self._mixed = False

    def add(self, images: Tensor) -> None:
        """Images (n, ...), on any device."""
        if self._most == 0:
            return
        keys = torch.rand(len(images), generator=self._generator)
        if len(self._images) == 0:
            self._images = images[:0].cpu()
        self._mixed |= images.shape[1:] != self._images.shape[1:]
        if self._mixed:
            return
        every = torch.cat([self._keys, keys])
        stay = every.topk(min(self._most, len(every)), largest=False).indices.sort().values
        old, new = stay[stay < len(self._keys)], stay[stay >= len(self._keys)] - len(self._keys)
        self._images = torch.cat([self._images[old], images[new.to(images.device)].cpu()])
        self._keys = every[stay]

    def images(self) -> Tensor | None:
        """What was kept; None if nothing, or if images of several shapes came by."""
        return None if self._mixed or len(self._images) == 0 else self._images
