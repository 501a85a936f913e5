"""Pages, figures and notebook cells of results. Needs matplotlib and Jinja. May import: report, outcome; `pages` and `charts` when called.

`words` says in plain language what a report holds, `charts` draws it, `svg` puts drawings into a page, `thumbnails` pictures,
`pages` fills the templates, and `text` makes foreign text harmless.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tacfast.outcome import RepairResult
from tacfast.report import ScanReport
from tacfast.shown import Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def page(result: Shown) -> str:
    """One self-contained HTML page."""
    from tacfast.html.pages import repair_page, scan_page

    return repair_page(result) if isinstance(result, RepairResult) else scan_page(_scan(result))


def cell(result: Shown) -> str:
    """A piece of HTML for a notebook: the verdict, key figures, one picture."""
    from tacfast.html.pages import repair_cell, scan_cell

    return repair_cell(result) if isinstance(result, RepairResult) else scan_cell(_scan(result))


def figure(result: Shown) -> Figure:
    """The picture of the classes' norms; of a repair, before and after."""
    from tacfast.html.charts import change_figure, norms_figure

    return change_figure(result) if isinstance(result, RepairResult) else norms_figure(_scan(result))


def _scan(result: Shown) -> ScanReport:
    if not isinstance(result, ScanReport):
        raise TypeError(f"no page is known for {type(result).__name__}")
    return result
