"""Norms of few or many classes on one line: a dot for each, or from some hundred on a histogram. May import: matplotlib, svg, text.

The bands are one, two and three standard deviations around the mean of the unmarked classes' log norms: what the scan measures in.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from tacfast.html.svg import PALETTE

#: Up to so many classes each dot holds its number; up to so many each has a dot.
_NUMBERED, _DOTS = 24, 200
#: Marked classes that are named.
_NAMED = 6
#: Points between names one above the other.
_LEADING = 14
#: Inches left and right of the axis.
_MARGIN = 0.5


class Strip:
    """The classes' norms, laid out for a width in inches; `height` is in inches too."""

    def __init__(
        self,
        norms: NDArray[np.float64],
        marked: Mapping[int, str],
        width: float,
        *,
        colour: str = PALETTE.flag,
        span: NDArray[np.float64] | None = None,
    ) -> None:
        """`marked` are labels by class, drawn in `colour`; `span` holds all norms that must fit on the axis."""
        self.colour = colour
        with np.errstate(divide="ignore"):
            self.logs = np.log(norms)
        self.shown = np.flatnonzero(np.isfinite(self.logs))
        self.marked = {k: name for k, name in marked.items() if np.isfinite(self.logs[k])}
        every = self.logs if span is None else np.log(span[span > 0])
        every = every[np.isfinite(every)]
        others = np.array([self.logs[k] for k in self.shown if k not in self.marked])
        self.centre = float(others.mean()) if len(others) else 0.0
        self.spread = float(others.std(ddof=1)) if len(others) > 1 else 0.0
        low, high = (float(every.min()), float(every.max())) if len(every) else (0.0, 1.0)
        edge = max(0.04 * (high - low), 0.01)
        self.low, self.high = low - edge, high + edge
        self.dot = 17.0 if len(self.shown) <= _NUMBERED else 8.5 if len(self.shown) <= 100 else 5.5
        self.bins = max(12, int((width - _MARGIN) * 72 / (self.dot + 0.5))) if self.dotted else int(width * 12)
        self.column = np.clip(((self.logs[self.shown] - self.low) / (self.high - self.low) * self.bins).astype(int), 0, self.bins - 1)
        tallest = int(np.bincount(self.column, minlength=1).max(initial=1))
        self.rows = tallest
        names = min(len(self.marked), _NAMED)
        self.above = names * _LEADING + 8 if names else 4
        self.points = max(tallest * self.dot, 34.0) if self.dotted else 95.0
        self.height = (self.points + self.above) / 72

    @property
    def dotted(self) -> bool:
        return len(self.shown) <= _DOTS

    def draw(self, axes: Axes) -> None:
        """Draw bands, classes and names into axes of the strip's height."""
        unit = self.rows * self.dot if self.dotted else self.points
        top = max(unit, self.points) + self.above
        axes.set(xlim=(self.low, self.high), ylim=(0, top))
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        for times in (3, 2, 1):
            width = times * self.spread
            axes.axvspan(self.centre - width, self.centre + width, color=PALETTE.band, alpha=(0.9, 0.7, 0.55)[times - 1], linewidth=0)
        axes.axvline(self.centre, color=PALETTE.line, linewidth=1)
        tops = self._dots(axes) if self.dotted else self._bars(axes)
        self._names(axes, tops, top)

    def scale(self, axes: Axes) -> None:
        """Ticks in the norm's own units, at round numbers."""
        low, high = np.exp(self.low), np.exp(self.high)
        # Round in the logarithm where the axis spans a lot, round in the number where it does not.
        wide = LogLocator(subs=(1, 2, 3, 5)).tick_values(low, high) if high > 4 * low else MaxNLocator(6).tick_values(low, high)
        ticks = [t for t in wide if low <= t <= high]
        axes.xaxis.set_major_locator(FixedLocator(list(np.log(ticks))))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{np.exp(x):.4g}"))

    def _dots(self, axes: Axes) -> dict[int, float]:
        stack: dict[int, int] = {}
        tops = {}
        # Marked classes are stacked last, where their names are.
        for k, column in sorted(
            zip(self.shown.tolist(), self.column.tolist(), strict=True), key=lambda item: (item[0] in self.marked, item[0])
        ):
            level = stack[column] = stack.get(column, 0) + 1
            y, hot = (level - 0.5) * self.dot, k in self.marked
            tops[k] = y + self.dot / 2
            axes.plot(self.logs[k], y, "o", color=self.colour if hot else PALETTE.rest, markersize=self.dot - 1.5, markeredgewidth=0)
            if self.dot > 12:
                axes.annotate(str(k), (self.logs[k], y), ha="center", va="center_baseline", fontsize=8, color=PALETTE.paper)
        return tops

    def _bars(self, axes: Axes) -> dict[int, float]:
        marks = np.isin(self.shown, list(self.marked))
        counts = np.bincount(self.column[~marks], minlength=self.bins)
        scale = self.points / max(1, counts.max())
        axes.stairs(counts * scale, np.linspace(self.low, self.high, self.bins + 1), fill=True, color=PALETTE.rest)
        for k in self.marked:
            axes.plot(self.logs[k], 6, "o", color=self.colour, markersize=9, markeredgewidth=0)
        return dict.fromkeys(self.marked, 11.0)

    def _names(self, axes: Axes, tops: Mapping[int, float], top: float) -> None:
        named = sorted(list(self.marked)[:_NAMED], key=lambda k: -self.logs[k])
        for place, k in enumerate(named):
            y, x = top - 4 - (place + 1) * _LEADING + 4, self.logs[k]
            axes.plot([x, x], [tops[k], y - 1], color=self.colour, linewidth=1)
            right = x > (self.low + self.high) / 2
            axes.annotate(self.marked[k], (x, y), (-4 if right else 4, 0), textcoords="offset points", ha="right" if right else "left",
                          va="center", color=self.colour, weight="bold", annotation_clip=False)  # fmt: skip
