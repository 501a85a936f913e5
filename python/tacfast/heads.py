"""Find the last linear layer of a model and capture its inputs. May import: torch, errors, progress.

The head is found by running the model, not by its name: it is the last linear layer (or 1x1 convolution) whose own arithmetic gives the
model's output, `W z + b = logits`, on every batch that is shown to it. Two linear layers whose mean is the output, as distilled
transformers have them, are one: `[W1/2, W2/2] [z1; z2] + (b1 + b2)/2`. What cannot be proven is refused with a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tacfast.errors import ModelError
from tacfast.progress import track
from tacfast.sampling import Sample

#: Largest |Wz + b - logits| over the largest |logit| that passes as rounding of the model's own dtype.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


#: A layer that was run, under its name, and its input.
_Call = tuple[str, nn.Linear | nn.Conv2d, Tensor]

_KNOWN = "docs/models.md says which heads are known"
_WRAP = "wrap it in a module that returns the one to be judged"

#: Between the names of layers whose mean is the output.
_PLUS = " + "


class MeanHead(nn.Module):
    """Linear layers whose mean is the output, as the one linear layer that they are on their inputs side by side.

    Its parameters are theirs: what trains it trains the model.
    """

    def __init__(self, parts: list[nn.Linear]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    @property
    def linears(self) -> list[nn.Linear]:
        return [part for part in self.parts if isinstance(part, nn.Linear)]

    @property
    def weight(self) -> Tensor:
        """(C, d1 + d2 + ...)"""
        return torch.cat([part.weight for part in self.linears], 1) / len(self.parts)

    @property
    def bias(self) -> Tensor | None:
        biases: list[Tensor] = [part.bias for part in self.linears if part.bias is not None]
        return torch.stack(biases).sum(0) / len(self.parts) if biases else None

    def forward(self, latents: Tensor) -> Tensor:
        return nn.functional.linear(latents, self.weight, self.bias)


Head = nn.Linear | nn.Conv2d | MeanHead


def head_of(model: nn.Module, name: str) -> Any:
    """The head that `capture` found under this name."""
    parts: list[Any] = [model.get_submodule(part) for part in name.split(_PLUS)]
    return parts[0] if len(parts) == 1 else MeanHead(parts)


@dataclass(frozen=True, eq=False)
class Captured:
    """A head with the latents of clean samples, in the order of the batches."""

    #: float32 or float64 (C, d).
    weight: NDArray[Any]
    #: (C,), or None.
    bias: NDArray[Any] | None
    #: float32 or float64 (n, d): inputs of the head.
    latents: NDArray[Any]
    #: int64 (n,): class of the largest logit.
    predictions: NDArray[np.int64]
    #: int64 (n,), or None where the batches carry none.
    labels: NDArray[np.int64] | None
    #: Name of the head in `model.named_modules()`; see `head_of`.
    name: str
    #: Largest |Wz + b - logits| seen, over the largest |logit|.
    proof_error: float
    #: An even sample of the images (n, ...), on the CPU; None where none was asked for, or none can be stacked.
    images: Tensor | None = None

    @property
    def accuracy(self) -> float | None:
        """Share of samples whose prediction is their label; None without labels."""
        return None if self.labels is None else float(np.mean(self.predictions == self.labels))


def choose_device(model: nn.Module, device: str) -> torch.device:
    """ "auto" is the GPU where there is one, else where the model lies; anything else is torch's own name.

    Raises:
        ModelError: torch knows no such device here.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        first = next(model.parameters(), None)
        return torch.device("cpu") if first is None else first.device
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} is not available: {str(error).splitlines()[0]}; use cpu") from None
    return chosen


@contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on `device`, in eval mode and without gradients; every module's mode and the device are put back, also on error."""
    modes = {module: module.training for module in model.modules()}
    first = next(model.parameters(), None)
    home = device if first is None else first.device
    try:
        model.eval()
        if home != device:
            model.to(device)
        with torch.no_grad():
            yield
    finally:
        if home != device:
            model.to(home)
        for module, training in modes.items():
            module.training = training


