"""What a report holds, drawn; each function makes a figure of a width in inches.
May import: matplotlib, svg, text, swarm, report, outcome.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from tacfast.html import text
from tacfast.html.svg import PALETTE, drawing
from tacfast.html.swarm import Strip
from tacfast.outcome import RepairResult
from tacfast.report import ScanReport

#: Inches of a figure that is asked for by itself.
_WIDTH = 7.5
#: The smallest p-value with a place of its own: simulations know none below.
_LEAST_P = 1e-5
#: Around a suspected pair: seen on all colours of the heat maps, which are those of the day at night too.
_FRAME = "#e08a00"


def norms_figure(report: ScanReport, width: float = _WIDTH) -> Figure:
    """All classes by their norms; marked are the suspects, or the class that stands out most, the others what it stands out from."""
    names = (report.details or {}).get("names") or []
    shown = [s.target for s in report.suspects] or [e.target for e in report.evidence if e.target is not None][:1]
    marked = {k: text.label(k, names, text.SHORT) for k in shown}
    with drawing():
        strip = Strip(report.norms, marked, width, colour=PALETTE.flag if report.suspects else PALETTE.accent)
        figure = Figure(figsize=(width, strip.height + 0.75))
        strip.draw(axes := figure.subplots())
        strip.scale(axes)
        axes.set_xlabel("norm of the smallest shift into the class (logarithmic)")
    return figure


def change_figure(result: RepairResult, width: float = _WIDTH) -> Figure:
    """Norms before a repair and after it, on one scale; its targets marked."""
    names = (result.details or {}).get("names") or []
    marked = {k: text.label(k, names, text.SHORT) for k in result.targets}
    states = [("before", result.before)] + ([] if result.after is None else [("after", result.after)])
    every = np.concatenate([state.norms for _, state in states])
    with drawing():
        strips = [Strip(state.norms, marked, width, span=every) for _, state in states]
        heights = [strip.height for strip in strips]
        figure = Figure(figsize=(width, sum(heights) + 1.2))
        grid = figure.subplots(len(strips), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, strip, (title, _) in zip(grid, strips, states, strict=True):
            strip.draw(axes)
            axes.set_title(title)
        strips[0].scale(grid[-1])
        for axes in grid[:-1]:
            axes.tick_params(labelbottom=False)
        grid[-1].set_xlabel("norm of the smallest shift into the class (logarithmic)")
    return figure


def evidence_figure(report: ScanReport, width: float = _WIDTH) -> Figure:
    """p-values, the stronger the farther to the right; those of each kind by itself, and what they come to together."""
    rows = [(e.kind, e.p_value, False) for e in report.evidence]
    rows += [] if report.p_value is None else [("all together", report.p_value, True)]
    with drawing():
        figure = Figure(figsize=(width, 0.36 * len(rows) + 0.75))
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_xlim(1.25, _LEAST_P / 1.5)
        _level(axes, report.alpha)
        for at, (_, p, total) in enumerate(rows):
            p = max(p, _LEAST_P)
            colour = (PALETTE.flag if p <= report.alpha else PALETTE.accent) if total else PALETTE.rest
            axes.plot([1, p], [at, at], color=colour, linewidth=5 if total else 3, solid_capstyle="butt")
            axes.plot(p, at, "o", color=colour, markersize=8 if total else 6)
        axes.set_yticks(range(len(rows)), [kind if width > 6 else kind.replace(" and ", "\nand ") for kind in (row[0] for row in rows)])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0, labelcolor=PALETTE.ink)
        _p_axis(axes)
    return figure


def shift_figure(shift: dict[str, object], width: float = _WIDTH) -> Figure:
    """|s| of the channels, the largest first."""
    sizes = np.array(shift["sizes"], dtype=np.float64)
    half, channels = int(str(shift["half"])), int(str(shift["channels"]))
    with drawing():
        figure = Figure(figsize=(width, 2.1))
        axes = figure.subplots()
        edges = np.arange(len(sizes) + 1) + 0.5
        axes.stairs(sizes, edges, fill=True, color=PALETTE.rest)
        axes.stairs(sizes[:half], edges[: min(half, len(sizes)) + 1], fill=True, color=PALETTE.accent)
        axes.annotate(
            f"{half} of {channels} channels hold half of ‖s‖²", (0.98, 0.86), xycoords="axes fraction", ha="right", color=PALETTE.accent
        )  # fmt: skip
        axes.set(xlim=(0.5, len(sizes) + 0.5), ylim=(0, 1.08 * sizes.max(initial=1e-300)), ylabel="|change|")
        axes.set_xlabel("latent channels, by size" + ("" if channels == len(sizes) else f" (the first {len(sizes)})"))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    return figure


def pairs_figure(report: ScanReport, norms: NDArray[np.float64], width: float = _WIDTH) -> Figure:
    """Norms by source and target, and how much easier each way is than back; the pairs that are suspected are framed."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(norms)
        lead = logs.T - logs
    top = float(np.nanmax(np.abs(lead[np.isfinite(lead)]), initial=1e-9))
    beside = width > 6
    with drawing():
        figure = Figure(figsize=(width, 0.46 * width if beside else 1.95 * width))
        left, right = figure.subplots(1, 2) if beside else figure.subplots(2, 1)
        near = LinearSegmentedColormap.from_list("near", ["#123a63", "#4f86bd", "#dfe9f3"])
        odd = LinearSegmentedColormap.from_list("odd", ["#4f86bd", "#eef0f2", "#b5381f"])
        first = left.imshow(norms, cmap=near, interpolation="none")
        second = right.imshow(lead, cmap=odd, vmin=-top, vmax=top, interpolation="none")
        for axes, image, title in ((left, first, "norm of the shift"), (right, second, "easier than the way back (log ratio)")):
            bar = figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02)
            bar.outline.set_visible(False)
            axes.set(title=title, xlabel="into class", ylabel="from class")
            for a, k in report.pairs:
                axes.add_patch(Rectangle((k - 0.5, a - 0.5), 1, 1, fill=False, edgecolor=_FRAME, linewidth=1.7))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(10, integer=True))
            axes.spines[:].set_visible(False)
    return figure


