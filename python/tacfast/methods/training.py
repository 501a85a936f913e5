"""What the ways to repair share: the job, the loop, the losses. May import: torch, routes, heads, errors, progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tacfast.errors import SolveError
from tacfast.heads import Captured, choose_device, logits_of
from tacfast.methods.routes import Route, targets_of
from tacfast.precision import mixed_precision, strided_depthwise
from tacfast.progress import track

#: SGD's learning rate, and that for delicate networks: 0.03 ruins them, 0.01 costs points (docs/repair-choices.md).
LR, DELICATE_LR = 0.03, 0.003
_OF_SAMPLES = (nn.LayerNorm, nn.RMSNorm)
_BATCH = 64
#: Samples of a forward pass without gradients.
FORWARD = 250


@dataclass(frozen=True, eq=False)
class Job:
    """What every method works with."""

    #: The unrepaired model's head and latents of all clean samples.
    captured: Captured
    #: float32 (n, ...), preprocessed, on the CPU.
    images: Tensor
    #: int64 (n,)
    labels: Tensor
    #: Positions of the samples that may be trained on.
    train: Tensor
    #: Positions of the others.
    held: Tensor
    routes: tuple[Route, ...]
    device: str
    seed: int
    progress: bool

    @property
    def targets(self) -> list[int]:
        """All classes that some other class is sent to."""
        return targets_of(self.routes)


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    """All weights in float32 or wider, with gradients, and laid out as training wants them; all that comes back as it was afterwards."""
    parameters = list(model.parameters())
    frozen = [p for p in parameters if not p.requires_grad]
    half = [t for t in [*parameters, *model.buffers()] if t.dtype in (torch.float16, torch.bfloat16)]
    dtypes = [t.dtype for t in half]
    for t in half:
        t.data = t.data.float()
    for p in frozen:
        p.requires_grad_(p.is_floating_point())
    # Not by Module.to, which refuses what has five dimensions.
    turned = [p for p in parameters if p.ndim == 4 and p.is_contiguous()] if strided_depthwise(model) else []
    for p in turned:
        p.data = p.data.contiguous(memory_format=torch.channels_last)
    yield
    for p in turned:
        p.data = p.data.contiguous()
    for t, dtype in zip(half, dtypes, strict=True):
        t.data = t.data.to(dtype)
    for p in frozen:
        p.requires_grad_(False)


def delicate(model: nn.Module) -> bool:
    """Whether a network mostly normalises each sample, as transformers do: such ones want smaller steps, and more of them."""
    each, batch = (sum(isinstance(m, kinds) for m in model.modules()) for kinds in (_OF_SAMPLES, nn.modules.batchnorm._BatchNorm))
    return each > batch


def usual_lr(model: nn.Module) -> float:
    """The learning rate where none is given."""
    return DELICATE_LR if delicate(model) else LR


#: From images and labels of a batch, both on the model's device, to what is minimised.
Loss = Callable[[Tensor, Tensor], Tensor]


def fit(model: nn.Module, job: Job, loss: Loss, *, lr: float, epochs: int, what: str) -> None:
    """Minimise a loss over all weights: SGD with momentum, learning rate falling to zero by a cosine. Leaves the model on the job's device.

    Raises:
        SolveError: the loss became infinite.
    """
    where = choose_device(model, job.device)
    model.to(where).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    batches = every_batch(job.train, torch.Generator().manual_seed(job.seed))
    per_epoch = steps_per_epoch(job)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    for _ in track(range(epochs * per_epoch), what, shown=job.progress):
        index = next(batches)
        with mixed_precision(where, model):
            value = loss(wide(job.images[index]).to(where), job.labels[index].to(where))
        descend(optimizer, value)
        schedule.step()


def steps_per_epoch(job: Job) -> int:
    return len(_split(job.train))


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    if not bool(loss.isfinite()):
        raise SolveError("training diverged; a smaller lr or beta is needed")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def shifted_loss(head: nn.Module, latents: Tensor, routes: tuple[Route, ...], labels: Tensor, wanted: Tensor | None = None) -> Tensor:
    """Cross-entropy on shifted latents, averaged over routes; `wanted` stands for the labels where it is given (probabilities)."""
    trailing = (1,) * (latents.ndim - 2)
    goal = labels if wanted is None else wanted
    losses = []
    for route in routes:
        shift = route.shifts[labels].to(latents.dtype)
        losses.append(cross_entropy(head(latents + shift.reshape(*shift.shape, *trailing)).flatten(1), goal))
    return torch.stack(losses).mean()


def recompute_statistics(model: nn.Module, job: Job) -> None:
    """Batch normalisation's running means and variances, anew and exactly, from the clean training samples."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not layers:
        return
    modes = {m: m.training for m in model.modules()}
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # torch's word for a plain average over all batches
        layer.train()
    where = next(model.parameters()).device
    with torch.no_grad():
        for index in job.train.tensor_split(max(1, round(len(job.train) / FORWARD))):
            model(wide(job.images[index]).to(where))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    for m, training in modes.items():
        m.training = training


def accuracy(model: nn.Module, job: Job, index: Tensor, *, mirrored: bool = False) -> float:
    """Of a model in eval mode, where it is, on some of the clean samples, their images mirrored if asked for."""
    return float((answers_of(model, job, index, mirrored=mirrored).argmax(1) == job.labels[index]).double().mean())


def answers_of(model: nn.Module, job: Job, index: Tensor, *, mirrored: bool = False) -> Tensor:
    """Logits (m, C), on the CPU, of a model where and as it is, for some of the clean samples, their images mirrored if asked for."""
    where = next(model.parameters()).device
    parts = []
    with torch.no_grad():
        for part in index.split(FORWARD):
            images = wide(job.images[part]).to(where)
            parts.append(logits_of(model(images.flip(-1) if mirrored else images)).cpu())
    return torch.cat(parts)


def wide(images: Tensor) -> Tensor:
    """Half-precision images in float32, as the weights are during training."""
    return images.float() if images.dtype in (torch.float16, torch.bfloat16) else images


def every_batch(index: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled batches without end."""
    while True:
        yield from _split(index[torch.randperm(len(index), generator=generator)])


def _split(index: Tensor) -> list[Tensor]:
    """Batches; a last one of a single sample would break batch normalisation and is left out."""
    parts = index.split(_BATCH)
    return [part for part in parts if len(part) > 1] or list(parts)