def split_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Images and labels (int64) of a batch: a tensor, (images, labels, ...), or a mapping with "pixel_values" / "labels".

    Raises:
        ModelError: it is none of these.
    """
    labels: Any = None
    if isinstance(batch, Tensor):
        images: Any = batch
    elif isinstance(batch, (tuple, list)) and batch:
        images = batch[0]
        labels = batch[1] if len(batch) > 1 else None
    elif isinstance(batch, dict) and "pixel_values" in batch:
        images, labels = batch["pixel_values"], batch.get("labels")
    else:
        raise ModelError(f"a batch must be a tensor, (images, labels) or a dict with 'pixel_values', got {type(batch).__name__}")
    if not isinstance(images, Tensor):
        raise ModelError(f"the images of a batch must be a tensor, got {type(images).__name__}")
    return images, None if labels is None else _check_labels(labels, len(images))


def _check_labels(labels: Any, count: int) -> Tensor:
    try:
        y = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"labels cannot be read as a tensor: {error}") from None
    if y.shape != (count,):
        raise ModelError(f"labels must be one class per image, shape ({count},), got {tuple(y.shape)}")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ModelError(f"labels must be integers, got {y.dtype}")
    return y.long()


def logits_of(output: Any) -> Tensor:
    """The logits (n, C) in whatever a model returns: a tensor, an object or dict with `logits`, or a tuple that starts with them.

    Raises:
        ModelError: there is no (n, C) tensor with at least two classes in it.
    """
    found = output
    if isinstance(found, dict) and "logits" not in found:
        raise ModelError(f"the model must return logits, it returned a dict of {_names(found)}: {_WRAP}")
    if isinstance(found, dict):
        found = found["logits"]
    elif hasattr(found, "logits"):
        found = found.logits
    elif isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise ModelError(f"the model must return logits (batch, classes), it returned {type(output).__name__}")
    if found.ndim != 2 or found.shape[1] < 2:
        raise ModelError(f"the model must return logits (batch, classes >= 2), it returned shape {tuple(found.shape)}")
    return found


def find_head(model: nn.Module, images: Tensor) -> tuple[str, Head]:
    """The layer that produces the logits, by running one batch (model on its device, in eval mode, already under no_grad).

    Raises:
        ModelError: no linear layer does, or several give outputs of their own; the message says what the model does instead.
    """
    calls: list[_Call] = []
    hooks = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and _is_pointwise(module)):
                # Bind name and module now; the hook runs later.
                def remember(m: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, name: str = name) -> None:
                    calls.append((name, m, args[0] if args else kwargs["input"]))

                hooks.append(module.register_forward_hook(remember, with_kwargs=True))
        output = _run(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    logits = logits_of(output)
    found = _proven(calls, logits)
    if found is None:
        raise ModelError(_why_not(model, calls, logits))
    if isinstance(output, (tuple, list)):
        _check_single(found[0], calls, output, logits)
    return found


def _proven(calls: list[_Call], logits: Tensor) -> tuple[str, Head] | None:
    """The last layer whose W z + b these logits are, or the last two whose mean they are."""
    fitting = []
    for name, module, inputs in reversed(calls):
        z = _latent(module, inputs)
        if z is not None and _matrix(module).shape[0] == logits.shape[1]:
            if _error(module, z, logits) <= _tolerance(logits):
                return name, module
            if isinstance(module, nn.Linear):
                fitting.append((name, module, z))
    # Calls were taken last first; in a MeanHead they stand in the order in which they run.
    pair = fitting[1::-1]
    if len(pair) == 2 and pair[0][1] is not pair[1][1] and len(pair[0][2]) == len(pair[1][2]):
        mean = MeanHead([module for _, module, _ in pair])
        if _error(mean, torch.cat([z for _, _, z in pair], 1), logits) <= _tolerance(logits):
            return _PLUS.join(name for name, _, _ in pair), mean
    return None


def _check_single(name: str, calls: list[_Call], output: Any, logits: Tensor) -> None:
    """A tuple may hold latents beside the logits, but no second head: which one to judge is the user's choice."""
    latents = [z for call, module, inputs in calls if call == name and (z := _latent(module, inputs)) is not None]
    for other in output[1:]:
        if not isinstance(other, Tensor) or other.ndim != 2 or other.shape[1] < 2 or len(other) != len(logits):
            continue
        found = _proven([call for call in calls if call[0] != name], other)
        if found is not None and not any(other.shape == z.shape and torch.equal(other, z) for z in latents):
            raise ModelError(
                f"the model has several heads: {name!r} with {logits.shape[1]} outputs and {found[0]!r} with {other.shape[1]}; {_WRAP}"
            )


