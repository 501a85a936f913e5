"""What is recorded of a trained network: a few numbers a class for the results, and its head for later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tacfast.attacks import AllToAll, AllToOne, Backdoor, CoversOnly, SourceSpecific, attack_success_rate
from tacfast.heads import Captured, capture
from tacfast.solver import solve

QUANTILES = (1.0, 0.99, 0.95)
#: Triggered images whose latents are kept, per trigger.
KEPT = 500

Pair = tuple[Tensor, Tensor]


def behaviour(model: nn.Module, backdoors: Sequence[Backdoor], rest: Pair) -> dict[str, Any]:
    """Clean accuracy and the ASR of each trigger on images that neither training nor scan saw.

    `leak`, for source-specific backdoors: the share of stamped images of the other classes that are called the target as well.
    """
    x, y = rest
    with torch.no_grad():
        predicted = torch.cat([model(part).argmax(1) for part in x.split(500)])
    found: dict[str, Any] = {
        "clean_accuracy": _round((predicted == y).double().mean()),
        "asr": [_round(attack_success_rate(model, b, x, y)) for b in backdoors if not isinstance(b.rule, CoversOnly)],
    }
    for b in backdoors:
        if isinstance(b.rule, SourceSpecific):
            others = b.rule.covers(y)
            with torch.no_grad():
                called = torch.cat([model(part).argmax(1) for part in b.trigger(x[others]).split(500)])
            found["leak"] = _round((called == b.rule.target).double().mean())
    return found


def truth(backdoors: Sequence[Backdoor], classes: int) -> dict[str, Any]:
    """Target classes, and the (source, target) pairs where not every class is a source."""
    pairs: list[list[int]] = []
    targets: list[int] = []
    for b in backdoors:
        if isinstance(b.rule, AllToAll):
            pairs += [[y, (y + b.rule.shift) % classes] for y in range(classes)]
        elif isinstance(b.rule, SourceSpecific):
            pairs.append([b.rule.source, b.rule.target])
        elif isinstance(b.rule, AllToOne):
            targets.append(b.rule.target)
    return {"targets": sorted(set(targets)), "pairs": pairs, "triggers": [repr(b.trigger) for b in backdoors]}


def statistics(captured: Captured) -> dict[str, Any]:
    """Per class: norms, head and class-mean geometry, and how the samples are spread. None where a class has no finite value."""
    assert captured.labels is not None
    w, z = captured.weight.astype(np.float64), captured.latents.astype(np.float64)
    centred = w - w.mean(0)
    counts = np.bincount(captured.labels, minlength=len(w))
    right = np.bincount(captured.labels[captured.labels == captured.predictions], minlength=len(w))
    found: dict[str, Any] = {"samples": len(z), "latents": z.shape[1]}
    for quantile in QUANTILES:
        solutions = solve(captured.weight, captured.bias, captured.latents, quantile=quantile, threads=1)
        found[f"norms_{quantile:g}"] = _rounded(np.where(solutions.certified, solutions.norms, np.nan))
    found["weight_distance"] = _rounded(np.linalg.norm(centred, axis=1))
    for how, classes in (("true", captured.labels), ("predicted", captured.predictions)):
        means = class_means(z, classes, len(w))
        spread = means - np.nanmean(means, axis=0)
        length = np.linalg.norm(spread, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = (centred * spread).sum(1) / (np.linalg.norm(centred, axis=1) * length)
        found[f"mean_distance_{how}"], found[f"self_duality_{how}"] = _rounded(length), _rounded(cosine)
    found["bias"] = None if captured.bias is None else _rounded(captured.bias)
    found["counts"] = counts.tolist()
    with np.errstate(invalid="ignore"):
        found["class_accuracy"] = _rounded(right / counts)
    return found


def class_means(z: NDArray[np.float64], classes: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """(count, d): mean latent of each class, NaN where it has no sample."""
    means = np.full((count, z.shape[1]), np.nan)
    for k in np.unique(classes):
        means[k] = z[classes == k].mean(0)
    return means


def head_arrays(model: nn.Module, captured: Captured, backdoors: Sequence[Backdoor], held: Pair) -> dict[str, NDArray[Any]]:
    """What another statistic would need: the head, the defender's latents, and those of stamped victims among the same images.

    `triggered_i` (m, d) are the latents under trigger i of the defender's images `triggered_i_rows` (m,).
    """
    assert captured.labels is not None
    arrays: dict[str, NDArray[Any]] = {
        "W": captured.weight.astype(np.float32),
        "Z": captured.latents.astype(np.float16),
        "y": captured.labels.astype(np.int16),
        "y_pred": captured.predictions.astype(np.int16),
    }
    if captured.bias is not None:
        arrays["b"] = captured.bias.astype(np.float32)
    for i, b in enumerate(backdoors):
        rows = torch.nonzero(b.rule.victims(held[1]))[:KEPT, 0]
        if len(rows):
            latents = capture(model, list(b.trigger(held[0][rows]).split(500)), device="cpu").latents
            arrays |= {f"triggered_{i}": latents.astype(np.float16), f"triggered_{i}_rows": rows.numpy().astype(np.int16)}
    return arrays


def _round(value: Any) -> float:
    return float(f"{float(value):.5g}")


def _rounded(values: Any) -> list[float | None]:
    """Five significant digits; null where not finite."""
    return [_round(v) if np.isfinite(v) else None for v in values]
