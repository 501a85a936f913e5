"""How like the smallest latent shift is to the change that the trigger really makes, channel by channel.

    export PYTHONPATH=benches/calibration
    tac.py --folder CALIBRATION --data gtsrb=gtsrb.npz [--data cifar10=cifar10.npz] --out FIGURES [--zoo DIR] [--arch resnet]

The true trigger-activated change (TAC) is the mean over the victims among the test images of latents with the trigger less latents
without (arXiv:2511.08944, after Zheng et al. 2022, ECCV); the reconstructed one is s_p of the defender's clean images, at the order
statistic of a scan. Networks as in removal.py; attacks with one target only. Prints a table, and draws one panel a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from figures import Format, Kind, Out, panels, save
from networks import Seeds
from numpy.typing import NDArray
from removal import Archs, Attacks, DataOption, Folders, Keys, SeedsOption, Zoo
from scipy.stats import spearmanr
from subjects import Filter, Subject, chosen, open_subject
from tables import markdown
from torch import Tensor
from train import read_all

import tacfast
from tacfast.heads import capture
from tacfast.scan import QUANTILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The strongest channels whose sets are compared, as a share of all.
_TOP = 0.1


@dataclass(frozen=True, eq=False)
class Likeness:
    """Both changes of a network, float64 (d,)."""

    subject: Subject
    true: NDArray[np.float64]
    reconstructed: NDArray[np.float64]

    @property
    def cosine(self) -> float:
        return float(self.true @ self.reconstructed / (np.linalg.norm(self.true) * np.linalg.norm(self.reconstructed)))

    @property
    def rank_correlation(self) -> float:
        """Spearman's, of the absolute values."""
        return float(spearmanr(np.abs(self.true), np.abs(self.reconstructed)).statistic)

    @property
    def overlap(self) -> float:
        """The share of the strongest tenth of the channels that is in both; a tenth is chance."""
        count = max(1, round(_TOP * len(self.true)))
        tops = [set(np.argsort(-np.abs(change))[:count].tolist()) for change in (self.true, self.reconstructed)]
        return len(tops[0] & tops[1]) / count


def likeness(subject: Subject, share: float) -> Likeness:
    (door, *_), (target,) = subject.doors, subject.targets
    images, labels = subject.rest
    victims = door.rule.victims(labels)
    true = _latents(subject, door.trigger(images[victims])) - _latents(subject, images[victims])
    clean = capture(subject.model, _batches(subject.clean(share)[0]), device="cpu")
    shift = tacfast.solve(clean.weight, clean.bias, clean.latents, classes=[target], quantile=QUANTILE).perturbations[0]
    return Likeness(subject, true.mean(0), shift)


def _latents(subject: Subject, images: Tensor) -> NDArray[np.float64]:
    return capture(subject.model, _batches(images), device="cpu").latents.astype(np.float64)


def _batches(images: Tensor) -> Sequence[Tensor]:
    return images.split(250)


def draw(axes: Axes, found: Likeness) -> None:
    """A dot a channel, in units of the largest of its kind."""
    x, y = (change / np.abs(change).max() for change in (found.true, found.reconstructed))
    axes.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    axes.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    axes.scatter(x, y, s=9)
    line = found.subject.line
    title = f"{line['dataset']} {line['attack']}: cosine {found.cosine:.2f}"
    axes.set(title=title, xlabel="true change", ylabel="smallest shift", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))


def main(
    data: DataOption,
    out: Out,
    folder: Folders = None,
    zoo: Zoo = None,
    arch: Archs = None,
    attack: Attacks = None,
    network: Keys = None,
    seeds: SeedsOption = Seeds.all,
    share: Annotated[float, typer.Option(help="Clean images, as a share of the training set.")] = 0.05,
    kind: Format = Kind.svg,
) -> None:
    """Compare reconstructed and true changes."""
    sets = read_all(data)
    found = []
    for line in chosen(folder or [], zoo, Filter(list(sets), arch or [], attack or [], seeds, network or [])):
        subject = open_subject(line, sets[line["dataset"]])
        if len(subject.targets) == len(subject.doors) == 1:
            found.append(likeness(subject, share))
    if not found:
        raise typer.BadParameter("no network with one working trigger and one target passes the filters")
    found.sort(key=lambda f: f.subject.key)
    figure, axes = panels(len(found), width=3.0, height=3.1, columns=4)
    for ax, f in zip(axes, found, strict=True):
        draw(ax, f)
    save(figure, out, "tac", kind)
    rows = [[f.subject.key, str(len(f.true)), f"{f.cosine:.2f}", f"{f.rank_correlation:.2f}", f"{f.overlap:.0%}"] for f in found]
    print(markdown(["network", "channels", "cosine", "rank correlation of sizes", "strongest tenth shared"], rows))


if __name__ == "__main__":
    typer.run(main)
