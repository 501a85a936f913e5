"""Data sets of the calibration: arrays in memory, and what of the test images the defender holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from recipe import Schedule
from torch import Tensor

from tacfast.files import read_npz

#: Clean images that the scan sees; the rest of the test images measures accuracy and ASR.
DEFENDER = 2500

SCHEDULES = {
    "cifar10": Schedule(epochs=14, flip=True, crop=4),
    "gtsrb": Schedule(epochs=10, flip=False, crop=2),
    "tinyimagenet": Schedule(epochs=8, flip=True, crop=4, batch=64),
    "digits": Schedule(epochs=20, flip=False, crop=1, batch=64),
}
#: For data sets without a line above.
USUAL = Schedule(epochs=15, flip=True, crop=4)


@dataclass(frozen=True, eq=False)
class Data:
    """Images uint8 (n, channels, H, W), labels int64 (n,)."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def classes(self) -> int:
        return int(self.y_train.max()) + 1

    @property
    def side(self) -> int:
        """Of the images, in pixels: the shorter one."""
        return min(self.x_train.shape[2:])

    @property
    def schedule(self) -> Schedule:
        return SCHEDULES.get(self.name, USUAL)

    def split(self, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Test images, float32 in [0, 1], and labels: the defender's, at most half of all, and the rest."""
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(self.x_test)))
        held = min(DEFENDER, len(order) // 2)
        parts = order[:held], order[held:]
        mine, rest = ((self.x_test[part].float() / 255, self.y_test[part]) for part in parts)
        return mine, rest


def read(name: str, path: str) -> Data:
    """A data set from an .npz with x_train, y_train, x_test, y_test; images uint8 (n, H, W, channels). The path `digits` stands for the
    digits of scikit-learn, a smoke test."""
    if path == "digits":
        return _digits(name)
    arrays, _ = read_npz(Path(path))
    parts = [arrays[key] for key in ("x_train", "y_train", "x_test", "y_test")]
    x_train, y_train, x_test, y_test = (torch.from_numpy(np.ascontiguousarray(a)) for a in parts)
    return Data(name, _planes(x_train), y_train.long(), _planes(x_test), y_test.long())


def _planes(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 (n, H, W, channels), got {images.dtype} {tuple(images.shape)}")
    return images.permute(0, 3, 1, 2).contiguous()


def _digits(name: str) -> Data:
    """1797 images of 16 x 16 pixels, enlarged so that a patch covers little of them."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.images))
    x = (torch.from_numpy(found.images[order]).float()[:, None] * (255 / 16)).to(torch.uint8)
    x, y = x.repeat_interleave(2, 2).repeat_interleave(2, 3), torch.from_numpy(found.target[order]).long()
    return Data(name, x[:1000], y[:1000], x[1000:], y[1000:])
