"""One law: the documentation site leaves nothing out: every public name, every command, every page; and it asks nothing of the network."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import tacfast
from tacfast import attacks

ROOT = Path(__file__).parent.parent
CONFIG = (ROOT / "mkdocs.yml").read_text()


def test_every_public_name_is_in_the_reference() -> None:
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)}
    errors = {name for name in tacfast.__all__ if name.endswith("Error")}  # the module `errors` is shown whole
    assert {*tacfast.__all__, *attacks.__all__} - errors - {"__version__"} <= shown
    assert "errors" in shown
    assert "tac_norm" in shown


def test_every_command_is_in_the_reference() -> None:
    pytest.importorskip("typer")
    fill = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["on_page_markdown"]
    page = fill((ROOT / "docs" / "cli.md").read_text())
    from tacfast.cli import app

    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        assert f"### `tacfast {name}`" in page


def test_every_page_is_in_the_navigation_and_its_parts_are_found() -> None:
    fill = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["on_page_markdown"]
    for page in (ROOT / "docs").glob("*.md"):
        assert re.search(rf": {re.escape(page.name)}$", CONFIG, re.MULTILINE), page
        if page.name != "cli.md":
            assert "{{" not in fill(page.read_text())


def test_no_fonts_from_elsewhere() -> None:
    assert "font: false" in CONFIG
    assert not re.search(r"https?://", CONFIG)
