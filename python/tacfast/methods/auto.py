"""As hard as it must be, and a step back where that was dear. May import: torch, training, unlearn, reach, heads, outcome."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tacfast.heads import choose_device, logits_of
from tacfast.methods.reach import reach
from tacfast.methods.training import Job, recompute_statistics, wide
from tacfast.methods.unlearn import BETA, LR, STRENGTH, unlearn
from tacfast.outcome import Trial

#: The share of the way from the old weights to the unlearnt ones that is looked at as well. Smaller ones leave more (docs/repair.md).
BACK = 0.85
#: Loss of accuracy on held-out images from which it is.
BUDGET = 0.01
#: How much more of the held-out images a universal perturbation may send to the target there than at the end of the way.
SLACK = 0.1
_FORWARD = 250


def auto(
    model: nn.Module,
    job: Job,
    *,
    beta: float = BETA,
    strength: float = STRENGTH,
    lr: float = LR,
    epochs: int | None = None,
    budget: float = BUDGET,
) -> dict[str, Any]:
    """`unlearn`; where that costs more accuracy than the budget, a step back to the old weights if the target stays as hard to reach.

    On the straight line between a network and its fine-tuned copy both do well, and what fine-tuning lost comes back first (Wortsman et al.
    2022, CVPR, arXiv:2109.01903); a backdoor comes back late. Needs no poisoned data.

    Returns:
        The share of the way that was taken, and all that were looked at.

    Raises:
        SolveError: the loss became infinite.
    """
    old = copy.deepcopy(model.state_dict())
    wanted = _accuracy(model, job) - budget
    unlearn(model, job, beta=beta, strength=strength, lr=lr, epochs=epochs)
    end = Trial(1.0, _accuracy(model, job), reach(model, job))
    if end.clean_accuracy >= wanted:
        return {"way": 1.0, "trials": (end,)}
    new = copy.deepcopy(model.state_dict())
    _go_back(model, job, old)
    trial = Trial(BACK, _accuracy(model, job), reach(model, job))
    taken = trial if better(trial, end) else end
    if taken is end:
        model.load_state_dict(new)
    return {"way": taken.way, "trials": (end, trial)}


def better(trial: Trial, end: Trial) -> bool:
    """More accurate than at the end of the way, and the target as hard to reach, give or take the slack."""
    return trial.clean_accuracy > end.clean_accuracy and (trial.reach or 0.0) <= (end.reach or 0.0) + SLACK


def _go_back(model: nn.Module, job: Job, old: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(old[name].to(p).lerp(p, BACK))
    recompute_statistics(model, job)


def _accuracy(model: nn.Module, job: Job) -> float:
    where = choose_device(model, job.device)
    model.to(where).eval()
    with torch.no_grad():
        answers = [logits_of(model(wide(job.images[i]).to(where))).argmax(1).cpu() for i in job.held.split(_FORWARD)]
    return float((torch.cat(answers) == job.labels[job.held]).double().mean())
