"""What patterns.py measured of the networks of a folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from results import read_lines
from states import state_of

import tacfast
from tacfast.openness import Patterns


@cache
def maker_id() -> str:
    """Names the state of the sources that make patterns."""
    folder = Path(tacfast.__file__).parent
    return state_of(folder / f"{name}.py" for name in ("patterns", "universal"))


def measured(folder: Path) -> dict[str, Patterns]:
    """By key; lines of another maker are never read as those of this one."""
    lines = [line for line in read_lines(folder / "patterns.jsonl") if line["maker"] == maker_id()]
    return {line["key"]: Patterns(np.array(line["classes"]), {k: np.array(v) for k, v in line["margins"].items()}) for line in lines}
