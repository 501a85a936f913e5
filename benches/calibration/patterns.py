"""How far small patterns of the input go towards each class of the saved networks of train.py, as JSON lines that scans.py reads.

    patterns.py DIR [DIR...] --data cifar10=cifar10.npz --data gtsrb=gtsrb.npz

DIR/patterns.jsonl gets one line per network; networks that have one are skipped, so an interrupted run goes on where it was.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
import typer
from measured import Measured, clean_images, model_file
from networks import read_networks
from scans import Folders
from train import DataOption, read_all

from tacfast.progress import track


def main(folders: Folders, data: DataOption, last_first: Annotated[bool, typer.Option(help="Begin with the latest.")] = False) -> None:
    """Measure every saved network that has no line yet."""
    torch.set_num_threads(1)
    sets = read_all(data)
    for folder in folders:
        patterns = Measured(folder)
        lines = [line for line in read_networks([folder]) if line["dataset"] in sets and model_file(line).exists()]
        todo = [line for line in lines if patterns.kept(line["key"]) is None]
        for line in track(todo[::-1] if last_first else todo, "patterns", shown=True, total=len(todo)):
            patterns.of(line, partial(clean_images, line, sets[line["dataset"]]))


if __name__ == "__main__":
    typer.run(main)
