"""Small image classifiers for the calibration: images in [0, 1], float32 (n, channels, H, W), to logits; the last layer is `fc`.

Pre-activation ResNet: He et al. 2016, arXiv:1603.05027. VGG: Simonyan & Zisserman 2015, arXiv:1409.1556, with batch normalisation.
MobileNet: Howard et al. 2017, arXiv:1704.04861. ViT: Dosovitskiy et al. 2021, arXiv:2010.11929, with a mean over tokens.
"""

from __future__ import annotations

import torch
from published import transferred
from torch import Tensor, nn
from torch.nn import functional as F


class PreActBlock(nn.Module):
    """Two normalised, pre-activated 3 x 3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        short = x if self.shortcut is None else self.shortcut(h)
        return short + self.conv2(F.relu(self.norm2(self.conv1(h))))


class Pooled(nn.Module):
    """A body of convolutions, the mean over space, and a linear head."""

    def __init__(self, body: nn.Module, latents: int, classes: int) -> None:
        super().__init__()
        self.body, self.fc = body, nn.Linear(latents, classes)

    def forward(self, x: Tensor) -> Tensor:
        # Roughly standardised, so that a saved model needs no preprocessing but division by 255.
        z: Tensor = self.body((x - 0.5) * 4)
        return self.fc(z.mean((2, 3)))


def resnet(classes: int, *, channels: int = 3, width: int = 32) -> nn.Module:
    """Stem at full resolution, then three stages of pre-activation blocks; 4 x `width` latents."""
    stem = width // 2
    layers: list[nn.Module] = [nn.Conv2d(channels, stem, 3, 1, 1, bias=False)]
    inputs = stem
    for outputs in (width, 2 * width, 4 * width):
        layers += [PreActBlock(inputs, outputs, 2), PreActBlock(outputs, outputs, 1)]
        inputs = outputs
    return Pooled(nn.Sequential(*layers, nn.BatchNorm2d(inputs), nn.ReLU()), inputs, classes)


def _conv(inputs: int, outputs: int, stride: int = 1, *, kernel: int = 3, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def vgg(classes: int, *, channels: int = 3, width: int = 32) -> nn.Module:
    """Convolutions and max pooling, no shortcuts; 4 x `width` latents."""
    layers: list[nn.Module] = [*_conv(channels, width // 2), nn.MaxPool2d(2)]
    inputs = width // 2
    for outputs in (width, 2 * width, 4 * width):
        layers += [*_conv(inputs, outputs), *_conv(outputs, outputs)]
        layers += [nn.MaxPool2d(2)] if outputs < 4 * width else []
        inputs = outputs
    return Pooled(nn.Sequential(*layers), inputs, classes)


def mobilenet(classes: int, *, channels: int = 3, width: int = 32) -> nn.Module:
    """Depthwise-separable convolutions; 8 x `width` latents."""
    layers, inputs = _conv(channels, width), width
    for outputs, stride in ((2 * width, 2), (2 * width, 1), (4 * width, 2), (4 * width, 1), (8 * width, 2), (8 * width, 1)):
        layers += [*_conv(inputs, inputs, stride, groups=inputs), *_conv(inputs, outputs, kernel=1)]
        inputs = outputs
    return Pooled(nn.Sequential(*layers), inputs, classes)


class TransformerBlock(nn.Module):
    """Pre-normalised self-attention and a two-layer perceptron on tokens (n, t, d)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm2, self.mlp = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)
        x = x + self.out(attended)
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patch tokens from two convolutions, transformer blocks, the mean over tokens, and a linear head on `dim` latents."""

    def __init__(self, classes: int, channels: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        # A convolutional stem (Xiao et al. 2021, arXiv:2106.14881): without it a ViT learns little from some ten thousand images.
        self.stem = nn.Sequential(*_conv(channels, dim // 4), *_conv(dim // 4, dim // 2, 2), nn.Conv2d(dim // 2, dim, 2, 2))
        self.place = nn.Parameter(torch.randn(1, dim, 8, 8) * 0.02)
        self.blocks, self.norm = nn.Sequential(*[TransformerBlock(dim, heads) for _ in range(depth)]), nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem((x - 0.5) * 4)
        # Learnt for 32 x 32 images; interpolated for others.
        place = self.place if tokens.shape[2:] == self.place.shape[2:] else F.interpolate(self.place, tokens.shape[2:], mode="bilinear")
        return self.fc(self.norm(self.blocks((tokens + place).flatten(2).transpose(1, 2))).mean(1))


def vit(classes: int, *, channels: int = 3, width: int = 32) -> nn.Module:
    """Three blocks of four heads on 4 x `width` latents."""
    return ViT(classes, channels, 4 * width, depth=3, heads=4)


NETS = {
    "resnet": resnet,
    "resnet-wide": resnet,
    "resnet-short": resnet,
    "resnet-long": resnet,
    "vgg": vgg,
    "mobilenet": mobilenet,
    "vit": vit,
    "lite0": transferred,
}
