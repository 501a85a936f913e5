"""What the shifted-latent term costs beside plain fine-tuning.

    export PYTHONPATH=benches/calibration
    overhead.py --folder CALIBRATION --data gtsrb=gtsrb.npz --network KEY [--network KEY ...] [--repeats 3]

`finetune` with beta 1 and with beta 0, in turn: the same images, steps and learning rate. Medians of CPU seconds.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Annotated

import torch
import typer
from removal import DataOption, Folders, Keys, Zoo
from subjects import Filter, Subject, chosen, open_subject
from tables import markdown
from train import read_all

import tacfast


def cost(subject: Subject, beta: float) -> tuple[float, float]:
    """CPU seconds of the training, and of the quadratic programs before it."""
    images, labels = subject.clean(0.05)
    batches = list(zip(images.split(250), labels.split(250), strict=True))
    started = time.process_time()
    result = tacfast.repair(subject.model, batches, targets=list(subject.targets), method="finetune", beta=beta, device="cpu")
    share = (time.process_time() - started) / sum(result.timing_s.values())
    # The phases are timed by the wall clock: brought to CPU seconds by what the whole repair took of both.
    return share * result.timing_s["finetune"], share * result.timing_s["solve"]


def main(
    data: DataOption,
    folder: Folders = None,
    zoo: Zoo = None,
    network: Keys = None,
    repeats: Annotated[int, typer.Option(min=1, help="Of each pair.")] = 3,
) -> None:
    """Time the term, and print a table."""
    torch.set_num_threads(1)
    sets, rows = read_all(data), []
    for line in chosen(folder or [], zoo, Filter(list(sets), keys=network or [])):
        subject = open_subject(line, sets[line["dataset"]])
        cost(subject, 1.0)  # the first one pays for what torch does but once
        pairs = [(cost(subject, 0.0), cost(subject, 1.0)) for _ in range(repeats)]
        plain = median(without[0] for without, _ in pairs)
        full = median(with_term[0] for _, with_term in pairs)
        solve = median(with_term[1] for _, with_term in pairs)
        rows.append(
            [subject.key, f"{plain:.2f}", f"{full:.2f}", f"{solve:.3f}", f"{solve / plain:.1%}", f"{(full + solve) / plain - 1:.1%}"]
        )
    print(markdown(["network", "plain, s", "with the term, s", "QPs, s", "QPs / plain", "everything more than plain"], rows))


if __name__ == "__main__":
    typer.run(main)
