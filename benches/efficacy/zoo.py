"""Tables over a folder of models whose truth is known: what a scan says, and whether the engines agree on them.

    zoo.py scan  --zoo DIR --data DIR [--heads DIR]
    zoo.py agree --zoo DIR --data DIR [--heads DIR]

DIR/NAME holds model.safetensors, meta.json (architecture, data, mean, std) and truth.json; --data holds DATA.npz, with x and y, per data
set. The first 2500 images of a fixed random order are the defender's. The zoo's own architecture file is run: use a zoo that you trust.
What repairs leave of the backdoors: removal.py, with --zoo.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from zoo_models import ZooModel, zoo_models

import tacfast
from tacfast.files import read_npz
from tacfast.heads import capture

CLEAN = 2500
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
out = Console(width=200)


class Case:
    """A model of the zoo with the defender's images."""

    def __init__(self, model: ZooModel, data: Path) -> None:
        self.truth, self.model = model.truth, model.network()
        arrays, _ = read_npz(data / f"{model.meta['data']}.npz")
        order = np.random.default_rng(0).permutation(len(arrays["x"]))[:CLEAN]
        self.x = torch.from_numpy(arrays["x"][order]).permute(0, 3, 1, 2).float() / 255
        self.y = torch.from_numpy(arrays["y"][order])

    def clean_batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self.x.split(250), self.y.split(250), strict=True))


def row(name: str, truth: dict[str, Any], report: tacfast.ScanReport) -> str:
    suspects = ", ".join(f"{s.target} (p={s.p_value:.2g})" for s in report.suspects) or "-"
    if report.pairs:
        suspects = f"y+{(report.pairs[0][1] - report.pairs[0][0]) % len(report.norms)}"
    p = "-" if report.p_value is None else f"{report.p_value:.2g}"
    index = "-" if report.mad_index is None else f"{report.mad_index:.1f}"
    targets = truth["targets"] if truth["targets"] else "-"
    seconds = f"{sum(report.timing_s.values()):.2f}"
    cells = [name, truth["attack"], str(targets), report.verdict, report.kind or "-", suspects, p, index, seconds]
    return f"| {' | '.join(cells)} |"


@app.command()
def scan(
    zoo: Annotated[Path, typer.Option()],
    data: Annotated[Path, typer.Option()],
    heads: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Verdict beside truth for every model of the zoo, and for every head of a folder with truth.json."""
    out.print("| model | attack | targets | verdict | kind | named | p | MAD index | s |\n|---|---|---|---|---|---|---|---|---|")
    for model in zoo_models(zoo):
        case = Case(model, data)
        out.print(row(model.name, case.truth, tacfast.scan(case.model, case.clean_batches())), markup=False, highlight=False)
    for file in [] if heads is None else sorted(heads.glob("*.npz")):
        truth = json.loads((file.parent / "truth.json").read_text())[file.stem]
        arrays, _ = read_npz(file)
        report = tacfast.scan_head(arrays["W"], arrays["b"], arrays["Z"], labels=arrays.get("y"))
        out.print(row(file.stem, truth, report), markup=False, highlight=False)


@app.command()
def agree(
    zoo: Annotated[Path, typer.Option()],
    data: Annotated[Path, typer.Option()],
    heads: Annotated[Path | None, typer.Option()] = None,
    most_classes: Annotated[int, typer.Option(help="clarabel-full takes this many classes of a head at most.")] = 50,
) -> None:
    """Do all engines give the same statuses and norms on real heads, and how good are the certificates?"""
    out.print("| head | classes | engine | same status | largest relative difference | worst residual or gap |\n|---|---|---|---|---|---|")
    for model in zoo_models(zoo):
        case = Case(model, data)
        captured = capture(case.model, case.clean_batches())
        compare(model.name, captured.weight, captured.bias, captured.latents, most_classes)
    for file in [] if heads is None else sorted(heads.glob("*.npz")):
        arrays, _ = read_npz(file)
        compare(file.stem, arrays["W"], arrays["b"], arrays["Z"], most_classes)


def compare(name: str, w: Any, b: Any, z: Any, most_classes: int) -> None:
    every = tacfast.solve(w, b, z, engine="active-set")
    some = np.unique(np.linspace(0, len(w) - 1, min(len(w), most_classes)).astype(int))
    for engine, classes in (("active-set", every.classes), ("clarabel", every.classes), ("clarabel-full", some)):
        other = tacfast.solve(w, b, z, classes=classes, engine=engine)  # type: ignore[arg-type]
        solved = other.status == "solved"
        worst = max(r[solved].max(initial=0) for r in (other.primal_residual, other.dual_residual, other.gap))
        apart = np.abs(other.norms[solved] / every.norms[classes][solved] - 1).max(initial=0)
        same = f"{np.sum(other.status == every.status[classes])} of {len(classes)}"
        out.print(f"| {name} | {len(w)} | {engine} | {same} | {apart:.1e} | {worst:.1e} |", highlight=False)


if __name__ == "__main__":
    app()
