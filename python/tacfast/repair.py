"""The same model with the backdoor gone. May import: solver, scan, outliers, heads (and torch) when called; errors, progress.

All methods work on a copy and use the surrogate of the trigger-activated change, s_p: the smallest latent shift into the suspected class p. A
backdoored head answers `p` on shifted latents; the repaired model shall answer the true class there (arXiv:2511.08944, section 4).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tacfast._rust import __version__
from tacfast.errors import ModelError, ProblemError, SolveError
from tacfast.progress import track
from tacfast.scan import QUANTILE, ScanReport, scan
from tacfast.solver import TacSolutions, solve

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from tacfast.heads import Captured

SCHEMA = "tacfast.repair/1"

Method = Literal["finetune", "head", "prune"]
METHODS: tuple[Method, ...] = ("finetune", "head", "prune")

#: Share of the clean samples that no method trains on.
_HELD_OUT = 0.1
_BATCH = 64
#: Images per forward pass where nothing is trained.
_FORWARD_BATCH = 250
#: Steps of the head-only method over cached latents.
_HEAD_STEPS = 600


@dataclass(frozen=True, repr=False, eq=False)
class RepairResult:
    """A repaired copy and what became of it. Accuracies are on clean samples that were held out of the repair."""

    #: The repaired copy on the CPU, in eval mode; None when there was nothing to do.
    model: nn.Module | None
    method: Method
    #: The classes whose backdoor was removed.
    targets: tuple[int, ...]
    clean_accuracy_before: float | None
    clean_accuracy_after: float | None
    #: Share of held-out samples that keep their class when their latent is shifted by s_p, worst target.
    recovery_accuracy_before: float | None
    recovery_accuracy_after: float | None
    #: float64 (C,): norms of all classes, as in a scan.
    norms_before: NDArray[np.float64]
    norms_after: NDArray[np.float64] | None
    #: Clean samples used, held out ones included.
    samples: int
    #: True where the classes came with the data, False where the model's own predictions stood in for them.
    labelled: bool
    settings: Mapping[str, Any]
    timing_s: Mapping[str, float]
    file: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        if self.model is None:
            return "RepairResult(nothing to do)"
        before, after = self.clean_accuracy_before, self.clean_accuracy_after
        return f"RepairResult({self.method}, targets={list(self.targets)}, clean accuracy {before:.3f} -> {after:.3f})"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, as JSON can hold it: schema `tacfast.repair/1`."""
        return {
            "schema": SCHEMA,
            "tool_version": __version__,
            "repaired": self.model is not None,
            "method": self.method,
            "targets": list(self.targets),
            "clean_accuracy_before": self.clean_accuracy_before,
            "clean_accuracy_after": self.clean_accuracy_after,
            "recovery_accuracy_before": self.recovery_accuracy_before,
            "recovery_accuracy_after": self.recovery_accuracy_after,
            "norms_before": _norms(self.norms_before),
            "norms_after": None if self.norms_after is None else _norms(self.norms_after),
            "samples": self.samples,
            "labelled": self.labelled,
            "settings": dict(self.settings),
            "timing_s": dict(self.timing_s),
            "file": dict(self.file),
        }


