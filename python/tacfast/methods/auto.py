"""As hard as it must be, and gentler where that costs too much. May import: torch, training, unlearn, drift, reach, heads,
outcome, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from tacfast.errors import SolveError
from tacfast.heads import choose_device
from tacfast.methods.drift import Drift
from tacfast.methods.reach import reach
from tacfast.methods.training import Job, accuracy, usual_lr
from tacfast.methods.unlearn import BETA, STRENGTH, unlearn
from tacfast.outcome import Trial

#: The first try's learning rate is the usual one divided by these, each for networks that the one before ruined. Where one only costs too
#: much, two thirds of it are tried: smaller ones leave backdoors that no check sees (docs/repair-choices.md).
GENTLER = (1, 3, 9, 27)
#: Loss of accuracy on held-out images from which another try is made, and from which a network is ruined, and how far it may drift.
BUDGET, RUIN, DRIFT = 0.01, 0.1, 0.15
#: How much more of the held-out images a universal perturbation may send to the target after the gentler try.
SLACK = 0.05


#: What became of a try, and its weights.
Attempt = tuple[Trial, dict[str, Tensor]]


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
    """`unlearn`; where that ruins the network, as accuracy on held-out images or the drift of the last inner layer tells, from the start
    with a third of the learning rate; then, where it costs more accuracy than the budget, once more with two thirds of it, which is taken
    if it costs less and closes the way to the target as well. A single held-out image counts for nothing: of 77 it would be more than the
    default budget; nor do three ruin a network. A given `lr` is the only one. Needs no poisoned data.

    Returns:
        The learning rate that was taken, and all trials.

    Raises:
        SolveError: the loss became infinite, with the smallest learning rate too.
    """
    start = copy.deepcopy(model.state_dict())
    before, drift, trials = _accuracy(model, job), Drift(model, job), []

    def attempt(rate: float) -> Attempt:
        model.load_state_dict(start)
        unlearn(model, job, beta=beta, strength=strength, lr=rate, epochs=epochs)
        trials.append(Trial(rate, _accuracy(model, job), reach(model, job), drift()))
        return trials[-1], copy.deepcopy(model.state_dict())

    def cost(attempted: Attempt, share: float, images: float) -> bool:
        """Whether it cost more than a share of the held-out images, and than a number of them."""
        return attempted[0].clean_accuracy < before - max(share, images / len(job.held))

    def ruined(attempted: Attempt) -> bool:
        # Accuracies are a whole number of images apart.
        return cost(attempted, RUIN, 3.5) or (attempted[0].drift or 0.0) > DRIFT

    rates = [usual_lr(model) / by for by in GENTLER] if lr is None else [lr]
    best = _first(attempt, rates, ruined)
    if lr is None and cost(best, budget, 1.5):
        again = attempt(best[0].lr * 2 / 3)
        best = again if better(again[0], best[0]) else best
    model.load_state_dict(best[1])
    return {"lr": best[0].lr, "trials": tuple(trials)}


def _first(attempt: Callable[[float], Attempt], rates: Sequence[float], ruined: Callable[[Attempt], bool]) -> Attempt:
    """That with the first learning rate which does not ruin the network, or with the last one."""
    for rate in rates[:-1]:
        # A loss that became infinite has ruined it too.
        with suppress(SolveError):
            attempted = attempt(rate)
            if not ruined(attempted):
                return attempted
    return attempt(rates[-1])


def _accuracy(model: nn.Module, job: Job) -> float:
    where = choose_device(model, job.device)
    model.to(where).eval()
    return accuracy(model, job, job.held)
