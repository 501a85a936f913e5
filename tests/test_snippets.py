"""One law: every block of code in the README and the documentation runs, against small files of the kinds that it names.

A block that cannot run here has `<!-- skip: next "why" -->` before it and is listed below; there is no other way out.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import SkipTest

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from belongings import programs, shortcut_model
from problems import head_with_a_shortcut
from tacfast.cli import app

pytest.importorskip("sybil")
from sybil import Document, Example, Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import SkipParser
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

ROOT = Path(__file__).parent.parent
DOCUMENTS = [str(p.relative_to(ROOT)) for p in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))]
#: The first line of every block that does not run, and its document.
SKIPPED = {
    ("README.md", "make demo"),
    ("docs/start.md", "make demo"),
    ("docs/contributing.md", "make test"),
    ("docs/models.md", "mkdir -p untrusted"),
}
#: What is put after a command, where its line holds the word too, so that it is quick.
QUICK = {
    ("scan", "resnet18"): "--size 64 --no-patterns",
    ("scan", "_folder"): "--no-patterns",
    ("repair", "resnet18"): "--size 64 --method head",
    ("bench", "tacfast"): "--repeats 1 --classes 100 --dim 32 --samples 200",
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_block_runs(name: str, belongings: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file in (*belongings.iterdir(), ROOT / "examples"):
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{programs(tmp_path / 'programs')}{os.pathsep}{os.environ['PATH']}")
    document = Sybil(parsers=[SkipParser(), _blocks]).parse(ROOT / name)
    document.namespace.update(_what_the_text_supposes())
    skipped = set()
    for example in document.examples():
        try:
            example.evaluate()
        except SkipTest:
            skipped.add(str(example.parsed).strip().splitlines()[0])
    listed = {line for document, line in SKIPPED if document == name}
    assert len(skipped) == len(listed)
    assert all(any(line.startswith(start) for start in listed) for line in skipped), skipped


def _what_the_text_supposes() -> dict[str, Any]:
    """The names that stand for the reader's own things."""
    model, batches = shortcut_model()
    w, z, y = (torch.from_numpy(a).float() for a in head_with_a_shortcut(np.random.default_rng(0)))
    return {"model": model, "clean_loader": batches, "weight": w, "bias": torch.zeros(len(w)), "latents": z, "labels": y.long()}


def _blocks(document: Document) -> Iterator[Region]:
    """Every fenced block, whatever its language: one that nobody can run is an error."""
    for region in FencedCodeBlockLexer(r"[^\n]*")(document):
        region.parsed = region.lexemes["source"]
        region.evaluator = RUN[region.lexemes["language"]]
        yield region


def _run_workflow(example: Example) -> None:
    """What a GitHub workflow's steps would run."""
    for step in pytest.importorskip("yaml").safe_load(example.parsed)["steps"]:
        _run_lines(step.get("run", ""))


def _run_lines(text: str) -> None:
    """Line by line, tacfast in this process; stops where a shell with `-e` would, but a verdict is no failure."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["tacfast"]:
            more = next((extra for (command, word), extra in QUICK.items() if words[1:2] == [command] and word in line), "")
            result = CliRunner().invoke(app, [*words[1:], *more.split()])
            fine = (0, 1, 3) if words[1:2] == ["scan"] else (0,)
            assert result.exit_code in fine, f"{line}\n{result.output}\n{result.exception!r}"
        elif words:
            subprocess.run(line, shell=True, check=True, timeout=60)


RUN: dict[str, Callable[[Example], None]] = {
    "python": PythonEvaluator(),
    "sh": lambda example: _run_lines(example.parsed),
    "yaml": _run_workflow,
    "json": lambda example: json.loads(example.parsed),
}