def convergence_figure(report: ScanReport, points: list[dict[str, object]], width: float = _WIDTH) -> Figure:
    """The p-value against the number of samples."""
    found = [(int(str(p["samples"])), max(float(str(p["p_value"])), _LEAST_P), p) for p in points if p["p_value"] is not None]
    with drawing():
        figure = Figure(figsize=(width, 2.5))
        axes = figure.subplots()
        axes.set(xscale="log", yscale="log", xlabel="clean samples", ylabel="p-value")
        axes.axhline(report.alpha, color=PALETTE.soft, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.plot([n for n, _, _ in found], [p for _, p, _ in found], color=PALETTE.line, linewidth=2, zorder=1)
        for n, p, point in found:
            flagged = point["verdict"] == "backdoored"
            axes.plot(n, p, "o", color=PALETTE.flag if flagged else PALETTE.accent, markersize=8)
            axes.annotate(_named(point), (n, p), (0, -13 if p > 3e-5 else 9), textcoords="offset points", ha="center", fontsize=8.5)
        axes.annotate(f"level {report.alpha:g}", (0.995, report.alpha), (0, 3), xycoords=("axes fraction", "data"),
                      textcoords="offset points", ha="right", fontsize=8.5, color=PALETTE.soft)  # fmt: skip
        axes.set_ylim(_LEAST_P / 2.5, 4)
        axes.xaxis.set_major_locator(FixedLocator([n for n, _, _ in found]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:.0f}"))
        axes.margins(x=0.12)
        _p_ticks(axes.yaxis)
    return figure


def _named(point: dict[str, object]) -> str:
    if point["kind"] == "all-to-all":
        return "all-to-all"
    targets = point["targets"] if isinstance(point["targets"], list) else []
    many = ", …" if len(targets) > 2 else ""
    return (
        f"class {', '.join(map(str, targets[:2]))}{many}"
        if targets
        else {"clean": "no evidence"}.get(str(point["verdict"]), str(point["verdict"]))
    )


def _level(axes: Axes, alpha: float) -> None:
    axes.axvline(alpha, color=PALETTE.soft, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate(f"level {alpha:g}", (alpha, 1.0), (3, 1), xycoords=("data", "axes fraction"), textcoords="offset points",
                  fontsize=8.5, color=PALETTE.soft)  # fmt: skip


def _p_axis(axes: Axes) -> None:
    axes.set_xlabel("p-value: stronger evidence to the right")
    axes.spines["left"].set_visible(False)
    _p_ticks(axes.xaxis)


def _p_ticks(axis: object) -> None:
    ticks = [1, 0.1, 0.01, 0.001, 0.0001, 0.00001]
    axis.set_major_locator(FixedLocator(ticks))  # type: ignore[attr-defined]
    axis.set_minor_locator(NullLocator())  # type: ignore[attr-defined]
    axis.set_major_formatter(FuncFormatter(lambda p, _: f"{p:.5f}".rstrip("0").rstrip(".")))  # type: ignore[attr-defined]
