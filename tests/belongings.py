"""What users have: models in the forms that they come in, clean images, a head; small, for the documentation and the examples."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sources import CASES, make_images
from torch import Tensor, nn

from problems import head_with_a_shortcut

#: By the name that the documentation gives it: library, format and example in `sources.CASES`.
MODELS = {
    "model.pth": ("torchvision", "pth", "resnet18"),
    "vit_folder": ("transformers", "folder", "ViT"),
    "timm_folder": ("timm", "folder", "vit_tiny_patch16_224"),
    "shufflenet.pth": ("torchvision", "pth in a training checkpoint", "shufflenet_v2_x0_5"),
    "attack_result.pt": ("BackdoorBench", "attack_result.pt", "preactresnet18"),
}
NETWORK = """
from torch import nn

def build(classes):
    return nn.Sequential(nn.Conv2d(3, 64, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
"""


def saved(name: str, place: Path, images: Path) -> Path:
    """A model of `MODELS` under its name in `place`; its last layer fits the images."""
    (folder := place / "made" / name).mkdir(parents=True)
    case = next(c for c in CASES if (c.source, c.format, c.example) == MODELS[name])
    return case.save(folder, images).path.rename(place / name)


def all_of_them(place: Path) -> None:
    """Every file that the documentation names, and the images of all models but one in `clean_images`."""
    from safetensors.torch import save_file

    for library in ("torchvision", "timm", "transformers"):
        pytest.importorskip(library)
    make_images(place / "clean_images", per_class=12)
    for name in MODELS:
        saved(name, place, place / "clean_images")
    rng = np.random.default_rng(0)
    (place / "my_model.py").write_text(NETWORK)
    names: dict[str, object] = {}
    exec(NETWORK, names)
    save_file(names["build"](43).state_dict(), place / "model.safetensors")  # type: ignore[operator]
    np.savez(place / "clean.npz", x=rng.integers(0, 256, (60, 40, 40, 3), np.uint8), y=np.arange(60) % 43)
    w, z, y = head_with_a_shortcut(rng)
    (place / "models").mkdir()
    (place / "models" / "classifier").symlink_to(place / "vit_folder")
    np.savez(place / "head.npz", W=w, b=np.zeros(len(w)), Z=z, y=y)


def shortcut_model() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network of two layers whose head is `head_with_a_shortcut`'s, and clean batches for it: 1 x 8 x 8 images, 20 classes."""
    w, z, y = (torch.from_numpy(a) for a in head_with_a_shortcut(np.random.default_rng(0)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, len(w)))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(64))
        model[1].bias.zero_()
        model[3].weight.copy_(w)
        model[3].bias.zero_()
    return model.eval(), list(zip(z.float().reshape(-1, 1, 8, 8).split(100), y.split(100), strict=True))


def programs(folder: Path) -> Path:
    """A folder for PATH with `tacfast` and `python` as a reader's shell has them: this Python."""
    folder.mkdir(exist_ok=True)
    for name, command in (("python", ""), ("tacfast", " -m tacfast")):
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{command} "$@"\n')
        (folder / name).chmod(0o755)
    return folder
