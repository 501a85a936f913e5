"""The target's norm raised until it is no longer an outlier. May import: torch, autograd, training, heads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from tacfast.autograd import tac_norm
from tacfast.heads import head_of, latent_tap, logits_of
from tacfast.methods.training import Job, fit, usual_lr
from tacfast.solver import solve

EPOCHS = 5
#: Weight of the log norms' shortfall beside the clean cross-entropy.
WEIGHT = 1.0


def equalize(model: nn.Module, job: Job, *, lr: float | None = None, epochs: int = EPOCHS) -> Mapping[str, float]:
    """Train all weights on clean cross-entropy plus what log ‖s_p‖ of each batch lacks to the median class's, by the differentiable norm.

    A normal norm is no proof of removal: by itself this makes the backdoor invisible to a scan of norms rather than harmless
    (docs/repair.md has the figures). It is here for comparison, and for whoever wants to build an adaptive attack against the scan.

    Returns:
        The learning rate.

    Raises:
        SolveError: the loss became infinite, or a target became unreachable.
    """
    lr = usual_lr(model) if lr is None else lr
    head = head_of(model, job.captured.name)
    targets = job.targets
    norms = solve(job.captured.weight, job.captured.bias, job.captured.latents).norms
    wanted = 2 * float(torch.from_numpy(norms).nanmedian().log())
    with latent_tap(head) as latest:

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            clean = cross_entropy(logits_of(model(images)), labels)
            latents = (latest[0].mean((2, 3)) if latest[0].ndim == 4 else latest[0].flatten(1)).to(head.weight.dtype)
            # tac_norm gives half the squared norm; both sides are logs of the square.
            squared = 2 * tac_norm(head.weight.flatten(1), head.bias, latents, targets)
            return clean + WEIGHT * relu(wanted - squared.log()).mean()

        fit(model, job, loss, lr=lr, epochs=epochs, what="equalizing")
    return {"lr": lr}
