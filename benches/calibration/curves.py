"""Detection and false positives against what the defender and the attacker can change: tables in markdown, and figures.

    curves.py samples DIR --out FIGURES --data gtsrb=gtsrb.npz ...     number of clean samples
    curves.py rates   DIR --out FIGURES                                poisoning rate
    curves.py labels  DIR                                              wrong labels
    curves.py shift   DIR --out FIGURES --data gtsrb=gtsrb.npz ...     images unlike those of the training

DIR is a folder of train.py and patterns.py. Outcomes are kept in DIR/curves.jsonl, patterns of fewer or shifted images in
DIR/patterns.jsonl, and the heads of shifted images in DIR/shifted, so that a run that was stopped goes on, and what was made of networks
whose heads are gone is told again. Only networks that are clean, or whose backdoor works, are counted; variants.py says how.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import typer
from corrupt import LEVELS, capture_shifted, corrupted, shifted_file
from data import Data
from figures import Format, Kind, Out, legend, panels, save
from measured import Measured, clean_images
from networks import GROUPS, Line, Seeds, count_by_group, datasets, is_clean, nameable, read_networks, works
from numpy.typing import NDArray
from plan import TURNS
from report import SeedsOption, named, reported
from rules import Rule, all_rules
from scans import Alpha, Folders, Head, Task, Threads, head_file, rule_id, scan_networks
from tables import markdown, share
from torch import Tensor
from train import DataOption, read_all
from variants import (
    Outcomes,
    Share,
    by_folder,
    chosen,
    counted,
    draw,
    draw_groups,
    flagged_by_group,
    in_words,
    inconclusive,
    names_target,
    scan_variants,
)

from tacfast.patterns import IMAGES
from tacfast.progress import track

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZES = (10, 50, 100, 250, 500, 1000, 2500)
WRONG = (0.0, 0.1, 0.3, 1.0)
#: Attacks that the plan poses at more than one poisoning rate.
RATED = {attack for attack, count in Counter(attack for attack, _ in TURNS).items() if count > 1}
RATES = sorted({rate for attack, rate in TURNS if attack in RATED})

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Each = Annotated[int, typer.Option(help="At most so many networks of each data set and kind, in the order of the plan.")]
WithPatterns = Annotated[bool, typer.Option(help="Look at patterns of the input too: the whole rule, but slow.")]


def stores_of(lines: Sequence[Line], wanted: bool = True) -> dict[Path, Measured]:
    """Patterns by folder; none if they are not wanted."""
    return {folder: Measured(folder) for folder in dict.fromkeys(line["folder"] for line in lines)} if wanted else {}


def subset(samples: int, size: int, seed: Sequence[int]) -> NDArray[np.intp]:
    """Positions of some of the samples, at random and without repetition, increasing."""
    return np.sort(np.random.default_rng(seed).permutation(samples)[:size])


def take(head: Head, rows: NDArray[np.intp]) -> Head:
    return replace(head, latents=head.latents[rows], labels=head.labels[rows])


def take_images(line: Line, data: Data, rows: NDArray[np.intp]) -> Tensor:
    return clean_images(line, data)[rows]


def subset_tasks(line: Line, draws: int, data: Data, patterns: Measured | None) -> list[Task]:
    """Draws of every size that the network's samples can give; of all of them there is but one.

    Patterns are made anew where the samples are fewer than they take anyway.
    """
    samples, name = line["scan"]["samples"], zlib.crc32(line["key"].encode())
    wanted = [(size, number) for size in SIZES if size <= samples for number in range(draws if size < samples else 1)]
    tasks = []
    for size, number in wanted:
        variant, rows = f"samples={size} draw={number}", subset(samples, size, (name, size, number))
        found = None
        if patterns is not None:
            fewer = size < IMAGES
            images = partial(take_images, line, data, rows) if fewer else partial(clean_images, line, data)
            found = patterns.of(line, images, variant if fewer else "")
        tasks.append(Task(line["key"], head_file(line), variant, partial(take, rows=rows), found))
    return tasks


@app.command()
def samples(
    folders: Folders,
    data: DataOption,
    out: Out,
    seeds: SeedsOption = Seeds.held_out,
    alpha: Alpha = 0.05,
    threads: Threads = 1,
    draws: Annotated[int, typer.Option(help="Random subsets of a size.")] = 2,
    each: Each = 1000,
    patterns: WithPatterns = True,
    kind: Format = Kind.svg,
) -> None:
    """Detection and false positives against the number of clean samples."""
    torch.set_num_threads(threads)
    data_sets = read_all(data)
    lines = [line for line in chosen(folders, seeds, each, alpha, "samples") if line["dataset"] in data_sets]
    stores = stores_of(lines, patterns)
    tasks = by_folder(lines, lambda line: subset_tasks(line, draws, data_sets[line["dataset"]], stores.get(line["folder"])))
    outcomes = scan_variants(tasks, alpha, threads)
    sets, rows = datasets(lines), []
    figure, axes = panels(len(sets), sharey=True)
    for panel, dataset in zip(axes, sets, strict=False):
        mine = [line for line in lines if line["dataset"] == dataset]
        shares = []
        for size in SIZES:
            variants = [f"samples={size} draw={number}" for number in range(draws)]
            shares.append(flagged_by_group(mine, outcomes, variants))
            right = counted([line for line in mine if nameable(line)], outcomes, variants, names_target)
            unsure = counted(mine, outcomes, variants, inconclusive)
            rows.append([dataset, str(size), *map(in_words, (*shares[-1], right, unsure))])
        panel.set(title=dataset, xscale="log", xlabel="clean samples")
        draw_groups(panel, SIZES, shares)
    axes[0].set_ylabel("share flagged")
    print(f"{count_by_group(lines)}; {draws} draws of each size below all; {seeds.value} seeds; tacfast {rule_id()}\n")
    print(markdown(["data set", "clean samples", *(f"{g}: flagged" for g in GROUPS), "target named", "inconclusive"], rows) + "\n")
    save(figure, out, "samples", kind)


def rate_row(lines: Sequence[Line], rules: Sequence[Rule]) -> list[str]:
    """Working networks of one poisoning rate, under every rule."""
    group = [line for line in lines if works(line)]
    cells = []
    for rule in rules:
        found = [rule.find(line) for line in group]
        right = sum(named(line, finding) for line, finding in zip(group, found, strict=True))
        cells += [share(sum(f.flagged for f in found), len(group)), f"{right}/{len(group)}"]
    asr = f"{median(min(line['asr']) for line in lines):.1%}" if lines else "-"
    return [asr, f"{len(group)} of {len(lines)}", *cells]


@app.command()
def rates(
    folders: Folders, out: Out, seeds: SeedsOption = Seeds.held_out, alpha: Alpha = 0.05, threads: Threads = 1, kind: Format = Kind.svg
) -> None:
    """Detection against the poisoning rate, by three rules, for the attacks that were trained at several rates."""
    every = read_networks(folders)
    scans = scan_networks(every, alpha, threads)
    lines, what = reported(every, scans, seeds)
    rules, sets, rows = all_rules(every, scans, alpha), datasets(lines), []
    figure, axes = panels(len(sets), sharey=True)
    for panel, dataset in zip(axes, sets, strict=False):
        mine = [line for line in lines if line["dataset"] == dataset and line["attack"] in RATED]
        found = sorted({line["rate"] for line in mine})
        rows += [[dataset, f"{rate:.1%}", *rate_row([line for line in mine if line["rate"] == rate], rules)] for rate in found]
        clean = [line for line in lines if line["dataset"] == dataset and is_clean(line)]
        panel.set(title=f"{dataset}: {len(clean)} clean, {sum(map(works, mine))} poisoned", xscale="log", xlabel="poisoning rate")
        panel.set_xticks(RATES, [f"{rate:.1%}" for rate in RATES])
        panel.minorticks_off()
        draw_rates(panel, [line for line in mine if works(line)], clean, rules)
    axes[0].set_ylabel("share flagged (dashed: of the clean)")
    heads = [head for rule in rules for head in (f"{rule.name}: flagged", "target named")]
    print(f"{what}; attacks {', '.join(sorted(RATED))}; median ASR of all, shares of those that work\n")
    print(markdown(["data set", "poisoning rate", "ASR", "attack works", *heads], rows) + "\n")
    save(figure, out, "rates", kind)


def draw_rates(axes: Axes, poisoned: Sequence[Line], clean: Sequence[Line], rules: Sequence[Rule]) -> None:
    """A curve for each rule; its false positives are dashed."""
    found = sorted({line["rate"] for line in poisoned})
    for number, rule in enumerate(rules):
        groups = [[rule.find(line).flagged for line in poisoned if line["rate"] == rate] for rate in found]
        draw(axes, found, [(sum(group), len(group)) for group in groups], rule.name, number)
        if clean:
            axes.axhline(sum(rule.find(line).flagged for line in clean) / len(clean), color=f"C{number}", linestyle="--", linewidth=0.8)
    axes.set_ylim(-0.03, 1.03)
    if found:
        legend(axes)


def shuffle(head: Head, wrong: float, seed: int) -> Head:
    """The same latents; the labels of a share of the samples change places among themselves."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(head.labels))[: round(wrong * len(head.labels))]
    labels = head.labels.copy()
    labels[rows] = labels[rng.permutation(rows)]
    return replace(head, labels=labels)


