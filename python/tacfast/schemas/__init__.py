"""The JSON Schemas (draft 2020-12) of everything that tacfast writes as JSON, a file each. May import: errors.

They allow keys that they do not name, so that a reader of version 1 can read what a later release adds to version 1.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from tacfast.errors import ProblemError

NAMES = ("scan", "repair", "solve", "bench", "doctor")


def text(name: str) -> str:
    """A schema as it is published.

    Raises:
        ProblemError: there is none of that name.
    """
    if name not in NAMES:
        raise ProblemError(f"schema must be one of {', '.join(NAMES)}, got {name!r}")
    return files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8")


def load(name: str) -> dict[str, Any]:
    """A schema as a dict; its version is `load(name)["properties"]["schema"]["const"]`, such as "tacfast.scan/1". Raises as `text`."""
    schema: dict[str, Any] = json.loads(text(name))
    return schema
