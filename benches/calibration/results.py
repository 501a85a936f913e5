"""The lines of the results: one JSON object per network, written whole, whoever else writes."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines, in the order of their writing; what a killed process left half written is passed over."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line and see it on the disk."""
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        torn = file.seek(0, os.SEEK_END) > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(line, separators=(",", ":")).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
