"""As hard as it must be, and gentler where that costs too much. May import: torch, training, unlearn, reach, heads, outcome."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from tacfast.heads import choose_device
from tacfast.methods.reach import reach
from tacfast.methods.training import Job, accuracy
from tacfast.methods.unlearn import BETA, LR, STRENGTH, unlearn
from tacfast.outcome import Trial

#: The second learning rate, for networks that the first one cost too much. Smaller ones leave backdoors that no check sees: docs/repair.md.
GENTLE = 0.02
#: Loss of accuracy on held-out images from which the second one is tried.
BUDGET = 0.01
#: How much more of the held-out images a universal perturbation may send to the target after the second one than after the first.
SLACK = 0.05


def better(trial: Trial, other: Trial) -> bool:
    """More accurate, and the way to the target no more open."""
    return trial.clean_accuracy > other.clean_accuracy and (trial.reach or 0.0) <= (other.reach or 0.0) + SLACK


def auto(
    model: nn.Module,
    job: Job,
    *,
    beta: float = BETA,
    strength: float = STRENGTH,
    lr: float | None = None,
    epochs: int | None = None,
    budget: float = BUDGET,
) -> dict[str, Any]:
    """`unlearn`; where that costs more accuracy than the budget, once more from the start with a smaller learning rate, which is taken if
    it costs less and closes the way to the target as well. A single held-out image counts for nothing: of 77 it would be more than the
    default budget. A given `lr` is the only one. Needs no poisoned data.

    Returns:
        The learning rate that was taken, and all trials.

    Raises:
        SolveError: the loss became infinite.
    """
    start = copy.deepcopy(model.state_dict())
    # Accuracies are a whole number of images apart.
    wanted = _accuracy(model, job) - max(budget, 1.5 / len(job.held))
    trials: list[Trial] = []
    best: tuple[Trial, dict[str, Tensor]] | None = None
    for rate in (LR, GENTLE) if lr is None else (lr,):
        model.load_state_dict(start)
        unlearn(model, job, beta=beta, strength=strength, lr=rate, epochs=epochs)
        trial = Trial(rate, _accuracy(model, job), reach(model, job))
        trials.append(trial)
        if best is None or better(trial, best[0]):
            best = trial, copy.deepcopy(model.state_dict())
        if best[0].clean_accuracy >= wanted:
            break
    assert best is not None
    model.load_state_dict(best[1])
    return {"lr": best[0].lr, "trials": tuple(trials)}


def _accuracy(model: nn.Module, job: Job) -> float:
    where = choose_device(model, job.device)
    model.to(where).eval()
    return accuracy(model, job, job.held)
