"""Proportions with their intervals, and tables in markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from networks import Line
from scipy.stats import beta


def interval(hits: float, total: float) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Clopper & Pearson 1934)."""
    low = float(beta.ppf(0.025, hits, total - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, total - hits)) if hits < total else 1.0
    return low, high


def share(hits: float, total: int, *, digits: int = 0) -> str:
    """Hits of a total, as a percentage, with its interval."""
    if not total:
        return "-"
    low, high = interval(hits, total)
    return f"{hits:.{digits}f}/{total} = {hits / total:.0%} ({low:.0%} to {high:.0%})"


def ratio(hits: int, total: int) -> str:
    """A share of things that are not independent, and so without an interval."""
    return f"{hits}/{total} = {hits / total:.0%}" if total else "-"


def grouped(lines: Iterable[Line], by: Callable[[Line], str]) -> list[tuple[str, list[Line]]]:
    """Groups in the order of their names, then all together."""
    every = list(lines)
    names = sorted({by(line) for line in every})
    return [(name, [line for line in every if by(line) == name]) for name in names] + [("all", every)]


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
