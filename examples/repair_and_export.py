"""Scan a model, repair it where a class is suspected, write the repaired weights, and check the file that was written.

    python examples/repair_and_export.py model.pth clean_images/ repaired.safetensors --arch torchvision:resnet18

Exit codes: 0 repaired, or nothing to repair; 1 the repaired model is too much worse on images that the repair did not see.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import tacfast
from tacfast.checkpoints import save_safetensors
from tacfast.sources import load, load_model


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("weights", type=Path)
    options.add_argument("images", type=Path)
    options.add_argument("repaired", type=Path, help="a .safetensors file to write")
    options.add_argument("--arch", help="torchvision:NAME, timm:NAME, or my_model.py:factory")
    options.add_argument("--target", type=int, action="append", help="repair this class whatever the scan says")
    options.add_argument("--method", default="unlearn", help="see docs/repair.md")
    options.add_argument("--loss", type=float, default=0.03, help="clean accuracy that a repair may cost")
    given = options.parse_args()
    shown = sys.stderr.isatty()

    source = load(given.weights, given.images, arch=given.arch)
    print(*source.notes, sep="\n")  # the images' size and normalisation: look at them
    report = tacfast.scan(source.model, source.batches, progress=shown, file=source.file)
    print(f"{report.verdict}: {report.reason}")

    result = tacfast.repair(source.model, source.batches, report, targets=given.target, method=given.method, progress=shown)
    if result.model is None or result.after is None:
        print("nothing to repair")
        return 0
    before, after = result.before.clean_accuracy, result.after.clean_accuracy
    print(f"classes {list(result.targets)}: clean accuracy {before:.1%} -> {after:.1%} on images that were held out")
    if after < before - given.loss:
        print(f"not written: that is more than {given.loss:.1%} lost; give more clean images, or try --method head")
        return 1

    save_safetensors(result.model, given.repaired, {"repaired_from": str(source.file["sha256"])})
    written = load_model(given.repaired, arch=given.arch or str(given.weights)).model
    images = next(iter(source.batches))[0]
    with torch.no_grad():
        same = torch.equal(logits(written, images), logits(result.model, images))
    print(f"wrote {given.repaired}; read again it {'gives the same logits' if same else 'DIFFERS'}")
    return 0 if same else 1


def logits(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    output = model.eval()(images)
    found: torch.Tensor = getattr(output, "logits", output)  # transformers' models wrap them
    return found


if __name__ == "__main__":
    sys.exit(main())
