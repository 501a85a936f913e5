"""Does a backdoor go away? Our repairs and other people's on the same networks with the same clean images.

    export PYTHONPATH=benches/calibration
    removal.py run   --folder CALIBRATION --data gtsrb=gtsrb.npz --out DIR [--method ft-sam --method tacfast:finetune ...] [--share 0.01]
    removal.py last  --folder CALIBRATION --data gtsrb=gtsrb.npz --out DIR
    removal.py map   --folder CALIBRATION --data gtsrb=gtsrb.npz --out DIR --network KEY [--method finetune]
    removal.py table --out DIR [--by network]

CALIBRATION is a folder of benches/calibration/train.py (results.jsonl, models), --data as there; only backdoors that work are taken, and
networks that are named.
`--zoo DIR` takes published models (zoo_models.py) instead, or as well; their data sets are given in the same way.

A method is a name of `defences.DEFENCES`, a control (`none`, `clean-twin`) or `tacfast:METHOD`; `NAME@KEY=VALUE,...` gives it other
settings, as in `sau@epochs=100`, `ft@slower=10` or `tacfast:finetune@beta=2,lr=0.01`. DIR/results.jsonl gets a line per network, method,
share and seed, DIR/models the repaired weights, DIR/last.jsonl what becomes of these under attacks. What has a line is not done again:
take a new folder when a method has changed. It may be stopped at any time.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from attempts import CONTROLS, Attempt, Method, attempt
from data import Data
from defences import DEFENCES
from lasting import lasting
from networks import Line, Seeds
from removal_tables import last_tables, map_table, removal_tables
from results import append_line, read_lines
from scores import rounded, strongest
from subjects import Filter, Subject, chosen, open_subject
from train import claimed, read_all

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

OURS = ("tacfast:unlearn", "tacfast:finetune")
BETAS = (0.1, 0.3, 1.0, 3.0, 10.0)
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)


class Targets(str, Enum):
    """Where the target classes come from."""

    truth = "truth"
    scan = "scan"


class By(str, Enum):
    """What a row of a table is."""

    attack = "attack"
    network = "network"


Folders = Annotated[
    list[Path] | None,
    typer.Option("--folder", help="Of networks that you trained: learnt triggers in it are unpickled. Repeat for several."),
]
Zoo = Annotated[Path | None, typer.Option(help="Folder of published models, whose code is run.")]
DataOption = Annotated[list[str], typer.Option("--data", help="NAME=FILE.npz; repeat for several data sets.")]
Out = Annotated[Path, typer.Option(help="Folder of the results.")]
Methods = Annotated[list[str] | None, typer.Option("--method", help="Repeat for several; by default all.")]
Shares = Annotated[list[float] | None, typer.Option("--share", help="Clean images, as a share of the training set; by default 0.05.")]
Archs = Annotated[list[str] | None, typer.Option("--arch", help="Only these kinds of networks.")]
Attacks = Annotated[list[str] | None, typer.Option("--attack", help="Only these attacks.")]
Keys = Annotated[list[str] | None, typer.Option("--network", help="Only these networks, by key.")]
SeedsOption = Annotated[Seeds, typer.Option(help="Networks of odd or even seeds.")]
Repeats = Annotated[list[int] | None, typer.Option("--seed", help="Of the repair; by default 0.")]
Epochs = Annotated[int, typer.Option(help="Of every defence but ours, which has its own.")]
TargetsOption = Annotated[Targets, typer.Option(help="Target classes: the true ones, or those that a scan names.")]
Bfloat16 = Annotated[bool, typer.Option(help="Train the other defences in bfloat16, where the network was trained so.")]
Workers = Annotated[int, typer.Option(help="Processes, of one thread each.")]

Do = Callable[[Subject, Attempt], dict[str, Any]]


def work(lines: Sequence[Line], jobs: Callable[[Line], Iterable[Attempt]], sets: dict[str, Data], out: Path, name: str, do: Do) -> None:
    """Do every attempt that has no line in DIR/NAME.jsonl and is in no other worker's hands."""
    torch.set_num_threads(1)
    results = out / f"{name}.jsonl"
    for line in lines:
        subject = None
        for job in jobs(line):
            with claimed(out / "claims" / f"{name}-{job.key}") as mine:
                if not mine or any(done["attempt"] == job.key for done in read_lines(results)):
                    continue
                subject = subject or open_subject(line, sets[line["dataset"]])
                made = do(subject, job)
                append_line(results, made)
                print(_said(made), flush=True)


def crew(workers: int, *arguments: Any) -> None:
    """`work` in several processes, which end with this one."""
    if workers == 1:
        work(*arguments)
        return
    # Forked, so that the data lies in memory once.
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=arguments, daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    # An orderly exit ends the workers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise typer.Exit(1)


def _said(line: dict[str, Any]) -> str:
    said = line["attempt"]
    if "refused" in line:
        return f"{said}: {line['refused']}"
    for when in ("before", "after", "retuned", "reoptimised"):
        if line.get(when):
            said += f"; {when} accuracy {line[when]['accuracy']:.4f}, ASR {strongest(line[when]):.4f}"
    return said + (f"; DER {line['der']:.4f}, {line['cpu_s']:.1f} s" if "der" in line else "")


