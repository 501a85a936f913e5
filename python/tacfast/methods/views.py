"""Other views of the clean images, which a repair trains on as well. May import: torch, training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tacfast.methods.training import Job, accuracy

#: Loss of accuracy on mirrored images up to which a network is taken for one that was trained on them.
_MIRROR_LOSS = 0.02


@dataclass(frozen=True, eq=False)
class Views:
    """Moves every image by up to a sixteenth of its size, the border reflected, and mirrors half of them if it may."""

    mirrored: bool
    generator: torch.Generator

    def __call__(self, images: Tensor) -> Tensor:
        if images.ndim != 4:
            return images
        count, _, height, width = images.shape
        rows, columns = (self._moved(count, size) for size in (height, width))
        if self.mirrored:
            turned = torch.rand(count, generator=self.generator) < 0.5
            columns = torch.where(turned[:, None], columns.flip(1), columns)
        up, left = height // 16, width // 16
        padded = pad(images, (left, left, up, up), mode="reflect").permute(0, 2, 3, 1)
        where = torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
        return padded[tuple(index.to(images.device) for index in where)].permute(0, 3, 1, 2).contiguous()

    def _moved(self, count: int, size: int) -> Tensor:
        """int64 (count, size): which of the padded pixels each image shows."""
        by = torch.randint(0, 2 * (size // 16) + 1, (count,), generator=self.generator)
        return by[:, None] + torch.arange(size)


def bears_mirrors(model: nn.Module, job: Job) -> bool:
    """Whether a network in eval mode is nearly as accurate on mirrored clean images: cats may be mirrored, digits and traffic signs not."""
    if job.images.ndim != 4:
        return False
    return accuracy(model, job, job.train, mirrored=True) >= accuracy(model, job, job.train) - _MIRROR_LOSS
