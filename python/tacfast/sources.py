"""A model and clean images from files, ready to be scanned or repaired.
May import: architectures, folders, backdoorbench, checkpoints, preprocessing, images, errors; torch when called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tacfast import backdoorbench, preprocessing
from tacfast.architectures import build_for
from tacfast.checkpoints import load_weights, read_weights
from tacfast.errors import CheckpointError, ProblemError
from tacfast.folders import is_folder, load_folder, read_folder_weights
from tacfast.images import Images, read_images
from tacfast.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor

_BATCH = 250
#: Below this accuracy on the clean images something is likely wrong: a model worth scanning is right on most of them.
_LOW = 0.5
#: Share of the labels that must have a class of their own before their order is blamed.
_RENAMED = 0.9


@dataclass(frozen=True, eq=False)
class Model:
    """A model with its weights, and what its files say about it."""

    model: Any
    #: What images must look like, None where nothing is known; asked for only where it is needed, since it may be refused.
    expected: Callable[[], Preprocessing | None]
    #: Class by name, where the files give names.
    classes: Mapping[str, int] | None
    #: For reports: name, SHA-256, architecture.
    file: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Batches:
    """Clean images as the model takes them: float32 (n, 3, H, W), with int64 labels where there are any. Made anew in every pass."""

    images: Images
    preprocessing: Preprocessing
    size: int = field(default=_BATCH)

    def __len__(self) -> int:
        return -(-len(self.images.x) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        import torch

        x, y = self.images.x, self.images.y
        for start in range(0, len(x), self.size):
            part = slice(start, start + self.size)
            batch = (torch.from_numpy(self.preprocessing.inputs(x[part])),)
            yield batch if y is None else (*batch, torch.from_numpy(y[part]))

    def thinned(self, most: int) -> Batches:
        """Every so many-th image, so that at most `most` are left."""
        step = -(-len(self.images.x) // most)
        y = self.images.y
        return Batches(Images(self.images.x[::step], None if y is None else y[::step], self.images.source), self.preprocessing)


@dataclass(frozen=True, eq=False)
class Source:
    """What `tacfast.scan` and `tacfast.repair` want, and where it came from."""

    model: Any
    batches: Batches
    #: For the report's `file`.
    file: Mapping[str, Any]
    #: What was chosen on the way, in words.
    notes: tuple[str, ...]
    #: Of classes, by number, as far as any file gives names; and where they were found.
    names: Mapping[int, str] = field(default_factory=dict)
    names_from: str = ""


@dataclass(frozen=True)
class Doubt:
    """Why the data may not be what the model expects."""

    reason: str
    #: Whether the model sees images that it was not made for, so that finding nothing on them means nothing. Labels in another order only
    #: spoil the accuracy.
    grave: bool

    def __str__(self) -> str:
        return self.reason


def load_model(path: str | Path, arch: str | None = None, arguments: Mapping[str, Any] | None = None) -> Model:
    """A model from a checkpoint or a model folder; nothing in it is ever run.

    Args:
        path: a .safetensors file, a torch pickle of tensors (.pth, .pt, .bin, .ckpt), or a folder with a config.json.
        arch: see `tacfast.architectures.build_model`, or a folder with a config.json. Not needed where `path` is such a folder, or where
            the file names its architecture (BackdoorBench).
        arguments: for the architecture, by name. A library's `num_classes` is read off the weights when it is not among them.

    Raises:
        CheckpointError: a file was refused, or the weights do not fit.
        ProblemError: no architecture was given, and none can be known.
    """
    path = Path(path)
    arguments = dict(arguments or {})
    if path.is_dir() and not is_folder(path):
        raise CheckpointError(f"{str(path)!r} holds no config.json: not a model folder; give the checkpoint in it, and --arch")
    weights = read_folder_weights(path) if path.is_dir() else read_weights(path)
    name = path.resolve().name
    folder = path if arch is None and path.is_dir() else Path(arch) if arch is not None and is_folder(Path(arch)) else None
    if folder is not None:
        if arguments:
            raise ProblemError(f"--arch-arg is of no use with {folder.name}, whose config.json says how the model is built")
        loaded = load_folder(folder, weights.tensors)
        told = {"model": name, "sha256": weights.sha256, "arch": loaded.arch, "config_sha256": loaded.config_sha256}
        return Model(loaded.model, loaded.expected, loaded.classes, told, (*weights.notes, *loaded.notes))
    named = arch or backdoorbench.arch_of(weights.hints)
    if named is None and is_folder(path.parent):
        raise ProblemError(f"{name} lies beside a config.json that says how its network is built: give the folder, {str(path.parent)!r}")
    if named is None:
        raise ProblemError(
            f"--arch needed to build the model of {name}: torchvision:NAME, timm:NAME, path/to/file.py:factory, or a folder with a "
            "config.json; a folder of transformers or timm needs none"
        )
    model, tensors, built = build_for(named, arguments, weights.tensors)
    converted = load_weights(model, tensors)
    file: dict[str, Any] = {"model": name, "sha256": weights.sha256, "arch": named, "arch_args": built}
    found = [f"{key} {value} as in the file" for key, value in built.items() if key not in arguments]
    notes = [*weights.notes, *converted, *([", ".join(found)] if found else [])]
    return Model(model.eval(), partial(_expected, named, model, weights.hints), None, file, tuple(notes))


def _expected(arch: str, model: Any, hints: Mapping[str, Any]) -> Preprocessing | None:
    """What the images of this architecture look like: as the file says, else as the library's own weights expect."""
    source, _, name = arch.partition(":")
    settings = getattr(model, "pretrained_cfg", None)
    told = preprocessing.of_metadata(hints) or backdoorbench.preprocessing_of(hints)
    if told is not None:
        return told
    if source == "torchvision":
        return preprocessing.of_torchvision(name)
    return preprocessing.of_timm(settings, name) if isinstance(settings, dict) else None


