"""Figures that come out the same, byte for byte, wherever the numbers are the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Out = Annotated[Path, typer.Option(help="Folder of the figures.")]
Format = Annotated[str, typer.Option("--format", help="svg or png.")]

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "tacfast",  # names of clip paths
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
}
#: What would change from day to day and from one version of matplotlib to the next.
_METADATA: dict[str, dict[str, Any]] = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}


def panels(count: int, *, width: float = 4.4, height: float = 4.6, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels in a row; matplotlib is needed from here on."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise typer.BadParameter("figures need matplotlib: pip install 'tacfast[bench]'") from None
    from matplotlib import rc_context

    with rc_context(_STYLE):
        figure = Figure(figsize=(width * max(count, 1), height), layout="constrained")
        found = figure.subplots(1, max(count, 1), squeeze=False, **shared)
    return figure, list(np.ravel(found))


def legend(axes: Axes) -> None:
    """Below the panel, where it hides no curve."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize="small", frameon=False)


def save(figure: Figure, folder: Path, name: str, kind: str) -> Path:
    """Write FOLDER/NAME.KIND and say so."""
    from matplotlib import rc_context

    if kind not in _METADATA:
        raise typer.BadParameter(f"the format of figures is svg or png, got {kind!r}")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.{kind}"
    with rc_context(_STYLE):
        figure.savefig(file, metadata=_METADATA[kind], dpi=150)
    print(f"{file} written")
    return file
