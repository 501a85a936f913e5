"""The paper's repair: fine-tuning on shifted latents. May import: torch, training, heads."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tacfast.heads import choose_device, head_of, latent_tap, logits_of
from tacfast.methods.training import Job, fit, shifted_loss, usual_lr

EPOCHS = 5
BETA = 1.0


def finetune(model: nn.Module, job: Job, *, beta: float = BETA, lr: float | None = None, epochs: int = EPOCHS) -> Mapping[str, float]:
    """Train all weights on clean cross-entropy plus `beta` times cross-entropy on shifted latents (arXiv:2511.08944, section 4).

    Returns:
        The learning rate.

    Raises:
        SolveError: the loss became infinite.
    """
    lr = usual_lr(model) if lr is None else lr
    head, where = head_of(model, job.captured.name), choose_device(model, job.device)
    routes = tuple(route.to(where) for route in job.routes)
    with latent_tap(head) as latest:

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            clean = cross_entropy(logits_of(model(images)), labels)
            return clean + beta * shifted_loss(head, latest[0], routes, labels) if beta else clean

        fit(model, job, loss, lr=lr, epochs=epochs, what="fine-tuning")
    return {"lr": lr}