def repair(
    model: nn.Module,
    loader: Iterable[Any],
    report: ScanReport | None = None,
    *,
    targets: Sequence[int] | None = None,
    method: Method = "finetune",
    beta: float = 1.0,
    lr: float = 0.03,
    epochs: int = 5,
    budget: float = 0.02,
    device: str = "auto",
    seed: int = 0,
    progress: bool = False,
    file: Mapping[str, Any] | None = None,
) -> RepairResult:
    """Remove the backdoor from a copy of a model, with clean data.

    Args:
        model: never changed.
        loader: clean batches as for `scan`, best with labels; without, the model's predictions stand in. Read once into memory.
        report: a scan of this model; by default it is scanned first. Its suspects are the targets.
        targets: classes to repair instead of the report's suspects.
        method: "finetune" trains all weights on clean cross-entropy plus `beta` times cross-entropy on shifted latents; "head" does so for the
            last layer alone, over cached latents, in seconds; "prune" freezes at their mean the latent channels with the largest |s_p|, as many
            as the accuracy budget allows.
        beta: weight of the shifted cross-entropy.
        lr: learning rate of "finetune" (SGD, momentum 0.9, cosine to zero).
        epochs: passes of "finetune" over the clean data.
        budget: largest loss of accuracy, on clean data, that "prune" may cause.
        device, seed, progress, file: as for `scan`; `seed` fixes the held-out split and the order of training.

    Returns:
        RepairResult; its `model` is None when no class is suspected.

    Raises:
        ModelError: see `scan`.
        ProblemError: an option is out of range.
        SolveError: a target has no finite shift, so there is nothing to train against.
    """
    import torch

    from tacfast.heads import capture

    _check(method, beta, lr, epochs, budget)
    timing: dict[str, float] = {}
    clock = _Clock(timing)
    images, labels = _collect(loader)
    with clock("scan"):
        captured = capture(model, images.split(_FORWARD_BATCH), device=device, progress=progress)
        if report is None:
            report = scan(model, images.split(_FORWARD_BATCH), device=device, progress=progress)
    chosen = tuple(s.target for s in report.suspects) if targets is None else tuple(int(t) for t in targets)
    classes = len(captured.weight)
    if any(not 0 <= t < classes for t in chosen):
        raise ProblemError(f"targets must be in 0..{classes}, got {list(chosen)}")
    y = torch.from_numpy(captured.predictions) if labels is None else labels.long()
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ProblemError(f"labels must be in 0..{classes}, found {int(y.min())}..{int(y.max())}")
    settings = {"beta": beta, "lr": lr, "epochs": epochs, "budget": budget, "seed": seed}
    common: dict[str, Any] = {
        "method": method, "targets": chosen, "samples": len(images), "labelled": labels is not None, "settings": settings,
        "timing_s": timing, "file": dict(file or {}),
    }  # fmt: skip
    before = _norms_of(captured)
    if not chosen:
        return RepairResult(None, clean_accuracy_before=None, clean_accuracy_after=None, recovery_accuracy_before=None,
                            recovery_accuracy_after=None, norms_before=before.norms, norms_after=None, **common)  # fmt: skip

    with clock("solve"):
        shifts = _shifts(captured, chosen)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    held = max(1, round(_HELD_OUT * len(images)))
    job = _Job(images, y, order[held:], order[:held], shifts, device, seed, progress)
    repaired = copy.deepcopy(model)
    with clock(method):
        if method == "finetune":
            _finetune(repaired, captured.name, job, beta, lr, epochs)
        elif method == "head":
            _train_head(repaired, captured, job, beta)
        else:
            _prune(repaired, captured, job, budget)
    with clock("check"):
        after = capture(repaired, images.split(_FORWARD_BATCH), device=device)
        accuracy, recovery = _held_out(captured, job)
        accuracy_after, recovery_after = _held_out(after, job)
    return RepairResult(repaired.cpu().eval(), clean_accuracy_before=accuracy, clean_accuracy_after=accuracy_after,
                        recovery_accuracy_before=recovery, recovery_accuracy_after=recovery_after,
                        norms_before=before.norms, norms_after=_norms_of(after).norms, **common)  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Job:
    """What every method works with: clean samples, the split, and the shifts float32 (targets, d)."""

    images: Tensor
    labels: Tensor
    train: Tensor
    held: Tensor
    shifts: Tensor
    device: str
    seed: int
    progress: bool


class _Clock:
    """Adds the time of a `with` block to a phase."""

    def __init__(self, timing: dict[str, float]) -> None:
        self.timing, self.phase, self.started = timing, "", 0.0

    def __call__(self, phase: str) -> _Clock:
        self.phase = phase
        return self

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.timing[self.phase] = self.timing.get(self.phase, 0.0) + time.perf_counter() - self.started


def _check(method: str, beta: float, lr: float, epochs: int, budget: float) -> None:
    if method not in METHODS:
        raise ProblemError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    for name, value, fits, right in (
        ("beta", beta, beta >= 0, "at least 0"),
        ("lr", lr, lr > 0, "above 0"),
        ("epochs", epochs, epochs >= 1, "at least 1"),
        ("budget", budget, 0 <= budget < 1, "in [0, 1)"),
    ):
        if not fits or not np.isfinite(value):
            raise ProblemError(f"{name} must be {right}, got {value}")


def _collect(loader: Iterable[Any]) -> tuple[Tensor, Tensor | None]:
    """All clean samples on the CPU; labels only where every batch has them."""
    import torch

    from tacfast.heads import split_batch

    batches = [split_batch(batch) for batch in loader]
    if not batches or sum(len(x) for x, _ in batches) < 2:
        raise ModelError("the loader gave fewer than 2 clean images; repair needs some hundred")
    labels = [y.cpu() for _, y in batches if y is not None]
    images = torch.cat([x.cpu() for x, _ in batches])
    return images, torch.cat(labels) if len(labels) == len(batches) else None


def _norms_of(captured: Captured) -> TacSolutions:
    return solve(captured.weight, captured.bias, captured.latents, quantile=QUANTILE)


def _shifts(captured: Captured, targets: tuple[int, ...]) -> Tensor:
    import torch

    solutions = solve(captured.weight, captured.bias, captured.latents, classes=targets)
    for k, status in zip(targets, solutions.status, strict=True):
        if status != "solved":
            raise SolveError(f"class {k} ended {status}: there is no shift to repair against")
    return torch.from_numpy(solutions.perturbations).float()