def folders_of(out: Path) -> None:
    for name in ("models", "claims"):
        (out / name).mkdir(parents=True, exist_ok=True)


@app.command()
def run(
    data: DataOption,
    out: Out,
    folder: Folders = None,
    zoo: Zoo = None,
    method: Methods = None,
    share: Shares = None,
    arch: Archs = None,
    attack: Attacks = None,
    network: Keys = None,
    seeds: SeedsOption = Seeds.all,
    seed: Repeats = None,
    epochs: Epochs = 10,
    targets: TargetsOption = Targets.truth,
    bfloat16: Bfloat16 = False,
    workers: Workers = 1,
) -> None:
    """Repair every network by every method, and measure it on images that no method saw."""
    methods = [Method(text) for text in method or (*CONTROLS, *DEFENCES, *OURS)]
    for each in methods:
        each.check()
    folders_of(out)
    sets = read_all(data)
    lines = chosen(folder or [], zoo, Filter(list(sets), arch or [], attack or [], seeds, network or []))

    def jobs(line: Line) -> Iterable[Attempt]:
        for s, number, m in product(share or [0.05], seed or [0], methods):
            yield Attempt(line["key"], m, s, number, epochs, targets.value, bfloat16)

    crew(workers, lines, jobs, sets, out, "results", lambda subject, job: attempt(subject, job, out / "models"))


@app.command()
def last(
    data: DataOption,
    out: Out,
    folder: Folders = None,
    zoo: Zoo = None,
    method: Methods = None,
    share: Shares = None,
    arch: Archs = None,
    attack: Attacks = None,
    network: Keys = None,
    seeds: SeedsOption = Seeds.all,
    scan: Annotated[bool, typer.Option(help="Scan the repaired networks again, minutes each.")] = True,
    workers: Workers = 1,
) -> None:
    """Attack the repaired networks of `run` again."""
    folders_of(out)
    sets = read_all(data)
    lines = chosen(folder or [], zoo, Filter(list(sets), arch or [], attack or [], seeds, network or []))
    done = [line for line in read_lines(out / "results.jsonl") if "refused" not in line]

    def jobs(line: Line) -> Iterable[Attempt]:
        for made in done:
            wanted = (not method or made["method"] in method) and (not share or made["share"] in share)
            if made["key"] == line["key"] and wanted:
                yield Attempt(made["key"], Method(made["method"]), *(made[n] for n in ("share", "seed", "epochs", "targets", "bfloat16")))

    def again(subject: Subject, job: Attempt) -> dict[str, Any]:
        model = subject.load(out / "models" / f"{job.key}.safetensors")
        line = {**job.to_dict(), **{name: subject.line[name] for name in ("dataset", "arch", "attack", "rate")}}
        return rounded(line | lasting(subject, model, subject.clean(job.share), job.seed, scan))

    crew(workers, lines, jobs, sets, out, "last", again)


@app.command("map")
def sensitivity(
    data: DataOption,
    out: Out,
    folder: Folders = None,
    zoo: Zoo = None,
    network: Keys = None,
    method: Annotated[str, typer.Option(help="A method of `tacfast.repair` with beta and lr.")] = "finetune",
    share: Annotated[float, typer.Option(help="Clean images, as a share of the training set.")] = 0.05,
    workers: Workers = 1,
) -> None:
    """Repair with 5 x 5 values of beta and lr, and print the table."""
    folders_of(out)
    sets = read_all(data)
    lines = chosen(folder or [], zoo, Filter(list(sets), keys=network or []))
    methods = [Method(f"tacfast:{method}@beta={beta:g},lr={lr:g}") for beta, lr in product(BETAS, RATES)]

    def jobs(line: Line) -> Iterable[Attempt]:
        for m in methods:
            yield Attempt(line["key"], m, share, 0, 10, "truth", False)

    crew(workers, lines, jobs, sets, out, "map", lambda subject, job: attempt(subject, job, None))
    keys = {line["key"] for line in lines}
    made = [line for line in read_lines(out / "map.jsonl") if line["key"] in keys and line["share"] == share]
    print(map_table(made, f"tacfast:{method}", BETAS, RATES))


@app.command()
def table(
    out: Annotated[list[Path], typer.Option(help="Folder of the results; repeat for several.")],
    by: Annotated[By, typer.Option(help="What a row is.")] = By.attack,
    method: Methods = None,
    share: Shares = None,
) -> None:
    """Print the results as markdown."""

    def wanted(name: str) -> list[dict[str, Any]]:
        every = [line for folder in out for line in read_lines(folder / f"{name}.jsonl")]
        return [line for line in every if (not method or line["method"] in method) and (not share or line["share"] in share)]

    print(removal_tables(wanted("results"), by.value))
    again = wanted("last")
    if again:
        print(last_tables(again))


if __name__ == "__main__":
    app()
