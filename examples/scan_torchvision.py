"""Scan a torchvision classifier: weights from a file, images of a folder as torchvision reads them.

    python examples/scan_torchvision.py model.pth clean_images/ --arch resnet18 --json scan.json

The images go through the transform of the library's own weights. Where the model was trained with another one, put that in its place.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from torch.utils.data import DataLoader
from torchvision import datasets, models

import tacfast
from tacfast.sources import load_model


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("weights", type=Path, help="state dict, .pth or .safetensors; nothing in it is run")
    options.add_argument("images", type=Path, help="a folder a class, in the order of the model's classes")
    options.add_argument("--arch", default="resnet18", help="a name of torchvision.models")
    options.add_argument("--json", type=Path, help="write the report here")
    given = options.parse_args()

    # Any nn.Module that you have already does as well; this one is read without trust in its file.
    source = load_model(given.weights, arch=f"torchvision:{given.arch}")
    transform = models.get_model_weights(given.arch).DEFAULT.transforms()
    loader = DataLoader(datasets.ImageFolder(given.images, transform), batch_size=64)

    report = tacfast.scan(source.model, loader, progress=sys.stderr.isatty(), file=source.file)

    print(f"{report.verdict}: {report.reason}")
    for suspect in report.suspects:
        print(f"suspected target: {loader.dataset.classes[suspect.target]} (p = {suspect.p_value:.2g})")
    if report.clean_accuracy is not None:
        print(f"accuracy on these images: {report.clean_accuracy:.1%}; if that is not what you expect, the transform is not the model's")
    if given.json is not None:
        given.json.write_text(json.dumps(report.to_dict(), indent=1))
    return {"clean": 0, "backdoored": 1, "inconclusive": 3}[report.verdict]


if __name__ == "__main__":
    sys.exit(main())
