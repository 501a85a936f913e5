"""Time and peak memory of a whole solve against C, d and n, one varied at a time around a centre, with fitted exponents, as markdown.

Each point runs in a process of its own, so that its peak resident memory (Linux: VmHWM) is its own. Exponents are slopes of least squares
on logarithms over the points of a table: what happened over that range, not an asymptote. Synthetic heads with ReLU-like latents, float32.

python benches/scaling.py [--threads T]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CENTRE = {"C": 1000, "d": 512, "n": 5000}
POINTS = {
    "C": [125, 250, 500, 1000, 2000, 4000, 8000],
    "d": [64, 128, 256, 512, 1024, 2048, 4096],
    "n": [625, 1250, 2500, 5000, 10_000, 20_000, 40_000],
}
ROUNDS = 3
#: A point that takes longer than this is run once.
SLOW_S = 5.0
MIB = 1 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--point", nargs=3, type=int, metavar=("C", "d", "n"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(measure(*arguments.point, threads=arguments.threads)))
        return
    for name, values in POINTS.items():
        points = [{**CENTRE, name: value} for value in values]
        show(name, points, [in_a_process(list(point.values()), arguments.threads) for point in points])


def in_a_process(point: list[int], threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--threads", str(threads), "--point", *map(str, point)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return result


def measure(classes: int, dim: int, samples: int, *, threads: int) -> dict[str, Any]:
    """Least wall seconds of some solves; resident bytes before them and at their peak; the certified share of the classes."""
    import tacfast
    from tacfast.bench import seconds, synthetic_head

    w, b, z = synthetic_head(classes, dim, samples)
    before = resident("VmRSS")
    solved: list[tacfast.TacSolutions] = []

    def work() -> None:
        # Kept until the end, and only one of them: a caller holds the solutions too.
        solved[:] = [tacfast.solve(w, b, z, threads=threads)]

    times = [seconds(work)]
    peak = resident("VmHWM")
    while times[0] < SLOW_S and len(times) < ROUNDS:
        times.append(seconds(work))
    return {"seconds": min(times), "before": before, "peak": peak, "certified": float(solved[0].certified.mean())}


def resident(field: str) -> int:
    """Bytes, as the kernel counts them for this process alone."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def show(name: str, points: list[dict[str, int]], results: list[dict[str, Any]]) -> None:
    centre = ", ".join(f"{other} = {value}" for other, value in CENTRE.items() if other != name)
    print(f"\n{centre}:\n\n| {name} | seconds | ms per class | peak MiB | of them the solve's | certified |\n|---|---|---|---|---|---|")
    for point, r in zip(points, results, strict=True):
        own = (r["peak"] - r["before"]) * MIB
        per_class = 1e3 * r["seconds"] / point["C"]
        print(f"| {point[name]} | {r['seconds']:.3g} | {per_class:.3g} | {r['peak'] * MIB:.0f} | {own:.0f} | {r['certified']:.0%} |")
    sizes = [point[name] for point in points]
    for what, values in (("seconds", [r["seconds"] for r in results]), ("the solve's memory", [r["peak"] - r["before"] for r in results])):
        whole, last = slope(sizes, values), slope(sizes[-2:], values[-2:])
        print(f"\n{what} ~ {name}^{whole:.2f} over all points, {name}^{last:.2f} over the last two", flush=True)


def slope(x: list[int], y: list[float]) -> float:
    """Least squares on logarithms."""
    import numpy as np

    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


if __name__ == "__main__":
    main()
