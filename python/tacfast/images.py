"""Clean images from untrusted files. May import: PIL, numpy, files, errors."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tacfast.errors import CheckpointError
from tacfast.files import most_bytes, read_bytes, read_npy, read_npz

#: An RGB image to the same of another size.
Prepare = Callable[["Image"], "Image"]

if TYPE_CHECKING:
    from PIL.Image import Image

#: Bytes of an image file: more than any camera's.
MAX_IMAGE_FILE = 256 * 2**20
#: Pillow chooses by content and knows formats that start other programs; these are decoded in its own process.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF")
#: Folders named in a hint.
_SHOWN = 5
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class Images:
    """Clean images as loaded: uint8 (n, H, W, 3), int64 (n,) labels or None, and what they came from."""

    x: NDArray[np.uint8]
    y: NDArray[np.int64] | None
    source: Mapping[str, Any]
    #: In words: how many there were, in which folders; and what looks like a mistake in their arrangement.
    found: str = ""
    hints: tuple[str, ...] = ()
    #: What the folders call the classes.
    names: Mapping[int, str] = field(default_factory=dict)


def read_images(
    path: str | Path,
    *,
    prepare: Prepare | None = None,
    classes: Mapping[str, int] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Images:
    """Clean images from an .npz with `x` (n, H, W, 3) uint8 and perhaps `y` (n,), from an .npy with such an `x` alone, or from a folder.

    A folder's first-level subfolders are its classes, sorted by name as torchvision's ImageFolder does; one without images keeps its
    number, hidden ones have none. Where every subfolder's name is in `classes`, the number there counts instead. A flat folder has no
    labels. `prepare` gives every image the size that the model wants; a `limit` below the number of images takes a
    random subset, the same one for the same `seed`.

    Raises:
        CheckpointError: there are no images, one cannot be read, a link leads out of the folder, or all of them together are too large.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no data at {str(path)!r}; --data takes a folder of images, an .npz or an .npy")
    if limit is not None and limit < 1:
        raise CheckpointError(f"limit must be at least 1, got {limit}")
    if path.is_dir():
        return _read_folder(path, prepare, classes, limit, seed)
    if path.suffix.lower() == ".npy":
        array, digest = read_npy(path)
        arrays: Mapping[str, NDArray[Any]] = {"x": array}
    elif path.suffix.lower() == ".npz":
        arrays, digest = read_npz(path)
    else:
        raise CheckpointError(f"data must be a folder of images or an .npz or .npy file, got {str(path)!r}")
    x, y = arrays.get("x"), arrays.get("y")
    if x is None or x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or x.size == 0:
        found = "no x" if x is None else f"{x.dtype} {x.shape}"
        raise CheckpointError(f"{path.name} must hold x, uint8 images (n, H, W, 3), n, H, W >= 1; it holds {found}")
    if y is not None and (y.shape != (len(x),) or y.dtype.kind not in "iu"):
        raise CheckpointError(f"{path.name}: y must be integers of shape ({len(x)},), got {y.dtype} of shape {y.shape}")
    chosen = _subset(len(x), limit, seed)
    x = x[chosen]
    if prepare is not None:
        first = _prepared(x[0], prepare)
        if 2 * len(x) * first.nbytes > most_bytes():
            sides = " x ".join(map(str, first.shape[:2]))
            raise CheckpointError(f"{len(x)} images of {sides} take too much memory; give a smaller --size or --limit")
        if first.shape != x.shape[1:] or not np.array_equal(first, x[0]):
            x = np.stack([_prepared(image, prepare) for image in x])
    labels = None if y is None else y[chosen].astype(np.int64)
    return Images(x, labels, {"data": path.name, "data_sha256": digest}, _counted(len(x), len(arrays["x"])))


