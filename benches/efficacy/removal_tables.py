"""The lines of removal.py as tables in markdown. May import: scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from scores import strongest

Line = dict[str, Any]
#: Accuracy, ASR, excess ASR, recovery and DER of a line, all of the network's strongest trigger.
Figures = tuple[float, float, float, float, float]
NAMES = ("ACC", "ASR", "excess", "recovery", "DER")
_AGAIN = ("retuned", "trigger re-optimised", "flagged again", "networks")
_WORST: tuple[Callable[[Iterable[float]], float], ...] = (min, max, max, min, min)


def figures(line: Line) -> Figures:
    after = line["after"]
    return after["accuracy"], strongest(after), strongest(after, "excess"), strongest(after, "recovery"), line["der"]


def ours(method: str) -> bool:
    return method.startswith("tacfast:")


def control(method: str) -> bool:
    return method in ("none", "clean-twin")


def removal_tables(lines: Sequence[Line], by: str) -> str:
    """A heading and two tables for every setting that differs among the lines."""
    return "\n".join(part for title, kept in _settings(lines) for part in (title, _main_table(kept, by), _rivals_table(kept)))


def _settings(lines: Sequence[Line]) -> Iterator[tuple[str, list[Line]]]:
    """The lines of each setting, with a heading."""

    def setting(line: Line) -> tuple[Any, ...]:
        return line["share"], line["targets"], line["epochs"], line["bfloat16"]

    for (share, targets, epochs, bfloat16), group in groupby(sorted(lines, key=setting), setting):
        yield f"### {share:.0%} clean data, targets by {targets}, {epochs} epochs{', bfloat16' * bfloat16}\n", list(group)


def _row_of(line: Line, by: str) -> str:
    return line["key"] if by == "network" else f"{line['dataset']} {line['attack']}"


def _order(lines: Iterable[Line], name: Callable[[Line], str]) -> list[str]:
    return list(dict.fromkeys(name(line) for line in lines))


def _main_table(lines: Sequence[Line], by: str) -> str:
    """Means over the networks of a row; below, the mean, the worst and the number over all networks."""
    methods = _order(lines, lambda line: line["method"])
    text = [_cells([f"{' / '.join(NAMES)}, %", *methods]), _cells(["---"] * (len(methods) + 1))]
    good = [line for line in lines if "refused" not in line]
    for row in _order(sorted(lines, key=lambda line: _row_of(line, by)), lambda line: _row_of(line, by)):
        text.append(_cells([row, *(_mean([x for x in good if x["method"] == m and _row_of(x, by) == row]) for m in methods)]))
    by_method = [[figures(line) for line in good if line["method"] == m] for m in methods]
    text.append(_cells(["**mean**", *(_percent([fmean(v) for v in zip(*f, strict=True)]) for f in by_method)]))
    text.append(_cells(["**worst**", *(_percent([w(v) for w, v in zip(_WORST, zip(*f, strict=True), strict=False)]) for f in by_method)]))
    text.append(_cells(["ACC of the target, before / after", *(_of_targets([x for x in good if x["method"] == m]) for m in methods)]))
    text.append(_cells(["repairs", *(str(len(f)) for f in by_method)]))
    seconds = [[line["cpu_s"] for line in good if line["method"] == m] for m in methods]
    text.append(_cells(["CPU seconds, mean", *(f"{fmean(s):.1f}" if s else "-" for s in seconds)]))
    return "\n".join(text) + "\n"


def _mean(lines: Sequence[Line]) -> str:
    if not lines:
        return "-"
    return _percent([fmean(v) for v in zip(*(figures(line) for line in lines), strict=True)])


def _of_targets(lines: Sequence[Line]) -> str:
    """Of the worst target of each network; a network that forgets the class it no longer takes for another is no better for it."""
    known = [tuple(line[when]["target_accuracy"] for when in ("before", "after")) for line in lines]
    return _percent([fmean(v) for v in zip(*(pair for pair in known if None not in pair), strict=True)])


def _rivals_table(lines: Sequence[Line]) -> str:
    """For each attack and each of our methods: the other defence with the best mean DER, over the networks that both repaired."""
    good = [line for line in lines if "refused" not in line]
    text = [_cells(["attack", "our method", "best other", *(f"{name}: ours - other" for name in NAMES), "networks"]), _cells(["---"] * 9)]
    for row in [*sorted(_order(good, lambda line: _row_of(line, "attack"))), "**all**"]:
        mine = [line for line in good if row in ("**all**", _row_of(line, "attack"))]
        for method in _order(mine, lambda line: line["method"]):
            if ours(method):
                text.append(_cells([row, method, *_best_other(mine, method)]))
    return "\n".join(text) + "\n" if len(text) > 2 else ""


def _best_other(lines: Sequence[Line], method: str) -> list[str]:
    def of(name: str) -> dict[tuple[str, int], Figures]:
        return {(line["key"], line["seed"]): figures(line) for line in lines if line["method"] == name}

    own, best = of(method), None
    for name in _order(lines, lambda line: line["method"]):
        other = of(name)
        both = own.keys() & other.keys()
        if ours(name) or control(name) or len(both) < len(own):
            continue
        der = fmean(other[key][-1] for key in both)
        if best is None or der > best[0]:
            best = der, name, [fmean(own[key][i] - other[key][i] for key in both) for i in range(len(NAMES))], len(both)
    if best is None:
        return ["-"] * (len(NAMES) + 2)
    return [best[1], *(f"{100 * v:+.1f}" for v in best[2]), str(best[3])]


def last_tables(lines: Sequence[Line]) -> str:
    """ACC / ASR / excess after each attack on the repaired networks, and what a second scan said; one for every setting."""
    text = []
    for title, kept in _settings(lines):
        text += [title.replace("###", "### Attacked again:"), _cells(["ACC / ASR / excess, %", *_AGAIN]), _cells(["---"] * 5)]
        for method in _order(kept, lambda line: line["method"]):
            mine = [line for line in kept if line["method"] == method]
            scans = [line["scan"]["verdict"] == "backdoored" for line in mine if line["scan"]]
            flagged = f"{sum(scans)} of {len(scans)}" if scans else "-"
            text.append(_cells([method, _attacked(mine, "retuned"), _attacked(mine, "reoptimised"), flagged, str(len(mine))]))
    return "\n".join(text) + "\n"


def _attacked(lines: Sequence[Line], name: str) -> str:
    found = [line[name] for line in lines if line[name]]
    if not found:
        return "-"
    return _percent([fmean(v) for v in zip(*((f["accuracy"], strongest(f), strongest(f, "excess")) for f in found), strict=True)])


def map_table(lines: Sequence[Line], method: str, betas: Sequence[float], rates: Sequence[float]) -> str:
    """Mean ACC / ASR / DER for every beta and lr."""
    text = [_cells(["ACC / ASR / DER, %", *(f"lr {lr:g}" for lr in rates)]), _cells(["---"] * (len(rates) + 1))]
    for beta in betas:
        row = []
        for lr in rates:
            cell = [line for line in lines if line["method"] == f"{method}@beta={beta:g},lr={lr:g}"]
            found = [figures(line) for line in cell if "refused" not in line]
            row.append(_percent([fmean(f[i] for f in found) for i in (0, 1, 4)]) if found else "failed" if cell else "-")
        text.append(_cells([f"beta {beta:g}", *row]))
    return "\n".join(text) + "\n"


def _percent(values: Sequence[float]) -> str:
    return " / ".join(f"{100 * v:.1f}" for v in values) or "-"


def _cells(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
