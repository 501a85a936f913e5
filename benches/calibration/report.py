"""Tables over the networks of train.py: how often clean ones are flagged, and which backdoors are found.

    report.py DIR [DIR...] [--seeds held-out] [--alpha 0.05]

Rules are chosen on even seeds and reported on odd ones; rules.py says which stand side by side. A backdoor counts where it works: each
trigger's ASR at least 0.9 times the clean accuracy. Heads are scanned where they have not been (scans.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import typer
from measured import without_patterns
from networks import STRONG, Line, Seeds, is_clean, nameable, pairs, read_networks, targets, works
from rules import Finding, Rule, all_rules
from scans import Alpha, Folders, Outcome, Threads, rule_id, scan_networks
from scipy.stats import ks_1samp, uniform
from tables import grouped, markdown, ratio, share

SeedsOption = Annotated[Seeds, typer.Option(help="Networks that are reported.")]

#: Of p, at which clean networks are counted.
LEVELS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Tables:
    """Markdown tables over some lines; the first of the rules is tacfast's."""

    lines: Sequence[Line]
    rules: Sequence[Rule]
    #: tacfast's p-values, by key, where there is one.
    p: Mapping[str, float]

    def calibration(self, by: Callable[[Line], str]) -> str:
        """How many clean networks have a p-value of at most a level, beside it; and how far the two lie apart at most."""
        rows = []
        for name, group in grouped([line for line in self.lines if is_clean(line) and line["key"] in self.p], by):
            p = np.array([self.p[line["key"]] for line in group])
            apart = ks_1samp(p, uniform.cdf) if len(p) else None
            below = [f"{np.mean(p <= level):.0%}" if len(p) else "-" for level in LEVELS]
            rows.append([name, str(len(p)), *below, "-" if apart is None else f"{apart.statistic:.2f} (p = {apart.pvalue:.2g})"])
        return markdown(["clean networks", "number", *(f"p <= {level:g}" for level in LEVELS), "Kolmogorov-Smirnov"], rows)

    def false_positives(self, by: Callable[[Line], str]) -> str:
        rows = []
        for name, group in grouped([line for line in self.lines if is_clean(line)], by):
            flagged = [share(sum(rule.find(line).flagged for line in group), len(group)) for rule in self.rules]
            rows.append([name, accuracies(group), *flagged])
        return markdown(["clean networks", "clean accuracy", *(f"{rule.name}: flagged" for rule in self.rules)], rows)

    def detection(self, by: Callable[[Line], str]) -> str:
        """Found and target named, of the working networks, for each rule; under all-to-all no class can be named wrongly."""
        rows = []
        for name, every in grouped([line for line in self.lines if not is_clean(line)], by):
            group = [line for line in every if works(line)]
            asked = [line for line in group if nameable(line)]
            cells = []
            for rule in self.rules:
                right = sum(named(line, rule.find(line)) for line in asked)
                cells += [share(sum(rule.find(line).flagged for line in group), len(group)), f"{right}/{len(asked)}" if asked else "-"]
            rows.append([name, f"{len(group)} of {len(every)}", *cells])
        heads = [head for rule in self.rules for head in (f"{rule.name}: flagged", "target named")]
        return markdown(["poisoned networks", "attack works", *heads], rows)

    def pairs(self) -> str:
        """Pairs that tacfast's rule names; several in one network are not independent, so their shares have no interval."""
        rows = []
        for name, group in grouped([line for line in self.lines if is_clean(line) or works(line)], by_pairs)[:-1]:
            found = [(pairs(line), self.rules[0].find(line).pairs) for line in group]
            right, called, true = size(t & f for t, f in found), size(f for _, f in found), size(t for t, _ in found)
            some = share(sum(bool(f) for _, f in found), len(group))
            rows.append([name, str(len(group)), some, ratio(right, called), ratio(right, true)])
        return markdown(["networks", "number", "any pair named", "precision", "recall"], rows)

    def several_targets(self) -> str:
        """Working networks with more than one target class, by tacfast's rule."""
        rows = []
        for name, group in grouped([line for line in self.lines if len(line["truth"]["targets"]) > 1 and works(line)], by_dataset):
            found = [(targets(line), self.rules[0].find(line).classes) for line in group]
            some, every = sum(bool(t & f) for t, f in found), sum(t <= f for t, f in found)
            right, true, wrong = size(t & f for t, f in found), size(t for t, _ in found), size(f - t for t, f in found)
            rows.append([name, share(some, len(group)), share(every, len(group)), ratio(right, true), str(wrong)])
        return markdown(["networks", "a target named", "all targets named", "targets named", "other classes named"], rows)