def label_tasks(line: Line, patterns: Measured) -> list[Task]:
    change = [partial(shuffle, wrong=wrong, seed=zlib.crc32(line["key"].encode())) for wrong in WRONG]
    found = patterns.kept(line["key"])
    return [Task(line["key"], head_file(line), f"labels={wrong:g}", do, found) for wrong, do in zip(WRONG, change, strict=True)]


@app.command()
def labels(folders: Folders, seeds: SeedsOption = Seeds.held_out, alpha: Alpha = 0.05, threads: Threads = 1, each: Each = 1000) -> None:
    """What changes when labels of the defender are wrong."""
    lines = chosen(folders, seeds, each, alpha, "labels")
    stores = stores_of(lines)
    outcomes = scan_variants(by_folder(lines, lambda line: label_tasks(line, stores[line["folder"]])), alpha, threads)
    rows = []
    for wrong in WRONG:
        now, then = ([outcomes[line["key"], f"labels={share:g}"] for line in lines] for share in (wrong, 0.0))
        moved = [sum(getattr(a, what) != getattr(b, what) for a, b in zip(now, then, strict=True)) for what in COMPARED]
        accuracy = [o.accuracy for o in now if o.accuracy is not None]
        rows.append([f"{wrong:.0%}", f"{median(accuracy):.1%}" if accuracy else "-", *(f"{count}/{len(now)}" for count in moved)])
    print(f"{count_by_group(lines)}; {seeds.value} seeds; tacfast {rule_id()}\n")
    print(markdown(["labels shuffled", "median accuracy reported", *(f"another {what}" for what in COMPARED)], rows))


