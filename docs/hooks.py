"""What the site's pages are filled with when it is built, so that it cannot fall behind: the command line, parts of the README, examples.

A page asks with a line of its own:

    {{ readme: Limits }}       the section of README.md with that heading, without the heading
    {{ commands }}             the reference of the command line, from the program itself
    {{ file: PATH LANGUAGE }}  a file of the repository as a code block

Mathematics (`$...$`) becomes MathML, which browsers show without a script.
"""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_ASKED = re.compile(r"^\{\{ (\w+)(?:: (.+?))? \}\}$", re.MULTILINE)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill what a page asks for."""
    return _ASKED.sub(lambda m: _FILL[m[1]](m[2] or ""), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas, as MathML."""
    return _FORMULA.sub(_mathml, html)


def _readme(heading: str) -> str:
    """A section, its links as seen from docs/."""
    after = (ROOT / "README.md").read_text().partition(f"\n## {heading}\n")[2]
    if not after:
        raise ValueError(f"README.md has no section {heading!r}")
    return re.split(r"^## ", after, maxsplit=1, flags=re.MULTILINE)[0].replace("](docs/", "](").strip()


def _commands(_: str) -> str:
    """`typer utils docs`, a heading lower; below it the order is that of the program."""
    made = subprocess.run(
        [sys.executable, "-m", "typer", "tacfast.cli", "utils", "docs", "--name", "tacfast"], capture_output=True, text=True, check=True
    )
    return re.sub(r"^#", "##", made.stdout, flags=re.MULTILINE)


def _file(asked: str) -> str:
    path, _, language = asked.rpartition(" ")
    return f"```{language}\n{(ROOT / path).read_text().rstrip()}\n```"


def _mathml(match: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    made: str = convert(html.unescape(match[3]).strip(), display="inline" if match[2] == "(" else "block")
    if "\\" in made:
        raise ValueError(f"latex2mathml does not know all of {match[3]}")
    return made


_FILL = {"readme": _readme, "commands": _commands, "file": _file}
