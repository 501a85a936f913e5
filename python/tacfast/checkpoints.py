"""Weights in untrusted files. May import: safetensors, files, formats, unwrapping, errors.

A model file is hostile until proven otherwise: pickles are read by torch's restricted unpickler only, after a check of our own, and nothing
falls back to the full one.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tacfast.errors import CheckpointError
from tacfast.files import atomic, read_bytes
from tacfast.formats import parse_pickled, parse_safetensors, safetensors_metadata
from tacfast.unwrapping import PREFIXES, unwrap

_PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".th", ".tar")
_ADVICE = "Have its author save model.state_dict() with a recent torch"
_AGAIN = "If it is incomplete or damaged, download it again"


@dataclass(frozen=True, eq=False)
class Weights:
    """What a checkpoint holds, as far as it is used.

    Attributes:
        tensors: dense CPU tensors by name, without the prefixes that wrappers add.
        sha256: of the file; the bytes that were hashed are those that were parsed.
        hints: plain scalars that lay beside the weights (BackdoorBench's `model_name`, `num_classes`; what a repair noted), else
            empty; claims of the file, unchecked.
        notes: what was chosen or converted on the way, in words, for reports.
    """

    tensors: Mapping[str, Any]
    sha256: str
    hints: Mapping[str, str | int | float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_weights(path: str | Path) -> Weights:
    """The state dict in a .safetensors file or in one of torch.save, in its usual wrappings.

    Raises:
        CheckpointError: the file cannot be read, is of an unknown kind, is damaged, or holds anything but dense finite tensors in plain
            containers (and numpy's numbers beside them).
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", *_PICKLED):
        raise CheckpointError(f"{path.name}: unknown kind of file {suffix!r}; expected .safetensors or {', '.join(_PICKLED)}")
    content = read_bytes(path)
    digest = hashlib.sha256(content).hexdigest()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = parse_safetensors(content) if suffix == ".safetensors" else parse_pickled(content)
        tensors, hints, notes = unwrap(loaded)
        if suffix == ".safetensors":
            hints = {**hints, **safetensors_metadata(content)}
    except CheckpointError as error:
        raise CheckpointError(f"{path.name} was refused: {error}. {_next_step(suffix, str(error))}") from None
    except Exception:  # the readers raise whatever a hostile file makes them raise, and torch would advise an unsafe load
        if suffix == ".safetensors":
            raise CheckpointError(f"{path.name} was refused: it is incomplete or damaged: download it again") from None
        raise CheckpointError(
            f"{path.name} was refused: it is incomplete or damaged (download it again), or holds more than tensors in plain containers "
            f"(code, a whole model). {_next_step(suffix)}"
        ) from None
    return Weights(tensors, digest, hints, notes)


def _next_step(suffix: str, reason: str = "") -> str:
    if reason.startswith(("it is damaged", "its header")):
        return _AGAIN
    return _ADVICE if suffix == ".safetensors" else f"{_ADVICE}, best as .safetensors"


def load_weights(model: Any, tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """Copy tensors into a model; every name and shape must fit. Returns what was converted on the way, in words.

    Other floating-point types are converted to the model's own; counters that old versions of torch did not save keep their initial value.

    Raises:
        CheckpointError: it lists what is missing, unexpected, of another shape or kind, and says what would mend it.
    """
    own: dict[str, Any] = model.state_dict()
    state = _with_prefix_of(own, tensors)
    absent = {k: v for k, v in own.items() if k not in state and k.endswith("num_batches_tracked")}
    state |= absent
    _check_fit(own, state)
    converted = {k: v.to(own[k].dtype) for k, v in state.items()}
    overflown = [k for k, v in converted.items() if v.is_floating_point() and not bool(v.isfinite().all())]
    if overflown:
        named = ", ".join(overflown[:4])
        raise CheckpointError(
            f"weights are too large for {own[overflown[0]].dtype}: {named}; build the model in {state[overflown[0]].dtype}"
        )
    # Into its own dictionary, which also holds the versions of its modules: some cannot be loaded without.
    own.update(converted)
    model.load_state_dict(own)
    counts = Counter((str(v.dtype), str(converted[k].dtype)) for k, v in state.items() if v.dtype != converted[k].dtype)
    notes = [f"{n} tensor{'s' * (n > 1)} converted from {old} to {new}".replace("torch.", "") for (old, new), n in counts.items()]
    if absent:
        notes.append(f"{len(absent)} counters of batch normalisation are not in the file")
    return tuple(notes)


def _with_prefix_of(own: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A prefix that `read_weights` took for a wrapper's is given back where all names of the model have it."""
    for prefix in PREFIXES:
        if own and all(k.startswith(prefix) for k in own) and not any(k.startswith(prefix) for k in tensors):
            return {prefix + k: v for k, v in tensors.items()}
    return dict(tensors)


def _check_fit(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    both = sorted(set(own) & set(state))
    shapes = [k for k in both if state[k].shape != own[k].shape]
    kinds = [k for k in both if state[k].is_floating_point() != own[k].is_floating_point()]
    problems = [
        f"{what}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
        for what, names in (
            ("missing from the file", sorted(set(own) - set(state))),
            ("not in the model", [k[:80] for k in sorted(set(state) - set(own))]),
            ("of another shape", [f"{k}: file {tuple(state[k].shape)}, model {tuple(own[k].shape)}" for k in shapes]),
            ("of another kind", [f"{k}: file {state[k].dtype}, model {own[k].dtype}" for k in kinds]),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"the file does not fit the architecture; {'; '.join(problems)}. {_remedy(own, state, shapes)}")


def _remedy(own: Mapping[str, Any], state: Mapping[str, Any], shapes: list[str]) -> str:
    """Where nothing but the last linear layer differs, and only in its outputs, the file has another number of classes."""
    weights = [k for k in shapes if state[k].ndim == own[k].ndim == 2 and state[k].shape[1] == own[k].shape[1]]
    layer = {f"{k.rpartition('.')[0]}.{part}" for k in weights[-1:] for part in ("weight", "bias")}
    if weights and set(own) == set(state) and layer.issuperset(shapes):
        return f"The file has {len(state[weights[0]])} classes: try --arch-arg num_classes={len(state[weights[0]])}"
    if set(own) == set(state):
        return "Check --arch-arg"
    return "Check --arch and --arch-arg, or give a factory of your own (--arch file.py:factory) that builds the model as its author did"


def save_safetensors(model: Any, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write a model's state dict, whole or not at all."""
    from safetensors.torch import save

    # safetensors refuses tensors that share memory; copies do not.
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}
    content = save(tensors, metadata=dict(metadata))
    with atomic(path) as stream:
        stream.write(content)
