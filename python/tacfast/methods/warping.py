"""Smooth warping of images, differentiable in the shifts. May import: torch.

Made of plain indexing: not every device that torch trains on has the gradient of `grid_sample`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def warped(images: Tensor, shifts: Tensor) -> Tensor:
    """Images whose pixels are fetched from elsewhere, bilinearly, from no farther than the edge. Gradients flow into the shifts.

    Args:
        images: float32 or wider (n, channels, H, W).
        shifts: as `images` (2, rows, columns), how far to fetch, downwards and to the right, as shares of the image's side, on a lattice
            over the whole image; between its points bicubic.
    """
    height, width = images.shape[2:]
    tall, broad = (_spread(*sizes).to(shifts) for sizes in zip((height, width), shifts.shape[1:], strict=True))
    # Sums, not matrix products, which autocast would round.
    down, along = ((tall[:, :, None] * shifts[:, None]).sum(2)[:, :, None] * broad).sum(3)
    above, below, lower = _between(torch.arange(height)[:, None].to(down) + height * down, height)
    left, right, further = _between(torch.arange(width).to(along) + width * along, width)
    upper_row = torch.lerp(images[:, :, above, left], images[:, :, above, right], further)
    lower_row = torch.lerp(images[:, :, below, left], images[:, :, below, right], further)
    return torch.lerp(upper_row, lower_row, lower)


def _spread(size: int, points: int) -> Tensor:
    """(size, points): from values at points to values at pixels."""
    return F.interpolate(torch.eye(points)[None, None], size=(size, points), mode="bicubic", align_corners=True)[0, 0]


def _between(where: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two pixels that each place lies between, of `size`, and the share of the second."""
    where = where.clamp(0, size - 1)
    # Shifts that diverged make images of NaN, not an index out of bounds.
    first = where.detach().nan_to_num().floor().long()
    return first, (first + 1).clamp_max(size - 1), where - first
