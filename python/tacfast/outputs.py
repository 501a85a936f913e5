"""Where a command's results go: files, whole or not at all, or standard output. May import: terminal, files, solver, shown, errors."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from tacfast import __version__, terminal
from tacfast.errors import ProblemError
from tacfast.files import atomic, check_writable
from tacfast.shown import Shown
from tacfast.solver import TacSolutions

#: As a path: standard output.
STDOUT = Path("-")


def check_outputs(*paths: Path | None) -> bool:
    """Before the work, not after it; whether standard output belongs to one of them.

    Raises:
        CheckpointError: a file cannot be written there.
        ProblemError: standard output is asked for twice.
    """
    taken = sum(path == STDOUT for path in paths)
    if taken > 1:
        raise ProblemError("- stands for standard output, which takes one report: give the other one a file")
    for path in paths:
        if path is not None and path != STDOUT:
            check_writable(path)
    return taken == 1


def relative(path: Path) -> str | None:
    """Where a file is from here, with "/"; None where it is not below, since nobody else needs to know where."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return None


def write_json(data: dict[str, Any], path: Path) -> None:
    _write(json.dumps(data, indent=1, allow_nan=False) + "\n", path)


def write_page(result: Shown, path: Path) -> None:
    """A result for people, as HTML."""
    _write(str(result.to_html()), path)
    if path != STDOUT:
        terminal.note(f"wrote {path}")


def _write(text: str, path: Path) -> None:
    if path == STDOUT:
        terminal.emit(text)
        return
    with atomic(path) as stream:
        stream.write(text.encode())


def write_solutions(solutions: TacSolutions, path: Path) -> None:
    """Every field, as .json or .npz."""
    if path.suffix.lower() == ".json":
        write_json({"schema": "tacfast.solve/1", "tool_version": __version__, **solutions.to_dict()}, path)
        return
    with atomic(path) as stream:
        arrays: dict[str, Any] = {f.name: getattr(solutions, f.name) for f in fields(solutions) if f.name != "stage_seconds"}
        arrays |= {f"seconds_{stage}": seconds for stage, seconds in solutions.stage_seconds.items()}
        np.savez(stream, **arrays)
