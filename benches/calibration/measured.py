"""How far patterns of the input go towards each class of stored networks, each measured once and kept as a JSON line.

A line holds for one network, one way of changing its images and one state of the code that makes patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from data import Data
from networks import Line
from numpy.typing import ArrayLike
from recipe import load_net
from results import append_line, read_lines
from states import state_of
from torch import Tensor

import tacfast
from tacfast.openness import Patterns
from tacfast.patterns import FEWEST_IMAGES, IMAGES, measure


@cache
def maker_id() -> str:
    """Names the state of the sources that make patterns."""
    folder = Path(tacfast.__file__).parent
    return state_of(folder / f"{name}.py" for name in ("patterns", "universal"))


def model_file(line: Line) -> Path:
    file: Path = line["folder"] / "models" / f"{line['key']}.safetensors"
    return file


def clean_images(line: Line, data: Data) -> Tensor:
    """The defender's, float32 (n, channels, H, W) in [0, 1]."""
    return data.split(line["seed"])[0][0]


class Measured:
    """What is kept of the networks of a folder, in DIR/patterns.jsonl, by the code of this process."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "patterns.jsonl"
        mine = [line for line in read_lines(self.file) if line["maker"] == maker_id()]
        self._kept = {(line["key"], line.get("variant", "")): _patterns(line["classes"], line["margins"]) for line in mine}

    def kept(self, key: str, variant: str = "") -> Patterns | None:
        """`variant` says all of how the images were changed, "" that they were not."""
        return self._kept.get((key, variant))

    def of(self, line: Line, images: Callable[[], Tensor], variant: str = "") -> Patterns | None:
        """What is kept, or else measured now, on at most IMAGES of the images; None with fewer than FEWEST_IMAGES."""
        place = line["key"], variant
        if place not in self._kept:
            x = images()[:IMAGES]
            if len(x) < FEWEST_IMAGES:
                return None
            model = load_net(model_file(line), line["arch"], line["classes"], x.shape[1])
            found = measure(model, x, np.arange(line["classes"]), device=torch.device("cpu"))
            margins = {kind: [round(float(m), 4) for m in values] for kind, values in found.margins.items()}
            name = {"key": line["key"]} | ({"variant": variant} if variant else {})
            append_line(self.file, {**name, "maker": maker_id(), "classes": found.classes.tolist(), "margins": margins})
            self._kept[place] = _patterns(found.classes, margins)
        return self._kept[place]


def without_patterns(lines: Sequence[Line]) -> list[str]:
    """Keys of the networks that patterns.py has not measured."""
    stores = {folder: Measured(folder) for folder in {line["folder"] for line in lines}}
    return [line["key"] for line in lines if stores[line["folder"]].kept(line["key"]) is None]


def _patterns(classes: ArrayLike, margins: Mapping[str, ArrayLike]) -> Patterns:
    return Patterns(np.array(classes), {kind: np.array(values) for kind, values in margins.items()})
