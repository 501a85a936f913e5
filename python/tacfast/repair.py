"""The same model with the backdoor gone. May import: outcome, report, scan, solver, errors; methods, heads (and torch) when called."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from tacfast.errors import ModelError, ProblemError
from tacfast.outcome import Method, RepairResult, State
from tacfast.progress import timed
from tacfast.report import ScanReport
from tacfast.scan import QUANTILE, pattern_look, scan_captured
from tacfast.solver import solve

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tacfast.heads import Captured
    from tacfast.methods import Route

#: Share of the clean samples that no method trains on.
_HELD_OUT = 0.1
_FEWEST_IMAGES = 20
#: Methods that run no image through the network while they repair.
_QUICK = ("head", "prune")
#: Images per forward pass where nothing is trained.
_FORWARD_BATCH = 250


def repair(
    model: nn.Module,
    loader: Iterable[Any],
    report: ScanReport | None = None,
    *,
    targets: Sequence[int] | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    method: Method = "auto",
    beta: float | None = None,
    strength: float | None = None,
    lr: float | None = None,
    epochs: int | None = None,
    budget: float | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: bool = False,
    file: Mapping[str, Any] | None = None,
) -> RepairResult:
    """Remove the backdoor from a copy of a model, with clean data.

    Args:
        model: never changed.
        loader: clean batches as for `scan`, best with labels; without, the model's predictions stand in. Read once into memory.
        report: a scan of this model; by default it is scanned first. Its `pairs`, where it names any, else its `targets`, are repaired.
        targets: classes to repair against all others, whatever the report says.
        pairs: (source, target) to repair, for backdoors that depend on an image's class, whatever the report says. Not with `targets`.
        method: "auto" is "unlearn", where that ruins the network with a third of the learning rate and less, and where it costs much
            accuracy once more with a smaller one if this closes the way to the target as well; "unlearn" trains all weights on shifted
            latents and under universal perturbations of the input and of inner layers towards the target, with the old model as teacher;
            "finetune" (the paper's) on shifted latents only; "head" does so for the last layer alone, over cached latents, in seconds;
            "prune" freezes the latent channels with the largest |s_p| at their mean, as many as the accuracy budget allows; "equalize"
            raises the target's norm to the median, which hides a backdoor rather than removes it.
        beta: weight of the shifted cross-entropy ("auto", "unlearn", "finetune", "head").
        strength: weight of what is taught on perturbed images ("auto", "unlearn").
        lr: learning rate, falling to zero by a cosine ("auto", "unlearn", "finetune", "equalize": SGD, by default 0.03, and 0.003 for
            networks with more LayerNorm or RMSNorm layers than BatchNorm; "head": Adam).
        epochs: passes over the clean data (all but "head" and "prune"). "auto" and "unlearn" take ten, or as many as make a hundred steps,
            and twice that for such networks.
        budget: loss of accuracy, on held-out clean data: the largest that "prune" may cause, and the one from which "auto" tries the
            smaller learning rate, though never for a single sample. An option that is None is the method's own default; one that the
            method does not have is refused.
        device, seed, progress, file: as for `scan`; `seed` fixes the held-out split and the order of training.

    Returns:
        RepairResult; its `model` is None when no class is suspected.

    Raises:
        ModelError: see `scan`.
        ProblemError: an option is out of range, or both `targets` and `pairs` are given.
        SolveError: a target has no finite shift, so there is nothing to train against.
    """
    import torch

    from tacfast.heads import capture
    from tacfast.methods import METHODS, Job, reach, routes_of, trainable
    from tacfast.patterns import IMAGES

    suspects = _told(targets, pairs)
    if suspects is None and report is not None:
        suspects = report.targets, report.pairs
    options = _options(method, {"beta": beta, "strength": strength, "lr": lr, "epochs": epochs, "budget": budget}, seed)
    timing: dict[str, float] = {}
    images, given = _collect(loader)
    batches = list(images.split(_FORWARD_BATCH))
    with timed(timing, "latents"):
        captured = capture(model, batches, device=device, keep=IMAGES if suspects is None else 0, progress=progress)
    if given is not None and not 0 <= int(given.min()) <= int(given.max()) < len(captured.weight):
        raise ModelError(f"labels must be classes of the model, 0 to {len(captured.weight) - 1}")
    if suspects is None:
        look = pattern_look(model, captured, timing["latents"], wanted=None, device=device, progress=progress)
        found = scan_captured(captured, {}, patterns=look, progress=progress)
        suspects = found.targets, found.pairs
    labels = torch.from_numpy(captured.predictions) if given is None else given
    chosen, along = _check_targets(suspects[0], len(captured.weight)), _check_pairs(suspects[1], len(captured.weight))

    with timed(timing, "solve"):
        routes = routes_of(captured, labels, chosen, along)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    held, train = order.tensor_split([max(1, round(_HELD_OUT * len(images)))])
    state = partial(_state, held=held, labels=labels, routes=routes, answers=captured.predictions)
    if not routes:
        before, after, repaired = state(captured, None), None, None
    else:
        repaired = copy.deepcopy(model)
        # Where seconds repair, minutes of perturbing images to look at the result would not be what was asked for.
        reached = reach if method not in _QUICK else lambda *_: None
        job = Job(captured, images, labels, train, held, routes, device, seed, progress)
        with trainable(repaired):
            with timed(timing, "check"):
                before = state(captured, reached(repaired, job))
            with timed(timing, method):
                options |= METHODS[method](repaired, job, **options) or {}
            with timed(timing, "check"):
                closed = reached(repaired, job)
        repaired = repaired.cpu().eval()
        with timed(timing, "check"):
            after = state(capture(repaired, batches, device=device), closed)
    trials = options.pop("trials", ())
    settings = {**options, "seed": seed}
    return RepairResult(
        repaired, method, chosen, before, after, len(images), given is not None, settings, timing, trials, dict(file or {})
    )  # fmt: skip


def _options(method: str, given: Mapping[str, Any], seed: Any) -> dict[str, Any]:
    """The options of a method by name: those given, else its defaults."""
    if method not in get_args(Method):
        raise ProblemError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    number = (int, float)
    for name, value, kind, low, high, right in (
        ("beta", given["beta"], number, 0, np.inf, "a number, at least 0"),
        ("strength", given["strength"], number, 0, np.inf, "a number, at least 0"),
        ("lr", given["lr"], number, 1e-12, np.inf, "a number above 0"),
        ("epochs", given["epochs"], int, 1, np.inf, "a whole number, at least 1"),
        ("budget", given["budget"], number, 0, 1, "in [0, 1)"),
        ("seed", seed, int, 0, 2**63, "a whole number, at least 0"),
    ):
        if (value is not None or name == "seed") and (not isinstance(value, kind) or not low <= value < high):
            raise ProblemError(f"{name} must be {right}, got {value!r}")
    from tacfast.methods import METHODS

    defaults = {name: p.default for name, p in inspect.signature(METHODS[method]).parameters.items() if p.kind is p.KEYWORD_ONLY}
    chosen = {name: value for name, value in given.items() if value is not None}
    foreign = sorted(set(chosen) - set(defaults))
    if foreign:
        raise ProblemError(f"{foreign[0]} is no option of method {method!r}; it has {', '.join(defaults) or 'none'}")
    return {**defaults, **chosen}


Suspects = tuple[Sequence[int], Sequence[tuple[int, int]]]


def _told(targets: Sequence[int] | None, pairs: Sequence[tuple[int, int]] | None) -> Suspects | None:
    """Targets and pairs that the caller names; None where a report decides."""
    if targets is not None and pairs is not None:
        raise ProblemError("targets and pairs must not be given both: a pair names its target")
    if pairs is None:
        return None if targets is None else (targets, ())
    try:
        ends = [(operator.index(source), operator.index(target)) for source, target in pairs]
    except (TypeError, ValueError):
        raise ProblemError(f"pairs must be a sequence of (source, target), got {pairs!r}") from None
    return sorted({target for _, target in ends}), ends


def _check_targets(targets: Iterable[int], classes: int) -> tuple[int, ...]:
    try:
        chosen = tuple(dict.fromkeys(operator.index(t) for t in targets))
    except TypeError:
        raise ProblemError(f"targets must be a sequence of classes, got {targets!r}") from None
    if any(not 0 <= t < classes for t in chosen):
        raise ProblemError(f"targets must be from 0 to {classes - 1}, got {list(chosen)}")
    return chosen


def _check_pairs(pairs: Iterable[tuple[int, int]], classes: int) -> tuple[tuple[int, int], ...]:
    chosen = tuple(dict.fromkeys((int(source), int(target)) for source, target in pairs))
    if any(source == target or not 0 <= source < classes for source, target in chosen):
        raise ProblemError(f"pairs must be of two classes from 0 to {classes - 1}, got {list(chosen)}")
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


def _state(
    captured: Captured, reached: float | None, *, held: Tensor, labels: Tensor, routes: tuple[Route, ...], answers: NDArray[np.int64]
) -> State:
    """What is told of a model; `answers` are the classes that the unrepaired one gives all samples."""
    import torch

    from tacfast.methods import targets_of

    w = captured.weight.astype(np.float64)
    b = 0.0 if captured.bias is None else captured.bias.astype(np.float64)
    z, y = captured.latents[held.numpy()].astype(np.float64), labels[held].numpy()
    logits = z @ w.T + b

    def right(latents: NDArray[np.float64]) -> NDArray[np.bool_]:
        hits: NDArray[np.bool_] = (latents @ w.T + b).argmax(1) == y
        return hits

    hits = logits.argmax(1) == y
    targets = targets_of(routes)
    named = torch.from_numpy(logits).softmax(1).mean(0)
    return State(
        clean_accuracy=float(hits.mean()),
        target_accuracy=min((float(hits[y == p].mean()) for p in targets if (y == p).any()), default=None),
        agreement=float(np.mean(captured.predictions[held.numpy()] == answers[held.numpy()])),
        recovery_accuracy=min((float(right(z + r.shifts[y].numpy()).mean()) for r in routes), default=None),
        reach=reached,
        norms=solve(captured.weight, captured.bias, captured.latents, quantile=QUANTILE).norms,
        target_probability=min((float(named[p]) for p in targets), default=None),
    )
