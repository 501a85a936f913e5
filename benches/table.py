"""One markdown table of a benchmark run.

python benches/table.py RESULTS.json     what pytest-benchmark's --benchmark-json wrote
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

OURS = "tacfast active-set"
#: A column beside those of the cases.
TOLERANCE = "tolerance"
Rows = dict[str, dict[str, str]]


def main(path: str) -> None:
    results = json.loads(Path(path).read_text())
    infos = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
    timed = [info for info in infos if "solver" in info]
    sizes = {info["case"]: info["samples"] * info["classes"] * info["dim"] for info in timed}
    cases = sorted(sizes, key=lambda case: sizes[case])
    rows = fill(timed, results.get("failed", []))
    cpu = results["machine_info"].get("cpu", {})
    print(f"\n{cpu.get('brand_raw', 'unknown CPU')}, {cpu.get('count', '?')} cores\n")
    print(f"| ms per class (ratio to {OURS}; classes timed) | threads | {' | '.join(cases)} | tolerance |")
    print(f"|---|---{'|---' * len(cases)}|---|")
    for row, cells in rows.items():
        print(f"| {row} | {' | '.join(cells.get(column, '') for column in [*cases, TOLERANCE])} |")
    print(f"\n{basis(timed)}")
    for info in infos:
        if "uncollapsed" in info:
            print(uncollapsed(info, timed))
    for info in infos:
        if "pair" in info:
            print(pair(info, timed))


def fill(timed: list[dict[str, Any]], failed: list[dict[str, str]]) -> Rows:
    """Cells by row (`solver | threads`) and case; our stages and whole solves in rows of their own."""
    unit = {info["case"]: info["ms"] for info in timed if info["solver"] == OURS and info["threads"] == 1}
    rows: Rows = {}
    asked: dict[str, set[float]] = {}

    def put(row: str, info: dict[str, Any], ms: float) -> None:
        ratio = f"×{number(ms / unit[info['case']])}; " if info["case"] in unit else ""
        rows.setdefault(row, {})[info["case"]] = f"{number(ms)} ({ratio}{info['timed']})"
        asked.setdefault(row, set()).add(info["tolerance"])

    for info in timed:
        ours = "whole_ms" in info
        if ours and info["threads"] == 1:
            put(f"{info['solver']}, QP stage | 1", info, info["ms"])
        if not ours:
            put(f"{info['solver']} | {info['threads']}", info, info["ms"])
    for info in timed:
        if "whole_ms" in info:
            put(f"{info['solver']}, whole solve | {info['threads']}", info, info["whole_ms"])
    for row, tolerances in asked.items():
        rows[row][TOLERANCE] = " to ".join(f"{t:.0e}" if t else "none" for t in sorted({max(tolerances), min(tolerances)}, reverse=True))
    for failure in failed:
        row = next((row for row in rows if row.startswith(f"{failure['solver']} |")), f"{failure['solver']} | ")
        rows.setdefault(row, {})[failure["case"]] = f"failed: {failure['why']}"
    return rows


def basis(timed: list[dict[str, Any]]) -> str:
    """What the ratios are ratios to, and how accurate the answers were."""
    worst = max((max(info["difference"], info["violation"]) for info in timed), default=0.0)
    return (
        f"Ratios are to {OURS}'s QP stage, on one thread. Of what was timed the largest violation, or difference to the certified norm,"
        f" is {worst:.1e}."
    )


def uncollapsed(info: dict[str, Any], timed: list[dict[str, Any]]) -> str:
    """The cost of the problem as published, and what the collapse leaves of it: that does not depend on the number of samples."""
    same = [i for i in timed if i["solver"] == info["uncollapsed"] and (i["classes"], i["dim"]) == (info["classes"], info["dim"])]
    left = f"; collapsed to {info['classes'] - 1} of them {number(same[0]['ms'])} ms" if same else ""
    return f"{info['uncollapsed']} at {info['case']} with all {info['constraints']} constraints: {number(info['ms'])} ms a class{left}."


def pair(info: dict[str, Any], timed: list[dict[str, Any]]) -> str:
    """A line on two things that were timed in turn."""
    if info["pair"] == "gemm":
        return (
            f"Whole solve at {info['case']}, threads = {info['threads']}: {info['second_s']:.3f} s = {info['medians']:.2f} × the logits"
            f" GEMM ({info['blas']}, {info['first_s']:.3f} s) by medians, {info['minima']:.2f} × by minima."
        )
    if info["pair"] == "peer":
        return (
            f"{info['peer']} ({info['timed']} classes) and {OURS}'s QP stage in turn at {info['case']}: {1e3 * info['second_s']:.3g} and"
            f" {1e3 * info['first_s']:.3g} ms a class, ratio {info['medians']:.0f} by medians, {info['minima']:.0f} by minima."
        )
    line = (
        f"Clarabel engine at {info['case']}: {info['first_s']:.2f} s on 1 thread, {info['second_s']:.2f} s on 2,"
        f" speed-up {1 / info['medians']:.2f} by medians, {1 / info['minima']:.2f} by minima"
    )
    direct = [i for i in timed if i["case"] == info["case"] and i["solver"].startswith("Clarabel,")]
    if direct:
        best = min(direct, key=lambda i: i["ms"])
        line += f"; {best['ms'] / (1e3 * info['first_s'] / info['classes']):,.0f} × faster per class than {best['solver']} called directly"
    return line + "."


def number(value: float) -> str:
    """Three digits, without exponents where they are large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main(sys.argv[1])
