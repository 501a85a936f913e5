"""Figures that come out the same, byte for byte, wherever the numbers are the same."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Kind(str, Enum):
    """What a figure is written as."""

    svg = "svg"
    png = "png"


def _drawable(folder: Path) -> Path:
    """Refuses to start what could not be drawn in the end."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise typer.BadParameter("figures need matplotlib: pip install matplotlib, or 'tacfast[bench]'") from None
    return folder


Out = Annotated[Path, typer.Option(help="Folder of the figures.", callback=_drawable)]
Format = Annotated[Kind, typer.Option("--format", help="Of the figures.")]

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "tacfast",  # names of clip paths
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
}
#: What would change from day to day and from one version of matplotlib to the next.
_METADATA: dict[Kind, dict[str, Any]] = {Kind.svg: {"Date": None, "Creator": None}, Kind.png: {"Software": None}}


def panels(count: int, *, width: float = 4.4, height: float = 4.6, columns: int | None = None, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, in one row or in rows of so many columns, and one where there is nothing to be shown."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    count = max(count, 1)
    across = min(count, columns or count)
    down = -(-count // across)
    with rc_context(_STYLE):
        figure = Figure(figsize=(width * across, height * down), layout="constrained")
        found = list(np.ravel(figure.subplots(down, across, squeeze=False, **shared)))
    for axes in found[count:]:
        axes.remove()
    return figure, found[:count]


def legend(axes: Axes) -> None:
    """Below the panel, where it hides no curve."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize="small", frameon=False)


def save(figure: Figure, folder: Path, name: str, kind: Kind) -> Path:
    """Write FOLDER/NAME.KIND and say so."""
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.{kind.value}"
    with rc_context(_STYLE):
        figure.savefig(file, metadata=_METADATA[kind], dpi=150)
    print(f"{file} written")
    return file
