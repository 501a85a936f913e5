"""What a model expects done to an image first: resizing, cropping, scaling. May import: PIL, numpy, errors; the library asked about.

Every library writes this down in its own way; here is one way that is printed, kept in reports, and equal to what the library itself does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tacfast.errors import CheckpointError

if TYPE_CHECKING:
    from PIL.Image import Image

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
#: Larger images than any classifier takes; a hostile configuration must not fill the memory.
_LARGEST = 4096
#: Largest difference from transformers' own processor, in units of pixels from 0 to 1: it resizes tensors, we resize images as PIL does.
_SAME_PIXELS = 0.02


@dataclass(frozen=True)
class Preprocessing:
    """From RGB images, uint8 (H, W, 3), to a model's input: (pixels · scale − mean) / std, after resizing and a centre crop."""

    #: Shorter side in pixels, or (height, width) whatever the shape was; None leaves the size alone.
    resize: int | tuple[int, int] | None = None
    #: (height, width) cut from the centre; black where the image is smaller.
    crop: tuple[int, int] | None = None
    #: Where the rest of a crop is odd, transformers rounds the corner down, torchvision and timm to even.
    corner: str = "even"
    interpolation: str = "bilinear"
    scale: float = 1 / 255
    #: One number, or one a channel.
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    #: Where all this was written down.
    origin: str = "no preprocessing known"

    def __post_init__(self) -> None:
        sides = (self.resize,) if isinstance(self.resize, int) else self.resize or ()
        if not all(isinstance(s, int) and 1 <= s <= _LARGEST for s in (*sides, *(self.crop or ()))):
            raise CheckpointError(f"{self.origin}: image sides must be from 1 to {_LARGEST}, got {self.resize} and crop {self.crop}")
        if self.interpolation not in _INTERPOLATIONS:
            raise CheckpointError(f"{self.origin}: interpolation must be one of {', '.join(_INTERPOLATIONS)}, got {self.interpolation!r}")
        for name, values, positive in (("mean", self.mean, False), ("std", self.std, True), ("scale", (self.scale,), True)):
            if len(values) not in (1, 3) or not all(math.isfinite(v) and (v > 0 or not positive) for v in values):
                right = f"one or three {'numbers above 0' if positive else 'finite numbers'}"
                raise CheckpointError(f"{self.origin}: {name} must be {right}, got {values}")

    def __str__(self) -> str:
        size = "as they are" if self.resize is None else f"{_sides(self.resize)}, {self.interpolation}"
        crop = "" if self.crop is None else f", centre crop {_sides(self.crop)}"
        scale = "" if math.isclose(self.scale, 1 / 255) else f", pixels times {self.scale:.4g}"
        mean, std = (",".join(f"{v:.4g}" for v in values) for values in (self.mean, self.std))
        return f"{size}{crop}{scale}, mean {mean}, std {std} ({self.origin})"

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def override(self, size: int | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Preprocessing:
        """With what the user says instead; a `size` means size x size, without a crop."""
        changes: dict[str, Any] = {k: v for k, v in (("mean", mean), ("std", std)) if v is not None}
        if size is not None:
            changes |= {"resize": (size, size), "crop": None}
        if not changes:
            return self
        given = " and ".join(k for k, v in (("size", size), ("mean", mean), ("std", std)) if v is not None)
        return replace(self, **changes, origin=f"{given} as given" + (f", else {self.origin}" if self != Preprocessing() else ""))

    def sized(self, image: Image) -> Image:
        """Resized and cropped, to the pixel as the library does it."""
        from PIL.Image import Resampling

        width, height = image.size
        if isinstance(self.resize, int):
            short = min(height, width)
            size = (int(self.resize * height / short), int(self.resize * width / short))
        else:
            size = self.resize or (height, width)
        box = size if self.crop is None else self.crop
        if size != (height, width):
            image = image.resize((size[1], size[0]), Resampling[self.interpolation.upper()])
        if box == size:
            return image
        even = self.corner == "even"
        top, left = (-((c - s) // 2) if c > s else round((s - c) / 2) if even else (s - c) // 2 for s, c in zip(size, box, strict=True))
        return image.crop((left, top, left + box[1], top + box[0]))

    def inputs(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (n, H, W, 3) of the right size to float32 (n, 3, H, W)."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        scaled = (pixels.astype(np.float32) * np.float32(self.scale) - mean) / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


#: Where a repaired file says in its metadata what its images looked like.
METADATA = "tacfast.preprocessing"
_LONGEST_NOTE = 10_000


def of_metadata(hints: Mapping[str, Any]) -> Preprocessing | None:
    """What `tacfast repair` wrote beside the weights; None where nothing is written.

    Raises:
        CheckpointError: it is no preprocessing.
    """
    text = hints.get(METADATA)
    if not isinstance(text, str):
        return None
    origin = "the file's own note"
    try:
        if len(text) > _LONGEST_NOTE:
            raise ValueError
        told: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
        if any(isinstance(told.get(k), tuple) and len(told[k]) != 2 for k in ("resize", "crop")):
            raise ValueError
        return Preprocessing(**{**told, "origin": origin})
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{origin} on preprocessing is damaged; give --size, --mean and --std") from None


def of_torchvision(name: str) -> Preprocessing | None:
    """What torchvision's default weights of this architecture were evaluated with, though no weights are fetched."""
    from torchvision.models import get_model_weights

    weights = getattr(get_model_weights(name), "DEFAULT", None)
    if weights is None:
        return None
    t = weights.transforms()
    return Preprocessing(
        resize=int(t.resize_size[0]),
        crop=(int(t.crop_size[0]), int(t.crop_size[0])),
        interpolation=t.interpolation.value,
        mean=tuple(t.mean),
        std=tuple(t.std),
        origin=f"as for torchvision's {weights}",
    )


def of_timm(config: Mapping[str, Any], name: str) -> Preprocessing:
    """What timm's `create_transform` does for evaluation, from a model's `pretrained_cfg`.

    Raises:
        CheckpointError: it cannot be read, or wants images bordered.
    """
    from timm.data import resolve_data_config

    origin = f"timm's settings of {name}"
    try:
        t = resolve_data_config({}, pretrained_cfg=dict(config))
        height, width = (int(s) for s in t["input_size"][1:])
        size = (math.floor(height / t["crop_pct"]), math.floor(width / t["crop_pct"]))
        mode, mean, std = t["crop_mode"], tuple(map(float, t["mean"])), tuple(map(float, t["std"]))
    except Exception as error:  # the configuration is untrusted
        raise CheckpointError(f"{origin} cannot be read: {type(error).__name__}: {error}; give --size, --mean and --std") from None
    if mode == "border" or (mode != "squash" and size[0] != size[1]):
        raise CheckpointError(f"{origin}: crop_mode {mode!r} to {height} x {width} is not supported; give --size, --mean and --std")
    resize = size if mode == "squash" else size[0]
    return Preprocessing(resize, (height, width), interpolation=t["interpolation"], mean=mean, std=std, origin=origin)


def of_transformers(processor: Any, origin: str) -> Preprocessing:
    """What a transformers image processor does, checked against it on an image.

    Raises:
        CheckpointError: it does something else than resize, crop, scale and normalise.
    """
    from PIL.Image import fromarray

    t = processor.to_dict()
    try:
        ours = _read_processor(t, origin)
        sample = fromarray(_SAMPLE)
        theirs = np.asarray(processor(sample, return_tensors="pt")["pixel_values"], dtype=np.float32)
    except CheckpointError:
        raise
    except Exception as error:  # the configuration is untrusted
        raise CheckpointError(f"{origin} cannot be read: {type(error).__name__}: {error}; give --size, --mean and --std") from None
    made = ours.inputs(np.asarray(ours.sized(sample))[None])
    allowed = 255 * ours.scale * _SAME_PIXELS / min(ours.std)
    if made.shape != theirs.shape or float(np.abs(made - theirs).max()) > allowed:
        kind = type(processor).__name__
        raise CheckpointError(f"{origin}: {kind} does more than resize, crop, scale and normalise; give --size, --mean and --std")
    return ours


def _read_processor(t: Mapping[str, Any], origin: str) -> Preprocessing:
    size, crop = t.get("size") or {}, t.get("crop_size") or {}
    resize: Any = size.get("shortest_edge") or (size.get("height"), size.get("width"))
    box = (crop["height"], crop["width"]) if t.get("do_center_crop") else None
    if t.get("crop_pct") and isinstance(resize, int):
        # ConvNeXt's way: enlarged by the crop below 384 pixels, squashed from there on. PoolFormer's: always enlarged.
        if "ConvNext" not in str(t.get("image_processor_type")):
            resize = int(resize / t["crop_pct"])
        elif resize < 384:
            resize, box = int(resize / t["crop_pct"]), (resize, resize)
        else:
            resize = (resize, resize)
    one = t.get("do_normalize")
    return Preprocessing(
        resize=resize if t.get("do_resize") else None,
        crop=box,
        corner="down",
        interpolation=_INTERPOLATIONS_OF_PIL.get(int(t.get("resample") or 0), "unknown"),
        scale=float(t["rescale_factor"]) if t.get("do_rescale") else 1.0,
        mean=_numbers(t["image_mean"]) if one else (0.0,),
        std=_numbers(t["image_std"]) if one else (1.0,),
        origin=origin,
    )


#: PIL's numbers.
_INTERPOLATIONS_OF_PIL = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in (values if isinstance(values, (list, tuple)) else [values]))


def _sides(size: int | tuple[int, int]) -> str:
    return f"shorter side to {size}" if isinstance(size, int) else f"{size[0]} x {size[1]}"


def _sample(height: int = 300, width: int = 420) -> NDArray[np.uint8]:
    """A smooth image that no flip, swap of channels or shift leaves as it was."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.stack([255 * x, 255 * y**2, 127 + 127 * np.sin(4 * x + 2 * y)], axis=2).round().astype(np.uint8)


_SAMPLE = _sample()
