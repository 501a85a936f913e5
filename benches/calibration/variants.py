"""Networks scanned several times over, each time with something changed: shares of what came out, and curves of them.

A network counts once, with the share of its variants; intervals are those of as many networks (Clopper & Pearson 1934), which is on the
safe side where variants of a network differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from figures import legend
from networks import GROUPS, Line, Seeds, group_of, pairs, read_networks, targets, usable
from scans import Outcome, Scans, Task, head_file
from tables import interval, share

from tacfast.progress import track

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Outcomes by network and variant.
Outcomes = Mapping[tuple[str, str], Outcome]
#: Shares as (hits, networks); hits are broken where draws disagree.
Share = tuple[float, int]


def chosen(folders: Iterable[Path], seeds: Seeds, each: int, alpha: float, what: str) -> list[Line]:
    """Usable networks with a stored head, or without one but with outcomes of changes of a kind, the first `each` of every data set and
    kind of network."""
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    lines = read_networks(folders)
    scans = {folder: Scans(folder / "curves.jsonl", alpha) for folder in {line["folder"] for line in lines}}
    for line in lines:
        at_hand = head_file(line).exists() or scans[line["folder"]].holds(line["key"], what)
        if seeds.holds(line["seed"], line["key"]) and usable(line) and at_hand:
            seen[line["dataset"], group_of(line)] += 1
            if seen[line["dataset"], group_of(line)] <= each:
                found.append(line)
    return found


def scan_variants(tasks: Mapping[Path, Sequence[Task]], alpha: float, threads: int) -> Outcomes:
    """Outcomes of tasks that are given by folder."""
    made = [o for folder, some in tasks.items() for o in Scans(folder / "curves.jsonl", alpha, threads).of(some)]
    return {(o.network, o.variant): o for o in made}


def by_folder(lines: Sequence[Line], of: Callable[[Line], list[Task]]) -> dict[Path, list[Task]]:
    found: dict[Path, list[Task]] = {}
    for line in track(lines, "preparing", shown=True, total=len(lines)):
        found.setdefault(line["folder"], []).extend(of(line))
    return found


def counted(lines: Sequence[Line], outcomes: Outcomes, variants: Sequence[str], yes: Callable[[Line, Outcome], bool]) -> Share:
    """Networks for which `yes` holds, each with the share of its variants that were made."""
    shares = []
    for line in lines:
        made = [outcomes[line["key"], variant] for variant in variants if (line["key"], variant) in outcomes]
        if made:
            shares.append(sum(yes(line, o) for o in made) / len(made))
    return sum(shares), len(shares)


def flagged(line: Line, o: Outcome) -> bool:
    return o.flagged


def names_target(line: Line, o: Outcome) -> bool:
    return bool(targets(line) & set(o.suspects) or pairs(line) & set(o.pairs))


def inconclusive(line: Line, o: Outcome) -> bool:
    return o.verdict == "inconclusive"


def flagged_by_group(lines: Sequence[Line], outcomes: Outcomes, variants: Sequence[str]) -> list[Share]:
    return [counted([line for line in lines if group_of(line) == group], outcomes, variants, flagged) for group in GROUPS]


def in_words(found: Share) -> str:
    whole = abs(found[0] - round(found[0])) < 1e-9
    return share(*found, digits=0 if whole else 1)


def draw(axes: Axes, x: Sequence[float], shares: Sequence[Share], label: str, number: int) -> None:
    """One curve with its intervals, slightly beside the curves of other numbers; points without networks are left out."""
    beside = [at * 1.04 ** (number - 1) if axes.get_xscale() == "log" else at + 0.06 * (number - 1) for at in x]
    points = [(at, hits / total, *interval(hits, total)) for at, (hits, total) in zip(beside, shares, strict=True) if total]
    if points:
        at, y, low, high = np.array(points).T
        axes.errorbar(
            at, y, (y - low, high - y), fmt="o-", markersize=4, capsize=2, linewidth=1.2, elinewidth=0.7, label=label, color=f"C{number}"
        )


def draw_groups(axes: Axes, x: Sequence[float], rows: Sequence[Sequence[Share]]) -> None:
    """A curve for each kind of network; `rows` hold one share a kind, for each x."""
    for number, (group, shares) in enumerate(zip(GROUPS, zip(*rows, strict=True), strict=True)):
        draw(axes, x, shares, f"{group} ({max(total for _, total in shares)})", number)
    axes.set_ylim(-0.03, 1.03)
    legend(axes)