def load(
    path: str | Path,
    data: str | Path,
    *,
    arch: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    limit: int | None = None,
) -> Source:
    """A model and clean images. See `load_model` and `tacfast.images.read_images`.

    Args:
        size, mean, std: instead of what the model's files or its library say; without any of that, images stay as they are, in [0, 1].
    """
    loaded = load_model(path, arch, arguments)
    expected = None if None not in (size, mean, std) else loaded.expected()
    wanted = (expected or Preprocessing()).override(size, mean, std)
    images = read_images(data, prepare=wanted.sized, classes=loaded.classes, limit=limit)
    file = {**loaded.file, **images.source, "preprocessing": wanted.to_dict(), **({"notes": list(loaded.notes)} if loaded.notes else {})}
    names, origin = images.names, "the folders of the images"
    if loaded.classes:
        names, origin = {k: name for name, k in loaded.classes.items()}, "the model's config.json"
    return Source(loaded.model, Batches(images, wanted), file, (*loaded.notes, images.found, f"images: {wanted}"), names, origin)


def doubt(predictions: NDArray[np.int64], labels: NDArray[np.int64] | None) -> Doubt | None:
    """Why predictions on labelled clean data suggest that the data are not what the model expects; None where they do not.

    Args:
        predictions, labels: int64 (n,).
    """
    if labels is None or len(labels) == 0:
        return None
    accuracy = float(np.mean(predictions == labels))
    if accuracy >= _LOW:
        return None
    renamed = _renamed_accuracy(predictions, labels)
    if renamed is not None and renamed >= max(_LOW, 2 * accuracy):
        absent = ", and an absent class needs an empty folder of its name" if predictions.max() > labels.max() else ""
        return Doubt(
            f"accuracy on the clean images is {accuracy:.0%}, but {renamed:.0%} with the classes renumbered: the data count them in "
            f"another order than the model (subfolders count in the order of their names{absent}); rename them, "
            "or give an .npz with the right y",
            grave=False,
        )
    commonest = np.bincount(labels).max() / len(labels)
    chance = accuracy <= commonest + 2 * np.sqrt(commonest * (1 - commonest) / len(labels))
    return Doubt(
        f"accuracy on the clean images is only {accuracy:.0%}{', no better than one answer for all' if chance else ''}: size, mean and std "
        "are likely not those that the model was trained with (give them by --size, --mean, --std), or the images are not its classes; "
        "a verdict on such data means little",
        grave=True,
    )