def _module(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _shifted_loss(head: Any, latents: Tensor, shifts: Tensor, labels: Tensor) -> Tensor:
    """Mean over targets of the cross-entropy on latents + s_p; shifts are (targets, d)."""
    import torch
    from torch.nn.functional import cross_entropy

    shape = (-1, *[1] * (latents.ndim - 2))
    losses = [cross_entropy(head(latents + s.reshape(shape)).flatten(1), labels) for s in shifts]
    return torch.stack(losses).mean()


def _finetune(model: nn.Module, head_name: str, job: _Job, beta: float, lr: float, epochs: int) -> None:
    import torch
    from torch.nn.functional import cross_entropy

    from tacfast.heads import choose_device, latent_tap, logits_of

    where = choose_device(model, job.device)
    model.to(where).train()
    head, shifts = _module(model, head_name), job.shifts.to(where)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    order = torch.Generator().manual_seed(job.seed)
    batches = [b for _ in range(epochs) for b in _shuffled(job.train, order)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    with latent_tap(head) as latest:
        for index in track(batches, "fine-tuning", shown=job.progress):
            x, y = job.images[index].to(where), job.labels[index].to(where)
            loss = cross_entropy(logits_of(model(x)), y)
            loss = loss + beta * _shifted_loss(head, latest[0], shifts, y)
            _step(optimizer, loss)
            schedule.step()
    model.eval()


def _train_head(model: nn.Module, captured: Captured, job: _Job, beta: float) -> None:
    """The same loss for the head alone, over cached latents."""
    import torch
    from torch.nn.functional import cross_entropy

    head = _module(model, captured.name).cpu().train()
    latents = torch.from_numpy(captured.latents).float()
    if isinstance(head, torch.nn.Conv2d):
        latents = latents[:, :, None, None]
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _HEAD_STEPS)
    order = torch.Generator().manual_seed(job.seed)
    batches = _endless(job.train, order)
    for _ in track(range(_HEAD_STEPS), "head", shown=job.progress):
        index = next(batches)
        z, y = latents[index], job.labels[index]
        loss = cross_entropy(head(z).flatten(1), y) + beta * _shifted_loss(head, z, job.shifts, y)
        _step(optimizer, loss)
        schedule.step()
    model.cpu().eval()


def _prune(model: nn.Module, captured: Captured, job: _Job, budget: float) -> None:
    """Freeze channels at their clean mean, largest |s_p| first, up to the last one at which accuracy is within budget.

    A frozen channel leaves the head's input: its column of W becomes zero and its mean contribution joins the bias."""
    import torch

    w = torch.from_numpy(captured.weight).double()
    z = torch.from_numpy(captured.latents).double()
    z, y = z[job.train], job.labels[job.train]
    mean = z.mean(0)
    logits = z @ w.T + (0 if captured.bias is None else torch.from_numpy(captured.bias).double())
    least = float((logits.argmax(1) == y).double().mean()) - budget
    channels = job.shifts.abs().amax(0).argsort(descending=True)
    head = _module(model, captured.name)
    keep = 0
    for count, channel in enumerate(track(channels.tolist(), "pruning", shown=job.progress), start=1):
        drift = mean[channel] if head.bias is not None else 0.0
        logits += torch.outer(drift - z[:, channel], w[:, channel])
        if float((logits.argmax(1) == y).double().mean()) >= least:
            keep = count
    pruned = channels[:keep]
    with torch.no_grad():
        weight = w.clone()
        weight[:, pruned] = 0
        head.weight.copy_(weight.reshape(head.weight.shape))
        if head.bias is not None:
            head.bias += (w[:, pruned] @ mean[pruned]).to(head.bias)
    model.eval()


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    if not bool(loss.isfinite()):
        raise SolveError("training diverged; a smaller lr or beta is needed")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _shuffled(index: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Batches of a random order; a last batch of one sample would break batch normalisation and is left out."""
    import torch

    parts = index[torch.randperm(len(index), generator=generator)].split(_BATCH)
    return [b for b in parts if len(b) > 1] or list(parts)


def _endless(index: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from _shuffled(index, generator)


def _held_out(captured: Captured, job: _Job) -> tuple[float, float]:
    """Clean and recovery accuracy on the held-out samples, from a capture of all samples."""
    held, y = job.held.numpy(), job.labels[job.held].numpy()
    w = captured.weight.astype(np.float64)
    b = 0.0 if captured.bias is None else captured.bias.astype(np.float64)
    z = captured.latents[held].astype(np.float64)
    clean = float(np.mean((z @ w.T + b).argmax(1) == y))
    recovered = [float(np.mean(((z + s) @ w.T + b).argmax(1) == y)) for s in job.shifts.double().numpy()]
    return clean, min(recovered)


def _norms(values: NDArray[np.float64]) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]
