"""Trains many small networks, clean and poisoned by one recipe, and records what a scan would see of each.

    train.py run --data cifar10=cifar10.npz --data gtsrb=gtsrb.npz --out DIR [--workers 2]
    train.py plan --data ...
    train.py verify --data ... --out DIR [--last 5]     (do the lines agree with tacfast.scan on the saved networks?)
    train.py run --data digits=digits --out DIR --rounds 1        (a smoke test)

DIR/results.jsonl gets one line per network, DIR/heads/KEY.npz its head with latents, DIR/models/KEY.safetensors its weights. Networks that
have a line are skipped, so an interrupted run goes on where it was; a network in training when the run is stopped is begun again.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from data import Data, read
from learned import learned_backdoors
from measure import behaviour, head_arrays, statistics, truth
from networks import Seeds
from plan import LEARNED, Job, backdoors, plan
from recipe import ARCHITECTURES, RECIPE, load_net, precision, train
from results import append_line, read_lines

from tacfast.attacks import Backdoor, Poisoning, choose
from tacfast.checkpoints import save_safetensors
from tacfast.files import atomic
from tacfast.heads import capture
from tacfast.scan import scan

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DataOption = Annotated[list[str], typer.Option("--data", help="NAME=FILE.npz; repeat for several data sets.")]
Rounds = Annotated[int, typer.Option(help="Rounds of the plan.")]
SeedsOption = Annotated[Seeds, typer.Option(help="Networks that are trained.")]


class Stopped(Exception):
    """A signal asked to stop."""


class Stop:
    """Remembers SIGINT and SIGTERM; work stops between two batches, never within a write."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True

    def tick(self) -> None:
        if self.asked:
            raise Stopped


def poisoned(job: Job, data: Data, doors: list[Backdoor]) -> Poisoning:
    """The job's poisoned samples; a source-specific attack stamps at most half of its source class."""
    eligible = torch.stack([door.rule.victims(data.y_train) for door in doors]).any(0)
    rate = min(job.rate, 0.5 * float(eligible.double().mean()))
    return choose(data.y_train, doors, rate=rate, cover_rate=job.rate if job.attack == "source-specific" else None, seed=job.seed)


def run_job(job: Job, data: Data, folder: Path, tick: Any) -> dict[str, Any]:
    """Train one network, write its files, and return its line."""
    wall = time.perf_counter()
    learned = job.attack in LEARNED
    doors = learned_backdoors(job, data, folder, tick) if learned else backdoors(job, data.classes, data.side)
    labels, more, counts = data.y_train, {}, {}
    if doors:
        poisoning = poisoned(job, data, doors)
        labels, more = poisoning.labels, {"stamp": poisoning.stamp}
        counts = {"poisoned": len(poisoning.index) - int(poisoning.cover.sum()), "covers": int(poisoning.cover.sum())}
    model, seconds = train(data.x_train, labels, data.classes, arch=job.arch, schedule=data.schedule, seed=job.seed, tick=tick, **more)
    held, rest = data.split(job.seed)
    captured = capture(model, list(zip(held[0].split(500), held[1].split(500), strict=True)), device="cpu")
    with atomic(folder / "heads" / f"{job.key}.npz") as file:
        np.savez_compressed(file, **head_arrays(model, captured, doors, held))
    save_safetensors(model, folder / "models" / f"{job.key}.safetensors", {"job": json.dumps(job.to_dict())})
    return {
        **job.to_dict(),
        "recipe": RECIPE,
        "classes": data.classes,
        "truth": truth(doors, data.classes) | counts,
        **behaviour(model, doors, rest),
        "precision": precision(job.arch),
        "train_cpu_s": round(seconds, 1),
        "wall_s": round(time.perf_counter() - wall, 1),
        "scan": statistics(captured),
    }


