"""What a repair does to networks that never had a backdoor: by itself, and when it is forced upon a class.

    export PYTHONPATH=benches/calibration
    forced.py --folder CALIBRATION --data gtsrb=gtsrb.npz [--zoo DIR] [--arch resnet] [--seeds odd] [--method auto]

Five percent of the training set's size in clean images; the forced class rotates with the seed. Accuracy on test images that are not the
defender's.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from defences import predict
from networks import Seeds
from removal import Archs, DataOption, Folders, SeedsOption, Zoo
from subjects import Filter, Subject, chosen, open_subject
from tables import markdown
from torch import nn
from train import read_all

import tacfast


def accuracy(model: nn.Module, subject: Subject) -> float:
    images, labels = subject.rest
    return float((predict(model, images) == labels).double().mean())


def main(
    data: DataOption,
    folder: Folders = None,
    zoo: Zoo = None,
    arch: Archs = None,
    seeds: SeedsOption = Seeds.all,
    method: Annotated[str, typer.Option(help="A method of `tacfast.repair`.")] = "auto",
) -> None:
    """Repair clean networks, and print a table."""
    torch.set_num_threads(1)
    sets, rows = read_all(data), []
    for line in chosen(folder or [], zoo, Filter(list(sets), arch or [], seeds=seeds), clean=True):
        subject = open_subject(line, sets[line["dataset"]])
        batches = list(zip(*(part.split(250) for part in subject.clean(0.05)), strict=True))
        report = tacfast.scan(subject.model, batches, device="cpu")
        alone = tacfast.repair(subject.model, batches, report, device="cpu")
        target = line["seed"] % subject.data.classes
        forced = tacfast.repair(subject.model, batches, targets=[target], method=method, device="cpu")
        assert forced.model is not None
        before, after = accuracy(subject.model, subject), accuracy(forced.model, subject)
        said = "nothing to do" if alone.model is None else f"repaired {list(alone.targets)}"
        rows.append([subject.key, report.verdict, said, str(target), f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f}"])
        print(" ".join(rows[-1]), flush=True)
    print(markdown(["network", "scan", "repair by itself", "forced class", "accuracy", "after", "points"], rows))


if __name__ == "__main__":
    typer.run(main)