def _renamed_accuracy(predictions: NDArray[np.int64], labels: NDArray[np.int64]) -> float | None:
    """Accuracy if every label meant the class that is predicted for it most, found on every other sample and measured on the rest; None
    where several labels would mean the same class."""
    classes = int(max(predictions.max(), labels.max())) + 1
    pairs, counts = np.unique(labels[::2] * classes + predictions[::2], return_counts=True)
    order = np.argsort(counts, kind="stable")
    meaning = dict(zip((pairs // classes)[order].tolist(), (pairs % classes)[order].tolist(), strict=True))
    if len(set(meaning.values())) < max(2, _RENAMED * len(meaning)):
        return None
    expected = np.array([meaning.get(label, -1) for label in labels[1::2].tolist()])
    return float(np.mean(predictions[1::2] == expected)) if len(expected) else None


def check_same(told: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """That a report was made of the same network on images of the same size and scale as this run; what a report does not tell passes.

    Args:
        told, now: a report's `file` and that of a `Source`.

    Raises:
        CheckpointError: they differ; it names the differences and the options that the report was made with.
    """
    made, here = [], []
    for key in ("arch", "arch_args", "preprocessing"):
        if key in told:
            old, new = _options(key, told[key]), _options(key, now.get(key))
            made += [text[:200] for name, text in old.items() if new.get(name) != text]
            made += [f"without {text[:200]}" for name, text in new.items() if name not in old]
            here += [text for name, text in new.items() if old.get(name) != text]
    if made:
        this = f"; this run has {' '.join(here)}" if here else ""
        raise CheckpointError(
            f"the report was made with {' '.join(made)}{this}: give the same options, or scan again with those of this run"
        )


def _options(key: str, value: Any) -> dict[str, str]:
    """What differs from run to run, by name, as the options that say it; of a report nothing is taken for granted."""
    if key == "arch":  # wherever the file of one's own lies
        return {"arch": f"--arch {str(value).rpartition('/')[2]}"}
    entries = value if isinstance(value, dict) else {}
    if key == "arch_args":
        return {str(k): f"--arch-arg {k}={v}" for k, v in entries.items()}
    resize, crop = entries.get("resize"), entries.get("crop")
    sides = resize if isinstance(resize, (list, tuple)) else ()
    square = len(sides) == 2 and sides[0] == sides[1] and crop is None
    size = f"--size {sides[0]}" if square else "no --size" if resize is crop is None else f"no --size (resize {resize}, crop {crop})"
    rest = {k: f"{k} {entries[k]}" for k in ("interpolation", "scale") if k in entries}
    return {"size": size, **{k: f"--{k} {_numbers(entries.get(k))}" for k in ("mean", "std")}, **rest}


def _numbers(values: Any) -> str:
    return ",".join(str(v) for v in values) if isinstance(values, (list, tuple)) else str(values)


def channels(name: str, text: str) -> tuple[float, ...]:
    """One number, or one a channel, from "0.5" or "0.5,0.5,0.5".

    Raises:
        ProblemError: it is neither.
    """
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3) or not np.isfinite(values).all() or (name == "std" and min(values) <= 0):
        raise ProblemError(f"--{name} must be one or three numbers{' above 0' if name == 'std' else ''}, such as 0.5,0.5,0.5; got {text!r}")
    return values