def finished(results: Path) -> set[str]:
    """Keys of the networks of this recipe that have a line."""
    return {line["key"] for line in read_lines(results) if line["recipe"] == RECIPE}


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process alone holds the claim; it ends with the process, however that ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def work(jobs: list[Job], data: dict[str, Data], folder: Path) -> None:
    """Do, in order, every job that is neither finished nor in another worker's hands."""
    torch.set_num_threads(1)
    stop, results = Stop(), folder / "results.jsonl"
    for job in jobs:
        with claimed(folder / "claims" / job.key) as mine:
            if stop.asked or not mine or job.key in finished(results):
                continue
            try:
                line = run_job(job, data[job.dataset], folder, stop.tick)
            except Stopped:
                return
            append_line(results, line)
            asr = " ".join(f"{a:.3f}" for a in line["asr"]) or "-"
            print(
                f"{job.key}: accuracy {line['clean_accuracy']:.4f}, ASR {asr}, {line['train_cpu_s']:.0f} s, wall {line['wall_s']:.0f} s",
                flush=True,
            )


def read_all(given: list[str]) -> dict[str, Data]:
    named = [text.partition("=") for text in given]
    return {name: read(name, path) for name, _, path in named}


def chosen(data: dict[str, Data], rounds: int, seeds: Seeds) -> list[Job]:
    return [job for job in plan({name: d.classes for name, d in data.items()}, rounds) if seeds.holds(job.seed, job.key)]


@app.command("plan")
def show(data: DataOption, rounds: Rounds = 40, seeds: SeedsOption = Seeds.all) -> None:
    """Print the jobs in order."""
    for job in chosen(read_all(data), rounds, seeds):
        print(job.key)


@app.command()
def run(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    rounds: Rounds = 40,
    seeds: SeedsOption = Seeds.all,
    network: Annotated[list[str] | None, typer.Option(help="Only these, by key, whether the plan has them or not.")] = None,
    workers: Annotated[int, typer.Option(help="Processes, of one thread each.")] = 2,
) -> None:
    """Train what the plan asks for and is not yet in the results."""
    torch.set_num_threads(1)
    for name in ("heads", "models", "claims"):
        (out / name).mkdir(parents=True, exist_ok=True)
    sets = read_all(data)
    jobs = [Job.parse(key, tuple(ARCHITECTURES)) for key in network] if network else chosen(sets, rounds, seeds)
    # Forked, so that the data lies in memory once and every process shows the same command line.
    context = multiprocessing.get_context("fork")
    crew = [context.Process(target=work, args=(jobs, sets, out)) for _ in range(workers)]
    for worker in crew:
        worker.start()
    stop = Stop()
    while any(worker.is_alive() for worker in crew):
        if stop.asked:
            for worker in crew:
                worker.terminate()
        time.sleep(0.5)
    left = [job.key for job in jobs if job.key not in finished(out / "results.jsonl")]
    if left:
        print(f"not finished (in another process's hands, stopped or failed): {', '.join(left)}", flush=True)
    raise typer.Exit(130 if stop.asked else max(abs(worker.exitcode or 0) for worker in crew))


@app.command()
def verify(data: DataOption, out: Annotated[Path, typer.Option()], last: int = 5) -> None:
    """Scan the latest saved networks again and compare the norms with their lines."""
    sets = read_all(data)
    for line in read_lines(out / "results.jsonl")[-last:]:
        d = sets[line["dataset"]]
        model = load_net(out / "models" / f"{line['key']}.safetensors", line["arch"], d.classes, d.x_train.shape[1])
        held, _ = d.split(line["seed"])
        report = scan(model, list(zip(held[0].split(500), held[1].split(500), strict=True)), device="cpu")
        recorded = np.array(line["scan"][f"norms_{report.quantile:g}"], dtype=np.float64)
        apart = np.nanmax(np.abs(recorded / report.norms - 1))
        print(f"{line['key']}: norms agree to {apart:.1e}; {report!r}")


if __name__ == "__main__":
    app()
