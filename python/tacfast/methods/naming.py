"""A target class that a repaired network names too seldom is named as often as it occurs. May import: torch, training, heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tacfast.heads import MeanHead, head_of
from tacfast.methods.training import Job, answers_of


def name_targets(model: nn.Module, job: Job) -> None:
    """Raise the bias of each target until the network gives it to as many clean training samples as have that label.

    A change of bias is what a change of how often a class occurs asks of a classifier (Saerens et al. 2002, Neural Computation 14): what is
    taught against perturbations towards the target makes it look rarer than it is. Answers are counted, not probabilities averaged, so that
    nothing changes where the samples of the class are recognised; without labels, the unrepaired network's answers stand for them. A head
    without a bias stays as it is, and so does a bias that is high enough.
    """
    head = head_of(model, job.captured.name)
    if head.bias is None:
        return
    logits, labels = answers_of(model.eval(), job, job.train).double(), job.labels[job.train]
    for target in job.targets:
        by = missing(logits, labels, target)
        logits[:, target] += by
        _raise(head, target, by)


def missing(logits: Tensor, labels: Tensor, target: int) -> float:
    """By how much the target's logits, of (n, C), must rise for as many answers of that class as there are labels of it; at least 0."""
    count = int((labels == target).sum())
    if count == 0:
        return 0.0
    others = logits.clone()
    others[:, target] = -torch.inf
    short = (others.amax(1) - logits[:, target]).kthvalue(count).values
    return max(0.0, float(short))


def _raise(head: Any, target: int, by: float) -> None:
    parts: list[Any] = list(head.parts) if isinstance(head, MeanHead) else [head]
    biased = [part for part in parts if part.bias is not None]
    for part in biased:
        with torch.no_grad():
            part.bias[target] += by * len(parts) / len(biased)