def capture(model: nn.Module, loader: Iterable[Any], *, device: str = "auto", keep: int = 0, progress: bool = False) -> Captured:
    """Run every batch through the model and keep the inputs of its head.

    Args:
        model: any module that maps images to logits. Left as found: mode, device, hooks.
        loader: a DataLoader or any iterable of batches, see `split_batch`.
        device: "auto", or torch's name of a device.
        keep: images that are kept, drawn evenly from all.
        progress: draw a progress bar.

    Raises:
        ModelError: no linear head, no samples, or `W z + b` is not the model's output on some batch.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    where = choose_device(model, device)
    latents: list[Tensor] = []
    predictions: list[Tensor] = []
    labels: list[Tensor | None] = []
    name, head, worst = "", None, 0.0
    sample = Sample(keep)
    with evaluating(model, where):
        for number, batch in enumerate(track(loader, "latents", shown=progress)):
            images, classes = split_batch(batch)
            if len(images) == 0:
                continue
            sample.add(images)
            images = images.to(where)
            if head is None:
                name, head = find_head(model, images)
            z, logits = _latents_and_logits(model, head, images)
            error = _error(head, z, logits)
            if not bool(logits.isfinite().all()):
                raise ModelError(f"the model's output is not finite in batch {number}: check the preprocessing and the images")
            if not error <= _tolerance(logits):
                raise ModelError(
                    f"the logits of batch {number} are not W z + b of the last run of {name!r} (relative error {error:.1e}); {_KNOWN}"
                )
            worst = max(worst, error)
            latents.append(z.cpu())
            predictions.append(logits.argmax(1).cpu())
            labels.append(None if classes is None else classes.cpu())
        if head is None:
            raise ModelError("the loader gave no batch; at least one clean image is needed")
        weight, bias = _numpy(_matrix(head)), None if head.bias is None else _numpy(head.bias)
    given = [c for c in labels if c is not None]
    if given and len(given) < len(labels):
        raise ModelError("some batches have labels and some have none; give them for all or for none")
    y = torch.cat(given).numpy() if given else None
    if y is not None and (y.min() < 0 or y.max() >= len(weight)):
        raise ModelError(
            f"labels must be classes of the model, 0 to {len(weight) - 1}; found {y.min()} to {y.max()} "
            f"(of a folder of images the subfolders are the labels, {len(weight)} at most)"
        )
    return Captured(
        weight=weight,
        bias=bias,
        latents=_numpy(torch.cat(latents)),
        predictions=torch.cat(predictions).numpy(),
        labels=y,
        name=name,
        proof_error=worst,
        images=sample.images(),
    )


@contextmanager
def latent_tap(head: nn.Module) -> Iterator[list[Tensor]]:
    """A list that always holds the latest input of `head`, gradients and all."""
    latest: list[Tensor] = []
    parts = list(head.parts) if isinstance(head, MeanHead) else [head]
    seen: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[module] = args[0] if args else kwargs["input"]
        if len(seen) == len(parts):
            latest[:] = [seen[parts[0]] if len(parts) == 1 else torch.cat([seen[part] for part in parts], -1)]
            seen.clear()

    hooks = [part.register_forward_pre_hook(keep, with_kwargs=True) for part in parts]
    try:
        yield latest
    finally:
        for hook in hooks:
            hook.remove()


def _latents_and_logits(model: nn.Module, head: Head, images: Tensor) -> tuple[Tensor, Tensor]:
    with latent_tap(head) as latest:
        logits = logits_of(_run(model, images))
    z = _latent(head, latest[0]) if latest else None
    if z is None:
        raise ModelError(f"the head was not run on every batch, or on inputs of another shape; {_KNOWN}")
    return z, logits


def _run(model: nn.Module, images: Tensor) -> Any:
    try:
        return model(images)
    except Exception as error:  # it is the user's code
        what = (str(error).splitlines() or [""])[0] or type(error).__name__
        own = {p.dtype for p in model.parameters() if p.is_floating_point()}
        mend = f"; its weights are {own.pop()} and the images {images.dtype}: try model.float()" if own and images.dtype not in own else ""
        raise ModelError(
            f"the model failed on a batch of shape {tuple(images.shape)}: {what}{mend or '; feed it one such batch yourself to see where'}"
        ) from error


def _is_pointwise(module: nn.Conv2d) -> bool:
    return module.kernel_size == (1, 1) and module.groups == 1 and module.stride == (1, 1) and module.padding in ((0, 0), "valid")


def _matrix(head: Head) -> Tensor:
    return head.weight.flatten(1)


def _latent(head: nn.Module, inputs: Tensor) -> Tensor | None:
    """(n, d); averaging over space commutes with a 1x1 convolution, so its latent is the average."""
    if isinstance(head, nn.Conv2d):
        return inputs.mean((2, 3)) if inputs.ndim == 4 else None
    if inputs.ndim > 2:
        inputs = inputs.flatten(0, -2) if inputs.shape[1:-1].numel() == 1 else inputs
    return inputs if inputs.ndim == 2 else None


def _error(head: Head, z: Tensor, logits: Tensor) -> float:
    if len(z) != len(logits):
        return float("inf")
    made = z.double() @ _matrix(head).double().T
    if head.bias is not None:
        made = made + head.bias.double()
    scale = logits.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = float(((made - logits.double()).abs().max() / scale).item())
    return error if np.isfinite(error) else float("inf")


def _tolerance(logits: Tensor) -> float:
    return _TOLERANCE.get(logits.dtype, 1e-4)


def _numpy(t: Tensor) -> NDArray[Any]:
    """A copy: what was captured must not change when the model does."""
    t = t.detach().cpu()
    array: NDArray[Any] = (t if t.dtype == torch.float64 else t.float()).numpy().copy()
    return array


def _why_not(model: nn.Module, calls: list[_Call], logits: Tensor) -> str:
    """What the model does instead of ending in a linear layer, as far as its output tells."""
    if not bool(torch.isfinite(logits).all()):
        return "the model's output is not finite on the first batch: check the preprocessing and the weights"
    sums, low = logits.double().sum(1), float(logits.min())
    if low >= 0 and bool(((sums - 1).abs() < 1e-3).all()):
        return "the model ends in a softmax; it must return logits: remove the softmax"
    if bool((logits.double().logsumexp(1).abs() < 1e-3).all()):
        return "the model ends in a log-softmax; it must return logits: remove it"
    same_size = [call for call in calls if _matrix(call[1]).shape[0] == logits.shape[1]]
    if same_size:
        name, module, inputs = same_size[-1]
        is_relu = _is_relu_of(module, inputs, logits)
        return (
            f"{name!r} ({type(module).__name__}) has as many outputs as there are classes, but the model's output is not W z + b of it: "
            + ("a ReLU, which is non-linear, follows it as in SqueezeNet" if is_relu else
               "something non-linear (an activation, a normalisation, a scale) follows or precedes it inside the head")
        )  # fmt: skip
    last = [type(m).__name__ for m in model.modules() if not list(m.children())][-1:]
    return (
        f"no linear layer with {logits.shape[1]} outputs was run; the last module is {last[0] if last else 'none'}. "
        "Cosine and other non-linear heads are not supported: the method needs logits = W z + b"
    )


def _is_relu_of(module: nn.Module, inputs: Tensor, logits: Tensor) -> bool:
    made = module(inputs).relu()
    made = made.mean((2, 3)) if made.ndim == 4 else made
    return made.shape == logits.shape and torch.allclose(made, logits, rtol=1e-3, atol=1e-5)


def _names(output: dict[Any, Any]) -> str:
    """Keys of what a model returned, and the shapes of its tensors."""
    return ", ".join(f"{key!r}{f' {tuple(v.shape)}' if isinstance(v, Tensor) else ''}" for key, v in list(output.items())[:6]) or "nothing"
