"""The same model with the backdoor gone. May import: solver, scan, errors; methods, heads (and torch) when called."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tacfast._rust import __version__
from tacfast.errors import ModelError, ProblemError, SolveError
from tacfast.progress import timed
from tacfast.scan import QUANTILE, ScanReport, scan_captured
from tacfast.solver import solve

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tacfast.heads import Captured
    from tacfast.methods import Job

SCHEMA = "tacfast.repair/1"

Method = Literal["finetune", "head", "prune"]

#: Share of the clean samples that no method trains on.
_HELD_OUT = 0.1
_FEWEST_IMAGES = 20
#: Images per forward pass where nothing is trained.
_FORWARD_BATCH = 250


@dataclass(frozen=True, eq=False)
class State:
    """A model before or after a repair. Accuracies are on the clean samples that were held out of it."""

    clean_accuracy: float
    #: Share of samples that keep their class when their latents are shifted by s_p, worst target; None without targets.
    recovery_accuracy: float | None
    #: float64 (C,): norms of all classes, as in a scan.
    norms: NDArray[np.float64]

    def to_dict(self) -> dict[str, Any]:
        norms = [float(v) if np.isfinite(v) else None for v in self.norms]
        return {"clean_accuracy": self.clean_accuracy, "recovery_accuracy": self.recovery_accuracy, "norms": norms}


@dataclass(frozen=True, repr=False, eq=False)
class RepairResult:
    """A repaired copy and what became of it."""

    #: The repaired copy on the CPU, in eval mode; None when there was nothing to do.
    model: nn.Module | None
    method: Method
    #: The classes whose backdoor was removed.
    targets: tuple[int, ...]
    before: State
    after: State | None
    #: Clean samples used, held out ones included.
    samples: int
    #: True where the classes came with the data, False where the model's own predictions stood in for them.
    labelled: bool
    settings: Mapping[str, Any]
    timing_s: Mapping[str, float]
    file: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        if self.after is None:
            return "RepairResult(nothing to do)"
        before, after = self.before.clean_accuracy, self.after.clean_accuracy
        return f"RepairResult({self.method}, targets={list(self.targets)}, clean accuracy {before:.3f} -> {after:.3f})"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, as JSON can hold it: schema `tacfast.repair/1`."""
        return {
            "schema": SCHEMA,
            "tool_version": __version__,
            "repaired": self.after is not None,
            "method": self.method,
            "targets": list(self.targets),
            "before": self.before.to_dict(),
            "after": None if self.after is None else self.after.to_dict(),
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
        report: a scan of this model; by default it is scanned first. Its `targets` are those here.
        targets: classes to repair instead of the report's targets.
        method: "finetune" trains all weights on clean cross-entropy plus `beta` times cross-entropy on shifted latents; "head" does so for
            the last layer alone, over cached latents, in seconds; "prune" freezes the latent channels with the largest |s_p| at their
            mean, as many as the accuracy budget allows.
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

    _check(method, beta, lr, epochs, budget, seed)
    timing: dict[str, float] = {}
    images, given = _collect(loader)
    batches = list(images.split(_FORWARD_BATCH))
    with timed(timing, "latents"):
        captured = capture(model, batches, device=device, progress=progress)
    if given is not None and not 0 <= int(given.min()) <= int(given.max()) < len(captured.weight):
        raise ModelError(f"labels must be classes of the model, 0 to {len(captured.weight) - 1}")
    if report is None:
        report = scan_captured(captured, {})
    labels = torch.from_numpy(captured.predictions) if given is None else given
    chosen = _check_targets(report.targets if targets is None else targets, len(captured.weight))

    with timed(timing, "solve"):
        shifts = _shifts(captured, chosen)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    held, train = order.tensor_split([max(1, round(_HELD_OUT * len(images)))])
    before = _state(captured, held, labels, shifts)
    repaired, after = None, None
    if chosen:
        from tacfast.methods import Job, trainable

        repaired = copy.deepcopy(model)
        job = Job(captured, images, labels, train, torch.from_numpy(shifts).float(), device, seed, progress)
        with timed(timing, method), trainable(repaired):
            _apply(method, repaired, job, beta=beta, lr=lr, epochs=epochs, budget=budget)
        repaired = repaired.cpu().eval()
        with timed(timing, "check"):
            after = _state(capture(repaired, batches, device=device), held, labels, shifts)
    settings = {"beta": beta, "lr": lr, "epochs": epochs, "budget": budget, "seed": seed}
    return RepairResult(
        repaired, method, chosen, before, after, len(images), given is not None, settings, timing, file=dict(file or {})
    )  # fmt: skip


def _apply(method: Method, model: nn.Module, job: Job, *, beta: float, lr: float, epochs: int, budget: float) -> None:
    from tacfast import methods

    if method == "finetune":
        methods.finetune(model, job, beta=beta, lr=lr, epochs=epochs)
    elif method == "head":
        methods.train_head(model, job, beta=beta)
    else:
        methods.prune(model, job, budget=budget)


def _check(method: str, beta: float, lr: float, epochs: int, budget: float, seed: int) -> None:
    if method not in get_args(Method):
        raise ProblemError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    number = (int, float)
    for name, value, kind, low, high, right in (
        ("beta", beta, number, 0, np.inf, "a number, at least 0"),
        ("lr", lr, number, 1e-12, np.inf, "a number above 0"),
        ("epochs", epochs, int, 1, np.inf, "a whole number, at least 1"),
        ("budget", budget, number, 0, 1, "in [0, 1)"),
        ("seed", seed, int, 0, 2**63, "a whole number, at least 0"),
    ):
        if not isinstance(value, kind) or not low <= value < high:
            raise ProblemError(f"{name} must be {right}, got {value!r}")


def _check_targets(targets: Iterable[int], classes: int) -> tuple[int, ...]:
    try:
        chosen = tuple(dict.fromkeys(operator.index(t) for t in targets))
    except TypeError:
        raise ProblemError(f"targets must be a sequence of classes, got {targets!r}") from None
    if any(not 0 <= t < classes for t in chosen):
        raise ProblemError(f"targets must be from 0 to {classes - 1}, got {list(chosen)}")
    return chosen


def _collect(loader: Iterable[Any]) -> tuple[Tensor, Tensor | None]:
    """All clean samples on the CPU; labels only where every batch has them."""
    import torch

    from tacfast.heads import split_batch

    batches = [split_batch(batch) for batch in loader]
    if sum(len(x) for x, _ in batches) < _FEWEST_IMAGES:
        raise ModelError(f"the loader gave fewer than {_FEWEST_IMAGES} clean images; repair needs some hundred")
    labels = [y.cpu() for _, y in batches if y is not None]
    if 0 < len(labels) < len(batches):
        raise ModelError("some batches have labels and some have none; give them for all or for none")
    try:
        images = torch.cat([x.cpu() for x, _ in batches])
    except RuntimeError:
        raise ModelError("the images of all batches must have one shape") from None
    return images, torch.cat(labels) if len(labels) == len(batches) else None


def _shifts(captured: Captured, targets: tuple[int, ...]) -> NDArray[np.float64]:
    """s_p of each target, float64 (targets, d)."""
    solutions = solve(captured.weight, captured.bias, captured.latents, classes=targets)
    for k, status in zip(targets, solutions.status, strict=True):
        if status != "solved":
            raise SolveError(f"class {k} ended {status}: there is no shift to repair against")
    return solutions.perturbations


def _state(captured: Captured, held: Tensor, labels: Tensor, shifts: NDArray[np.float64]) -> State:
    w = captured.weight.astype(np.float64)
    b = 0.0 if captured.bias is None else captured.bias.astype(np.float64)
    z, y = captured.latents[held.numpy()].astype(np.float64), labels[held].numpy()

    def accuracy(latents: NDArray[np.float64]) -> float:
        return float(np.mean((latents @ w.T + b).argmax(1) == y))

    norms = solve(captured.weight, captured.bias, captured.latents, quantile=QUANTILE).norms
    return State(accuracy(z), min((accuracy(z + s) for s in shifts), default=None), norms)
