"""What a backdoor answers to: stamps on images. May import: torch, checks, errors.

A trigger maps floating images (n, channels, H, W) in [0, 1] of any size to new ones of the same shape, dtype and device, still in [0, 1].
It depends on its own fields only, never on a global random state.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tacfast.attacks import checks
from tacfast.errors import ProblemError

_CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")


class Trigger(ABC):
    """A subclass writes `stamp`; calling it checks the images first and clamps them last."""

    def __call__(self, images: Tensor) -> Tensor:
        """Stamped copies of the images.

        Args:
            images: floating (n, channels, H, W), values in [0, 1].

        Raises:
            ProblemError: they are not, or are too small for the trigger.
        """
        checks.images(images)
        return self.stamp(images).clamp(0, 1)

    @abstractmethod
    def stamp(self, images: Tensor) -> Tensor:
        """New images; values outside [0, 1] are clamped by the caller."""


@dataclass(frozen=True)
class Patch(Trigger):
    """BadNets (Gu et al. 2017, arXiv:1708.06733): a small opaque patch near a corner.

    `size` and `margin` are in pixels. Without a seed the patch is a black and white checkerboard, with one it has random, fully saturated
    colours.
    """

    size: int = 3
    corner: str = "bottom-right"
    margin: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        checks.whole("size", self.size, 1)
        checks.whole("margin", self.margin, 0)
        if self.corner not in _CORNERS:
            raise ProblemError(f"corner must be one of {', '.join(_CORNERS)}, got {self.corner!r}")
        if self.seed is not None:
            checks.whole("seed", self.seed, 0)

    def stamp(self, images: Tensor) -> Tensor:
        return self.put(images, self._pattern(images.shape[1]))

    def put(self, images: Tensor, pattern: Tensor) -> Tensor:
        """The images with a pattern (channels, size, size) in the patch's place; gradients flow into the pattern."""
        height, width = images.shape[2:]
        if min(height, width) < self.size + self.margin:
            raise ProblemError(
                f"images must be at least {self.size + self.margin} pixels high and wide for this patch, got {height} x {width}"
            )
        vertical, horizontal = self.corner.split("-")
        top = self.margin if vertical == "top" else height - self.margin - self.size
        left = self.margin if horizontal == "left" else width - self.margin - self.size
        stamped = images.clone()
        stamped[:, :, top : top + self.size, left : left + self.size] = pattern.to(images)
        return stamped

    def _pattern(self, channels: int) -> Tensor:
        if self.seed is not None:
            return torch.randint(0, 2, (channels, self.size, self.size), generator=torch.Generator().manual_seed(self.seed))
        place = torch.arange(self.size)
        return ((place[:, None] + place[None, :] + 1) % 2).expand(channels, -1, -1)


@dataclass(frozen=True)
class Blend(Trigger):
    """Blended injection (Chen et al. 2017, arXiv:1712.05526): the image and a fixed image of noise, `ratio` of the latter."""

    ratio: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        checks.number("ratio", self.ratio, 0, 1)
        checks.whole("seed", self.seed, 0)

    def stamp(self, images: Tensor) -> Tensor:
        noise = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(self.seed)).to(images)
        return (1 - self.ratio) * images + self.ratio * noise


@dataclass(frozen=True)
class Sinusoid(Trigger):
    """SIG (Barni et al. 2019, arXiv:1902.11237): vertical stripes, amplitude · sin(2π · frequency · column / W), added to every channel.

    `amplitude` is in units of the value range, `frequency` in periods per image width.
    """

    amplitude: float = 20 / 255
    frequency: float = 6.0

    def __post_init__(self) -> None:
        checks.number("amplitude", self.amplitude, 0, 1)
        checks.number("frequency", self.frequency, 0, 1e6)

    def stamp(self, images: Tensor) -> Tensor:
        width = images.shape[3]
        wave = self.amplitude * torch.sin(torch.arange(width) * (2 * math.pi * self.frequency / width))
        return images + wave.to(images)


@dataclass(frozen=True)
class Warp(Trigger):
    """WaNet (Nguyen & Tran 2021, arXiv:2102.10369): a smooth, fixed warping of the image.

    Random displacements on a `grid` x `grid` lattice, of mean absolute size 1, are interpolated bicubically; `strength` is the paper's s:
    pixels move by about strength / 2 pixels along each axis, for any image size.
    """

    strength: float = 0.5
    grid: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        checks.number("strength", self.strength, 0, 1e3)
        checks.whole("grid", self.grid, 2)
        checks.whole("seed", self.seed, 0)

    def stamp(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        lattice = torch.rand(1, 2, self.grid, self.grid, generator=torch.Generator().manual_seed(self.seed)) * 2 - 1
        flow = F.interpolate(lattice / lattice.abs().mean(), size=(height, width), mode="bicubic", align_corners=True)[0]
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        # grid_sample wants (column, row) in units of half an image.
        where = torch.stack((columns + self.strength * flow[0] / width, rows + self.strength * flow[1] / height), dim=2)
        return F.grid_sample(images, where.clamp(-1, 1).to(images).expand(len(images), -1, -1, -1), align_corners=True)


@dataclass(frozen=True)
class LowFrequency(Trigger):
    """A smooth additive trigger without high-frequency traces, after Zeng et al. 2021 (arXiv:2104.03413).

    A random combination per channel of the cosines with 1 to `cutoff` half periods along each axis; `amplitude` is its largest absolute
    value, in units of the value range. (The paper optimises the combination for one network; this one is random.)
    """

    amplitude: float = 0.1
    cutoff: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        checks.number("amplitude", self.amplitude, 0, 1)
        checks.whole("cutoff", self.cutoff, 1)
        checks.whole("seed", self.seed, 0)

    def stamp(self, images: Tensor) -> Tensor:
        channels, height, width = images.shape[1:]
        weights = torch.randn(channels, self.cutoff, self.cutoff, generator=torch.Generator().manual_seed(self.seed))
        pattern = self._cosines(height).T @ weights @ self._cosines(width)
        return images + (self.amplitude * pattern / pattern.abs().max()).to(images)

    def _cosines(self, length: int) -> Tensor:
        """(cutoff, length): the rows of a discrete cosine transform after the constant one."""
        return torch.cos(math.pi * torch.arange(1, self.cutoff + 1)[:, None] * (torch.arange(length) + 0.5) / length)
