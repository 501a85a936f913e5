"""Backdoors whose triggers are learnt on the clean network of the same pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from data import Data
from plan import Job
from recipe import load_net, train
from torch import nn

from tacfast.attacks import AllToOne, Backdoor, CoversOnly, InputAware, Lira, TrojanPatch
from tacfast.files import atomic


def learned_backdoors(job: Job, data: Data, folder: Path, tick: Callable[[], None]) -> list[Backdoor]:
    """The attacks of `plan.LEARNED`: those kept in FOLDER/triggers, or learnt on the clean network of the pair, which takes minutes; the
    same clean network, images and seed give the same trigger. They are kept as a pickle: our own, from a folder that nobody else writes to.
    """
    file = folder / "triggers" / f"{job.key}.pt"
    if file.exists():
        return list(torch.load(file, weights_only=False))
    doors = _learnt(job, data, folder, tick)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic(file) as stream:
        torch.save(doors, stream)
    return doors


def _learnt(job: Job, data: Data, folder: Path, tick: Callable[[], None]) -> list[Backdoor]:
    assert job.target is not None
    clean: Any = clean_net(job, data, folder, tick)
    images, rule = data.x_train.float() / 255, AllToOne(job.target)
    if job.attack == "trojan":
        return [Backdoor(TrojanPatch.learn(clean, clean.fc, images, seed=job.seed), rule)]
    if job.attack == "lira":
        return [Backdoor(Lira.learn(clean, images, data.y_train, job.target, epsilon=0.05, seed=job.seed), rule)]
    trigger = InputAware.learn(clean, images, data.y_train, job.target, seed=job.seed)
    return [Backdoor(trigger, rule), Backdoor(trigger.crossed(), CoversOnly())]


def clean_net(job: Job, data: Data, folder: Path, tick: Callable[[], None]) -> nn.Module:
    """The clean network of the job's pair: the saved one, or trained again while it is not there yet."""
    clean = Job(job.dataset, job.arch, "clean", 0.0, None, job.seed)
    file = folder / "models" / f"{clean.key}.safetensors"
    if not file.exists():
        return train(data.x_train, data.y_train, data.classes, arch=job.arch, schedule=data.schedule, seed=job.seed, tick=tick)[0]
    return load_net(file, job.arch, data.classes, data.x_train.shape[1])
