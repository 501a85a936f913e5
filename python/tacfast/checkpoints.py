"""Untrusted files in, tensors and images out. May import: torch, safetensors, PIL, numpy, errors.

A model file is hostile until proven otherwise: pickles are read by torch's restricted unpickler only, and nothing falls back to the full
one. The bytes that are hashed are the bytes that are loaded. Architecture files named by the user are the user's own code, and are run.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tacfast.errors import CheckpointError

_PICKLED = (".pth", ".pt", ".bin", ".ckpt")
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
#: Keys under which training scripts keep the state dict beside other things.
_WRAPPINGS = ("state_dict", "model_state_dict", "model", "net")


@dataclass(frozen=True, eq=False)
class Images:
    """Clean images as loaded: uint8 (n, H, W, 3), int64 (n,) labels or None, and what they came from."""

    x: NDArray[np.uint8]
    y: NDArray[np.int64] | None
    source: Mapping[str, Any]


def read_state_dict(path: str | Path) -> tuple[dict[str, Any], str]:
    """Tensors by name, and the SHA-256 of the file they came from.

    Raises:
        CheckpointError: the file cannot be read, is of an unknown kind, or holds anything but tensors in plain containers.
    """
    import safetensors
    import safetensors.torch
    import torch

    path = Path(path)
    content = _read(path)
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", *_PICKLED):
        raise CheckpointError(f"{path.name}: unknown kind of file {suffix!r}; expected .safetensors or {', '.join(_PICKLED)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if suffix == ".safetensors":
                state: Any = safetensors.torch.load(content)
            else:
                state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # the readers raise whatever a hostile file makes them raise, and torch would advise an unsafe load
        raise CheckpointError(
            f"{path.name} was refused: it is damaged, or holds more than tensors in plain containers (code, a whole model); "
            "have its author save model.state_dict(), best as .safetensors"
        ) from None
    return _unwrap(state, path.name), hashlib.sha256(content).hexdigest()


def _unwrap(state: Any, name: str) -> dict[str, Any]:
    from torch import Tensor

    for key in _WRAPPINGS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{name} holds no state dict; save one with torch.save(model.state_dict(), ...)")
    strange = [str(k) for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor) and _is_plain(v))]
    if strange:
        raise CheckpointError(f"{name} holds entries that are not plain dense tensors: {', '.join(strange[:3])}")
    prefix = "module." if all(k.startswith("module.") for k in state) else ""
    return {k.removeprefix(prefix): v for k, v in state.items()}


def _is_plain(tensor: Any) -> bool:
    """Dense, real, in memory and not quantised: anything else has no place in the weights of a classifier."""
    import torch

    return bool(tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_complex() and tensor.device.type == "cpu")


def load_weights(model: Any, state: Mapping[str, Any]) -> None:
    """Copy tensors into a model; every name and shape must fit.

    Raises:
        CheckpointError: it lists what was missing, unexpected, or of another shape.
    """
    own = model.state_dict()
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    shapes = [
        f"{k}: file {tuple(state[k].shape)}, model {tuple(own[k].shape)}" for k in own if k in state and state[k].shape != own[k].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
        for what, names in (("missing from the file", missing), ("not in the model", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(f"the file does not fit the architecture; {'; '.join(problems)}. Check --arch and --arch-arg")
    model.load_state_dict(dict(state))


def build_model(arch: str, arguments: Mapping[str, str]) -> Any:
    """An untrained model from "torchvision:NAME", "timm:NAME" or "path/to/file.py:factory" (the user's own code, which is run).

    Raises:
        CheckpointError: there is no such architecture, or it does not take these arguments.
    """
    source, _, name = arch.rpartition(":")
    if not source or not name:
        raise CheckpointError(f"arch must be torchvision:NAME, timm:NAME or path/to/file.py:factory, got {arch!r}")
    keywords = {k: _literal(v) for k, v in arguments.items()}
    if source == "torchvision":
        models = _import("torchvision.models")
        factory: Callable[..., Any] = lambda **kw: models.get_model(name, weights=None, **kw)  # noqa: E731
    elif source == "timm":
        timm = _import("timm")
        factory = lambda **kw: timm.create_model(name, pretrained=False, **kw)  # noqa: E731
    else:
        factory = _factory(Path(source), name)
    try:
        model = factory(**keywords)
    except Exception as error:
        raise CheckpointError(f"{arch} could not be built with {keywords}: {type(error).__name__}: {error}") from error
    if not hasattr(model, "state_dict"):
        raise CheckpointError(f"{arch} must give a torch.nn.Module, it gave {type(model).__name__}")
    return model


def _literal(text: str) -> Any:
    """Numbers, booleans and null as such; anything else is a string."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CheckpointError(f"{name} is not installed ({error}); it comes with the extra [vision]") from None


def _factory(path: Path, name: str) -> Callable[..., Any]:
    if not path.is_file():
        raise CheckpointError(f"no such architecture file: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CheckpointError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CheckpointError(f"{path} could not be run: {type(error).__name__}: {error}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise CheckpointError(f"{path} defines no function {name!r}")
    result: Callable[..., Any] = factory
    return result


def save_safetensors(model: Any, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write a model's state dict, whole or not at all."""
    from safetensors.torch import save

    # safetensors refuses tensors that share memory; copies do not.
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}
    content = save(tensors, metadata=dict(metadata))
    with atomic(path) as stream:
        stream.write(content)


@contextmanager
def atomic(path: str | Path) -> Iterator[Any]:
    """A binary stream to a temporary file beside `path` that takes its place only when all went well.

    Raises:
        CheckpointError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    check_writable(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise CheckpointError(f"cannot write {str(path)!r}: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        # mkstemp makes private files; give this one the mode that open() would have.
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write {str(path)!r}: {error.strerror}") from None
        raise


def check_writable(path: Path) -> None:
    """Before long work whose result shall go there.

    Raises:
        CheckpointError: the folder does not exist or is read-only, or the path is a folder itself.
    """
    if path.is_dir():
        raise CheckpointError(f"cannot write {str(path)!r}: it is a folder")
    if not path.parent.is_dir():
        raise CheckpointError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}")
    if not os.access(path.parent, os.W_OK):
        raise CheckpointError(f"cannot write {str(path)!r}: the folder is read-only")


def read_npz(path: str | Path) -> tuple[dict[str, NDArray[Any]], str]:
    """Arrays by name, and the SHA-256 of the file; never anything pickled.

    Raises:
        CheckpointError: the file cannot be read or holds Python objects.
    """
    path = Path(path)
    content = _read(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception:  # numpy, zipfile and zlib raise whatever a hostile file makes them raise
        raise CheckpointError(f"{path.name} was refused: it is damaged, no .npz archive, or holds Python objects") from None
    strange = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if strange:
        raise CheckpointError(f"{path.name} was refused: {strange[0]!r} is no array")
    return arrays, hashlib.sha256(content).hexdigest()


def read_images(path: str | Path, *, size: int | None = None, limit: int | None = None, seed: int = 0) -> Images:
    """Clean images from an .npz with `x` (n, H, W, 3) uint8 and perhaps `y` (n,), or from a folder of images.

    A folder's first-level subfolders are its classes, sorted by name as torchvision's ImageFolder does; one without images keeps its
    number, hidden ones have none. A flat folder has no labels. `size` resizes to size x size; a
    `limit` below the number of images takes a random subset, the same one for the same `seed`.

    Raises:
        CheckpointError: there are no images, or one cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no data at {str(path)!r}")
    if limit is not None and limit < 1:
        raise CheckpointError(f"limit must be at least 1, got {limit}")
    if path.is_dir():
        return _read_folder(path, size, limit, seed)
    if path.suffix.lower() != ".npz":
        raise CheckpointError(f"data must be a folder of images or an .npz file, got {str(path)!r}")
    arrays, digest = read_npz(path)
    x, y = arrays.get("x"), arrays.get("y")
    if x is None or x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or len(x) == 0:
        found = "no x" if x is None else f"{x.dtype} {x.shape}"
        raise CheckpointError(f"{path.name} must hold x, uint8 images (n, H, W, 3), n >= 1; it holds {found}")
    if y is not None and (y.shape != (len(x),) or y.dtype.kind not in "iu"):
        raise CheckpointError(f"{path.name}: y must be integers of shape ({len(x)},), got {y.dtype} of shape {y.shape}")
    chosen = _subset(len(x), limit, seed)
    x = x[chosen]
    if size is not None and x.shape[1:3] != (size, size):
        x = np.stack([_resized(image, size) for image in x])
    labels = None if y is None else y[chosen].astype(np.int64)
    return Images(x, labels, {"data": path.name, "data_sha256": digest})


def _read_folder(path: Path, size: int | None, limit: int | None, seed: int) -> Images:
    from PIL import Image

    classes = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    files = [(f, c) for c, folder in enumerate(classes) for f in sorted(folder.rglob("*")) if f.suffix.lower() in _IMAGES]
    nested = bool(files)
    if not nested:
        files = [(f, -1) for f in sorted(path.iterdir()) if f.suffix.lower() in _IMAGES]
    if not files:
        raise CheckpointError(f"no images in {str(path)!r} (looked for {' '.join(_IMAGES)})")
    chosen = [files[i] for i in _subset(len(files), limit, seed)]
    images = []
    for file, _ in chosen:
        try:
            with warnings.catch_warnings():
                # Pillow warns of image bombs before it refuses them; a scan refuses them at once.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file) as image:
                    pixels = np.asarray(image.convert("RGB"))
        except Exception as error:  # decoders raise whatever a hostile file makes them raise
            raise CheckpointError(f"cannot read image {str(file)!r}: {error}") from None
        images.append(pixels if size is None else _resized(pixels, size))
    if len({i.shape for i in images}) > 1:
        raise CheckpointError(f"the images in {str(path)!r} differ in size; give --size")
    labels = np.array([c for _, c in chosen], dtype=np.int64) if nested else None
    return Images(np.stack(images), labels, {"data": path.name})


def _resized(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    from PIL import Image

    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def _subset(count: int, limit: int | None, seed: int) -> NDArray[np.int64]:
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}") from None