def _read_folder(path: Path, prepare: Prepare | None, names: Mapping[str, int] | None, limit: int | None, seed: int) -> Images:
    files, folders = _list(path)
    nested = bool(folders)
    by_name = names is not None and all(folder in names for folder in folders)
    number = [names[folder] if names is not None and by_name else c for c, folder in enumerate(folders)]
    chosen = [files[i] for i in _subset(len(files), limit, seed)]
    images: list[NDArray[np.uint8]] = []
    digest, total, most = hashlib.sha256(), 0, most_bytes()
    for file, _ in chosen:
        content = read_bytes(file, most=MAX_IMAGE_FILE)
        digest.update(file.relative_to(path).as_posix().encode(errors="surrogateescape") + b"\0" + hashlib.sha256(content).digest())
        images.append(_decode(content, file, prepare))
        total += images[-1].nbytes
        if images[-1].shape != images[0].shape:
            raise CheckpointError(f"the images in {str(path)!r} differ in size; give --size")
        if 2 * total > most:  # stacking them takes a second copy
            raise CheckpointError(f"the images in {str(path)!r} take more than {most // 2} bytes; give --size or a smaller --limit")
    labels = np.array([number[c] for _, c in chosen], dtype=np.int64) if nested else None
    order = {"class_order": "the model's names" if by_name else "folders sorted by name"} if nested else {}
    found = _counted(len(images), len(files)) + (f" in {_listed(folders)}" if nested else ", without labels")
    hints = tuple(_hints(path, files, folders, names))
    source = {"data": path.name, "data_sha256": digest.hexdigest(), **order}
    return Images(np.stack(images), labels, source, found, hints, dict(zip(number, folders, strict=True)))


def _counted(taken: int, count: int) -> str:
    return f"{taken} images" if taken == count else f"{taken} of {count} images"


def _listed(folders: list[str]) -> str:
    shown = folders if len(folders) < 3 else [folders[0], "…", folders[-1]]
    return f"{len(folders)} folder{'s' * (len(folders) != 1)}: {' '.join(shown)}"


def _hints(path: Path, files: list[tuple[Path, int]], folders: list[str], names: Mapping[str, int] | None) -> Iterator[str]:
    deeper = {f.relative_to(path).parts[1] for f, _ in files if len(folders) == 1 and len(f.relative_to(path).parts) > 2}
    if len(deeper) > 1 and not any(f.parent == path / folders[0] for f, _ in files):
        yield f"all images count as one class, {folders[0]!r}; are the classes one level deeper? give --data {path / folders[0]}"
    extra = [folder for folder in folders if names is not None and folder not in names]
    if names is not None and len(folders) > len(names) and extra:
        more = ", ..." if len(extra) > _SHOWN else ""
        yield (
            f"{len(folders)} folders for a model of {len(names)} classes, so that they count in the order of their names; "
            f"no class of the model is called {', '.join(extra[:_SHOWN])}{more}"
        )


def _list(path: Path) -> tuple[list[tuple[Path, int]], list[str]]:
    """Image files with the positions of their classes among the names that follow; without names, and with -1, where the folder is flat.
    Nothing that leads out of the folder."""
    try:
        classes = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
        files = [(f, c) for c, folder in enumerate(classes) for f in sorted(folder.rglob("*")) if f.suffix.lower() in _IMAGES]
        nested = bool(files)
        if not nested:
            files = [(f, -1) for f in sorted(path.iterdir()) if f.suffix.lower() in _IMAGES]
        # The folder may be a link itself: its user named it.
        root = path.resolve()
        outside = next((f for f in (*classes, *(f for f, _ in files)) if not f.resolve().is_relative_to(root)), None)
    except (OSError, RuntimeError) as error:  # no permission, or links in a circle
        raise CheckpointError(f"cannot list {str(path)!r}: {error}; check its permissions and links") from None
    if not files:
        raise CheckpointError(f"no images in {str(path)!r} (looked for {' '.join(_IMAGES)})")
    if outside is not None:
        raise CheckpointError(f"{str(outside)!r} is a link that leads out of {str(path)!r}; copy what it shows into the folder")
    return files, [p.name for p in classes] if nested else []


def _decode(content: bytes, file: Path, prepare: Prepare | None) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Pillow warns of image bombs before it refuses them; a scan refuses them at once. Its other warnings are harmless.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                rgb = image.convert("RGB")
                return np.asarray(rgb if prepare is None else prepare(rgb))
    except UnidentifiedImageError:
        raise CheckpointError(
            f"cannot read image {str(file)!r}: it is none of {', '.join(_FORMATS)}; convert it, or leave it out"
        ) from None
    except Exception as error:  # decoders raise whatever a hostile file makes them raise
        raise CheckpointError(f"cannot read image {str(file)!r}: {error}; replace it, or leave it out") from None


def _prepared(pixels: NDArray[np.uint8], prepare: Prepare) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(prepare(Image.fromarray(pixels)))


def _subset(count: int, limit: int | None, seed: int) -> NDArray[np.int64]:
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])