#: Fields of an outcome that decide.
COMPARED = ("verdict", "p", "suspects", "pairs")


@app.command()
def shift(
    folders: Folders,
    data: DataOption,
    out: Out,
    seeds: SeedsOption = Seeds.held_out,
    alpha: Alpha = 0.05,
    threads: Threads = 1,
    each: Each = 3,
    patterns: WithPatterns = True,
    kind: Format = Kind.svg,
) -> None:
    """Detection and false positives where the defender's images are unlike those of the training."""
    torch.set_num_threads(threads)
    sets = read_all(data)
    lines = [line for line in chosen(folders, seeds, each, alpha, next(iter(LEVELS))) if line["dataset"] in sets]
    places = [(line, how, level) for line in lines for how, levels in LEVELS.items() for level in levels]
    for line, how, level in track(places, "capturing", shown=True):
        file = shifted_file(line["folder"] / "shifted", line, how, level)
        if not file.exists() and head_file(line).exists():
            file.parent.mkdir(exist_ok=True)
            capture_shifted(line, sets[line["dataset"]], how, level, file)
    stores = stores_of(lines, patterns)
    tasks = by_folder(lines, lambda line: shift_tasks(line, sets[line["dataset"]], stores.get(line["folder"])))
    outcomes = scan_variants(tasks, alpha, threads)
    print(f"{count_by_group(lines)}; {seeds.value} seeds; tacfast {rule_id()}\n")
    for dataset in datasets(lines):
        mine = [line for line in lines if line["dataset"] == dataset]
        shares = shift_shares(mine, outcomes)
        print(f"## {dataset}\n\n{shift_table(mine, outcomes)}\n")
        figure, axes = panels(len(LEVELS), width=3.4, sharey=True)
        for panel, (how, rows) in zip(axes, shares.items(), strict=True):
            panel.set(title=f"{dataset}: {how}", xticks=range(len(rows)), xlabel="severity")
            draw_groups(panel, range(len(rows)), rows)
        axes[0].set_ylabel("share flagged")
        save(figure, out, f"shift-{dataset}", kind)


def shift_tasks(line: Line, data: Data, patterns: Measured | None) -> list[Task]:
    """The stored head, and those of the shifted images."""
    usual = None if patterns is None else patterns.of(line, partial(clean_images, line, data))
    tasks = [Task(line["key"], head_file(line), patterns=usual)]
    for how, level in [(how, level) for how, levels in LEVELS.items() for level in levels]:
        file, variant = shifted_file(line["folder"] / "shifted", line, how, level), f"{how}={level:g}"
        found = None if patterns is None else patterns.of(line, partial(shift_images, line, data, how, level), variant)
        tasks.append(Task(line["key"], file, variant, patterns=found))
    return tasks


def shift_images(line: Line, data: Data, how: str, level: float) -> Tensor:
    return corrupted(clean_images(line, data), how, level, line["seed"])


def variants_of(how: str) -> list[str]:
    """None, and three severities."""
    return ["", *(f"{how}={level:g}" for level in LEVELS[how])]


def shift_shares(lines: Sequence[Line], outcomes: Outcomes) -> dict[str, list[list[Share]]]:
    return {how: [flagged_by_group(lines, outcomes, [variant]) for variant in variants_of(how)] for how in LEVELS}


def shift_table(lines: Sequence[Line], outcomes: Outcomes) -> str:
    """A row for no shift, one for each shift, and one for all of them together."""
    every = [variant for how in LEVELS for variant in variants_of(how)[1:]]
    rows = []
    for name, variants in (("none", [""]), *((variant, [variant]) for variant in every), (f"all {len(every)}", every)):
        accuracy = median(outcomes[line["key"], variant].accuracy or 0.0 for line in lines for variant in variants)
        right = counted([line for line in lines if nameable(line)], outcomes, variants, names_target)
        rows.append([name, f"{accuracy:.1%}", *map(in_words, (*flagged_by_group(lines, outcomes, variants), right))])
    return markdown(["shift", "median accuracy", *(f"{group}: flagged" for group in GROUPS), "target named"], rows)


if __name__ == "__main__":
    app()
