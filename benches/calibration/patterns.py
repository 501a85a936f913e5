"""How far small patterns of the input go towards each class of the saved networks of train.py, as JSON lines that scans.py reads.

    patterns.py DIR [DIR...] --data cifar10=cifar10.npz --data gtsrb=gtsrb.npz

DIR/patterns.jsonl gets one line per network; networks that have one are skipped, so an interrupted run goes on where it was.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
import typer
from measured import maker_id, measured
from networks import Line, read_networks
from recipe import load_net
from results import append_line
from scans import Folders
from train import DataOption, read_all

from tacfast.patterns import IMAGES, measure
from tacfast.progress import track


def line_of(line: Line, images: torch.Tensor) -> dict[str, Any]:
    model = load_net(line["folder"] / "models" / f"{line['key']}.safetensors", line["arch"], line["classes"], images.shape[1])
    found = measure(model, images, np.arange(line["classes"]), device=torch.device("cpu"))
    margins = {kind: [round(float(m), 4) for m in values] for kind, values in found.margins.items()}
    return {"key": line["key"], "maker": maker_id(), "classes": found.classes.tolist(), "margins": margins}


def main(folders: Folders, data: DataOption, last_first: Annotated[bool, typer.Option(help="Begin with the latest.")] = False) -> None:
    """Measure every saved network that has no line yet."""
    torch.set_num_threads(1)
    sets = read_all(data)
    for folder in folders:
        done = measured(folder)
        todo = [
            line
            for line in read_networks([folder])
            if line["key"] not in done and line["dataset"] in sets and (folder / "models" / f"{line['key']}.safetensors").exists()
        ]
        for line in track(todo[::-1] if last_first else todo, "patterns", shown=True, total=len(todo)):
            (images, _), _ = sets[line["dataset"]].split(line["seed"])
            append_line(folder / "patterns.jsonl", line_of(line, images[:IMAGES]))


if __name__ == "__main__":
    typer.run(main)
