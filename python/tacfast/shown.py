"""What every result can be made into: JSON, a page, a figure, a cell of a notebook. May import: files, errors; html when called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tacfast.errors import CheckpointError, ProblemError
from tacfast.files import atomic, read_bytes

if TYPE_CHECKING:
    from types import ModuleType

    from matplotlib.figure import Figure

#: Bytes of a report file; that of a thousand classes has some hundred thousand.
_LARGEST = 64 << 20


class Shown:
    """A result that `tacfast.html` knows how to draw."""

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def to_json(self, path: str | Path | None = None) -> str | None:
        """What `to_dict` gives, as JSON: returned, or written to a file, which is then whole or not there.

        Raises:
            CheckpointError: the file cannot be written.
        """
        return _given(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", path)

    def to_html(self, path: str | Path | None = None) -> str | None:
        """One self-contained page without scripts: returned, or written to a file, which is then whole or not there.

        Raises:
            CheckpointError: the file cannot be written.
            ProblemError: matplotlib or Jinja is not installed.
        """
        return _given(check_pages().page(self), path)

    def plot(self) -> Figure:
        """The page's first picture, as a matplotlib figure.

        Raises:
            ProblemError: matplotlib is not installed.
        """
        figure: Figure = check_pages().figure(self)
        return figure

    def _repr_html_(self) -> str | None:
        """For notebooks; without matplotlib or Jinja these show the plain repr."""
        try:
            text: str = check_pages().cell(self)
        except ProblemError:
            return None
        return text


def read_json(path: str | Path, what: str) -> Any:
    """A JSON file of at most 64 MiB.

    Raises:
        CheckpointError: it cannot be read.
    """
    content = read_bytes(Path(path), most=_LARGEST)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {what} {str(path)!r}: {error}") from None


def _given(text: str, path: str | Path | None) -> str | None:
    if path is None:
        return text
    with atomic(path) as stream:
        stream.write(text.encode())
    return None


def check_pages() -> ModuleType:
    """What draws pages.

    Raises:
        ProblemError: matplotlib or Jinja is not installed.
    """
    try:
        from tacfast import html
        from tacfast.html import charts, pages  # noqa: F401
    except ModuleNotFoundError as error:
        raise ProblemError(f"pages and figures need {error.name}: pip install matplotlib jinja2") from None
    return html