def named(line: Line, finding: Finding) -> bool:
    """Whether a true target, or a true pair, is among what is named."""
    return bool(targets(line) & finding.classes or pairs(line) & finding.pairs)


def size(sets: Iterable[Collection[object]]) -> int:
    return sum(len(found) for found in sets)


def accuracies(group: Sequence[Line]) -> str:
    if not group:
        return "-"
    found = [line["clean_accuracy"] for line in group]
    return f"{min(found):.1%} to {max(found):.1%}"


def by_attack(line: Line) -> str:
    return f"{line['attack']}, {line['rate']:.1%}"


def by_dataset(line: Line) -> str:
    return f"{line['dataset']}, accuracy {'>=' if line['clean_accuracy'] >= STRONG else '<'} {STRONG:.0%}"


def by_dataset_alone(line: Line) -> str:
    return str(line["dataset"])


def by_arch(line: Line) -> str:
    return f"{line['dataset']}, {line['arch']}"


def by_pairs(line: Line) -> str:
    """Attacks with pairs, and what has none to be found."""
    if pairs(line):
        return f"{line['dataset']}, {line['attack']}"
    return f"{line['dataset']}, {'clean' if is_clean(line) else 'all-to-one'}"


def sections(tables: Tables) -> Iterator[tuple[str, str]]:
    """Titles and tables."""
    for title, by in (("data set", by_dataset), ("architecture", by_arch)):
        yield f"False positives by {title}", tables.false_positives(by)
    yield "p-values of clean networks", tables.calibration(by_dataset_alone)
    for title, by in (("attack and poisoning rate", by_attack), ("data set", by_dataset), ("architecture", by_arch)):
        yield f"Detection by {title}", tables.detection(by)
    yield "Pairs of source and target", tables.pairs()
    yield "Several targets", tables.several_targets()


def reported(every: Sequence[Line], outcomes: Mapping[str, Outcome], seeds: Seeds) -> tuple[list[Line], str]:
    """The scanned lines of these seeds, and a sentence that says so."""
    wanted = [line for line in every if seeds.holds(line["seed"], line["key"])]
    lines = [line for line in wanted if line["key"] in outcomes]
    apart = f"; {len(wanted) - len(lines)} more have no scan" if len(lines) < len(wanted) else ""
    recipe = lines[0]["recipe"] if lines else "-"
    blind = without_patterns(lines)
    alone = f", {len(blind)} of them scanned by latents alone" if blind else ""
    return lines, f"{len(lines)} networks of recipe {recipe}, {seeds.value} seeds{alone}{apart}; tacfast {rule_id()}"


def main(folders: Folders, seeds: SeedsOption = Seeds.held_out, alpha: Alpha = 0.05, threads: Threads = 1) -> None:
    """Print detection and false positives as markdown tables."""
    every = read_networks(folders)
    outcomes = scan_networks(every, alpha, threads)
    lines, what = reported(every, outcomes, seeds)
    print(f"{what}; in brackets 95 % Clopper-Pearson intervals.\n")
    p = {key: outcome.p for key, outcome in outcomes.items() if outcome.p is not None}
    for title, table in sections(Tables(lines, all_rules(every, outcomes, alpha), p)):
        print(f"## {title}\n\n{table}\n")


if __name__ == "__main__":
    typer.run(main)
