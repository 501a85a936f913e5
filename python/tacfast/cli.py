"""The command line. Prints by way of terminal.py alone; may import everything, and imports torch only for the commands that run a model.

Exit codes: 0 clean or done, 1 flagged, 2 error, 3 inconclusive, 130 interrupted.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from tacfast import __version__, schemas, terminal
from tacfast.errors import CheckpointError, ProblemError, TacfastError
from tacfast.examples import epilog
from tacfast.options import (
    FIND,
    INSTALLED,
    METHOD,
    OUTPUT,
    RUN,
    SOLVER,
    Alpha,
    Arch,
    ArchArgs,
    Data,
    Device,
    Engine,
    EngineName,
    Html,
    Json,
    Limit,
    Mean,
    MethodName,
    NoColor,
    Patterns,
    Quiet,
    Sarif,
    Size,
    Std,
    Threads,
)
from tacfast.outputs import check_outputs, relative, write_json, write_page, write_solutions
from tacfast.progress import counter, timed
from tacfast.report import ScanReport
from tacfast.scan import pattern_look, scan_captured, scan_head
from tacfast.shown import check_pages
from tacfast.solver import solve as solve_arrays

if TYPE_CHECKING:
    from tacfast.heads import Captured
    from tacfast.sources import Doubt, Source

#: Images on which labels and preprocessing are checked before a repair.
_CHECKED = 500
EXIT_CODES = {"clean": 0, "backdoored": 1, "inconclusive": 3}
#: What typer makes of Ctrl-C.
_INTERRUPTED = 130

app = typer.Typer(
    help="Find and remove backdoors in image classifiers, from clean data alone.",
    epilog=epilog(""),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point: whatever goes wrong becomes one line and exit code 2, unless `--debug` asks for the traceback."""
    debug = "--debug" in sys.argv
    # Accepted anywhere on the line, where people put it when something has gone wrong.
    sys.argv[1:] = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        app()
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            terminal.err.print("interrupted")
        raise
    except Exception as error:
        if debug:
            raise
        terminal.fail(str(error) if isinstance(error, TacfastError) else f"{type(error).__name__}: {error} (a bug? --debug shows where)")
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        terminal.out.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command; both are acted upon before a command runs."""


@app.command(epilog=epilog("demo"), rich_help_panel=FIND)
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the poisoning and the training.", rich_help_panel=RUN)] = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Backdoor a small digit classifier, find the backdoor, remove it. Needs no download."""
    from tacfast.demo import run

    terminal.set_up(quiet=quiet, plain=no_color)
    terminal.show_demo(run(seed=seed, device=device, progress=terminal.bars(), say=terminal.note))


@app.command(epilog=epilog("solve"), rich_help_panel=SOLVER)
def solve(
    problem: Annotated[Path, typer.Argument(help=".npz with W (C,d), Z (n,d) and perhaps b (C,).")],
    output: Annotated[Path | None, typer.Option("--out", help="Write every field here: .json or .npz.", rich_help_panel=OUTPUT)] = None,
    quantile: Annotated[
        float, typer.Option(help="In (0, 1]; below 1 an order statistic stands for the maximum over samples.", rich_help_panel=RUN)
    ] = 1.0,
    engine: Engine = EngineName.AUTO,
    tol: Annotated[float, typer.Option(help="Largest relative residual and gap of a solved class.", rich_help_panel=RUN)] = 1e-9,
    threads: Threads = None,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Find the smallest latent shift into every class, with certificates. Does not import torch."""
    terminal.set_up(quiet=quiet, plain=no_color)
    if output is not None and output.suffix.lower() not in (".json", ".npz"):
        raise ProblemError(f"--out must end in .json or .npz, got {output.name!r}")
    check_outputs(output)
    w, b, z, _, _ = _read_head(problem)
    with counter("solving", shown=terminal.bars()) as tell:
        solutions = solve_arrays(w, b, z, quantile=quantile, engine=engine.value, tol=tol, threads=threads, progress=tell)
    terminal.show_solutions(solutions)
    if output is not None:
        write_solutions(solutions, output)
    if not solutions.certified.all():
        raise typer.Exit(3)


@app.command("scan", epilog=epilog("scan"), rich_help_panel=FIND)
def scan_command(
    model: Annotated[
        Path, typer.Argument(help="Checkpoint (.safetensors, .pth), model folder (config.json), or .npz with W, b, Z and perhaps y.")
    ],
    arch: Arch = None,
    arch_arg: ArchArgs = None,
    data: Data = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    limit: Limit = 2500,
    patterns: Patterns = None,
    alpha: Alpha = 0.05,
    device: Device = "auto",
    threads: Threads = None,
    json_file: Json = None,
    sarif_file: Sarif = None,
    html_file: Html = None,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Is some class the target of a backdoor? Exit code 0: no evidence, 1: flagged, 2: error, 3: inconclusive."""
    terminal.set_up(quiet=quiet, plain=no_color, stdout_taken=check_outputs(json_file, sarif_file, html_file))
    if html_file is not None:
        check_pages()
    if model.suffix.lower() == ".npz":
        if arch is not None or data is not None:
            raise ProblemError(f"--arch and --data are of no use with {model.name}, which holds latents already")
        w, b, z, y, digest = _read_head(model)
        file = {"model": model.name, "sha256": digest}
        report = scan_head(w, b, z, labels=y, alpha=alpha, threads=threads, progress=terminal.bars(), file=file)
        told: dict[str, Any] = {}
    else:
        source = _load(model, arch, arch_arg, data, mean, std, size, limit)
        timing: dict[str, float] = {}
        with timed(timing, "latents"):
            captured, doubt = _capture(source, device)
        look = pattern_look(source.model, captured, timing["latents"], wanted=patterns, device=device, progress=terminal.bars())
        report = scan_captured(captured, timing, patterns=look, alpha=alpha, threads=threads, progress=terminal.bars(), file=source.file)
        report = _with_doubt(report, doubt)
        if report.patterns is None and patterns is None:
            terminal.note(
                "patterns of the input were not looked at: too few images, or it would take more than ten minutes here; --patterns insists"
            )
        w, b, z = captured.weight, captured.bias, captured.latents
        told = {"images": source.batches.images.x, **_names(source, len(w))}
    terminal.show_scan(report)
    if html_file is not None:
        from tacfast.explain import explain_head

        report = explain_head(report, w, b, z, threads=threads, provenance={**_provenance(), "seed": 0}, **told)
        write_page(report, html_file)
    if json_file is not None:
        write_json(report.to_dict(), json_file)
    if sarif_file is not None:
        from tacfast.sarif import to_sarif

        write_json(to_sarif(report, uri=relative(model)), sarif_file)
    raise typer.Exit(EXIT_CODES[report.verdict])


@app.command("repair", epilog=epilog("repair"), rich_help_panel=FIND)
def repair_command(
    model: Annotated[Path, typer.Argument(help="Checkpoint (.safetensors, .pth) or model folder (config.json).")],
    output: Annotated[Path, typer.Option("--out", help="Write the repaired weights here (.safetensors).", rich_help_panel=OUTPUT)],
    arch: Arch = None,
    arch_arg: ArchArgs = None,
    data: Data = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    limit: Limit = 2500,
    report: Annotated[
        Path | None, typer.Option(help="A scan's JSON; without it the model is scanned first.", rich_help_panel=METHOD)
    ] = None,
    target: Annotated[
        list[int] | None,
        typer.Option(help="Repair this class whatever the scan says; may be given several times.", rich_help_panel=METHOD),
    ] = None,
    method: Annotated[
        MethodName, typer.Option(help="What is trained on; head takes seconds. See docs/repair.md.", rich_help_panel=METHOD)
    ] = MethodName.AUTO,
    beta: Annotated[float | None, typer.Option(help="Weight of the loss on shifted latents.", rich_help_panel=METHOD)] = None,
    strength: Annotated[
        float | None, typer.Option(help="Weight of the loss on perturbed images (auto, unlearn).", rich_help_panel=METHOD)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; a lower one costs and removes less.", rich_help_panel=METHOD)] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the clean data.", rich_help_panel=METHOD)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the held-out split and the order of training.", rich_help_panel=RUN)] = 0,
    device: Device = "auto",
    json_file: Json = None,
    html_file: Html = None,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Remove the backdoor from a copy of the model. When no class is suspected it says so, writes no file, and exits with 0."""
    from tacfast.repair import repair
    from tacfast.sources import check_same

    terminal.set_up(quiet=quiet, plain=no_color, stdout_taken=check_outputs(output, json_file, html_file))
    if html_file is not None:
        check_pages()
    if output.suffix.lower() != ".safetensors":
        raise ProblemError(f"--out must end in .safetensors, got {output.name!r}")
    if model.suffix.lower() == ".npz":
        raise ProblemError(f"{model.name} holds no network; repair needs a checkpoint (.safetensors, .pth)")
    given = None if report is None else ScanReport.from_json(report)
    source = _load(model, arch, arch_arg, data, mean, std, size, limit)
    if given is not None and given.file.get("sha256") not in (None, source.file["sha256"]):
        raise CheckpointError(f"{report} is a report on another file: its SHA-256 is not that of {model.name}; scan this one")
    if given is not None:
        check_same(given.file, source.file)
    _capture(source, device, most=_CHECKED)
    result = repair(source.model, source.batches, given, targets=target or None, method=method.value, beta=beta, strength=strength, lr=lr,
                    epochs=epochs, seed=seed, device=device, progress=terminal.bars(), file=source.file)  # fmt: skip
    terminal.show_repair(result)
    if result.model is not None:
        from tacfast.checkpoints import save_safetensors
        from tacfast.preprocessing import METADATA

        made = json.dumps({"version": __version__, "targets": result.targets})
        told = {"tacfast": made, "arch": str(source.file["arch"]), METADATA: json.dumps(source.batches.preprocessing.to_dict())}
        save_safetensors(result.model, output, told)
        terminal.note(f"wrote {output}")
    if html_file is not None:
        from tacfast.explain import versions

        told_of = {"provenance": {**versions(), **_provenance()}, **_names(source, len(result.before.norms))}
        result = replace(result, details=told_of)
        write_page(result, html_file)
    if json_file is not None:
        write_json(result.to_dict(), json_file)


@app.command(epilog=epilog("bench"), rich_help_panel=SOLVER)
def bench(
    problem: Annotated[
        Path | None, typer.Argument(help=".npz with W (C,d), Z (n,d) and perhaps b (C,); without it a synthetic head.")
    ] = None,
    classes: Annotated[int, typer.Option(min=2, help="Of the synthetic head.")] = 1000,
    dim: Annotated[int, typer.Option(min=1, help="Of the synthetic head.")] = 2048,
    samples: Annotated[int, typer.Option(min=1, help="Of the synthetic head.")] = 5000,
    engine: Engine = EngineName.AUTO,
    threads: Threads = None,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs (GEMM, solve) to time.", rich_help_panel=RUN)] = 3,
    json_file: Json = None,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Time a whole solve against the logits GEMM that any method must do. Does not import torch."""
    from tacfast.bench import run, synthetic_head

    terminal.set_up(quiet=quiet, plain=no_color, stdout_taken=check_outputs(json_file))
    w, b, z = synthetic_head(classes, dim, samples) if problem is None else _read_head(problem)[:3]
    result = run(w, b, z, engine=engine.value, threads=threads, repeats=repeats)
    terminal.show_bench(result)
    if json_file is not None:
        write_json({"schema": "tacfast.bench/1", "tool_version": __version__, **result.to_dict()}, json_file)


@app.command(epilog=epilog("doctor"), rich_help_panel=INSTALLED)
def doctor(json_file: Json = None, quiet: Quiet = False, no_color: NoColor = False) -> None:
    """Versions, hardware, and a self-test against known answers: for a first look, and for bug reports. Names no file, host or user."""
    from tacfast.doctor import diagnose

    terminal.set_up(quiet=quiet, plain=no_color, stdout_taken=check_outputs(json_file))
    found = diagnose(progress=terminal.bars())
    terminal.show_diagnosis(found)
    if json_file is not None:
        write_json(found.to_dict(), json_file)
    if not found.ok:
        raise typer.Exit(2)


@app.command(epilog=epilog("schema"), rich_help_panel=INSTALLED)
def schema(name: Annotated[str, typer.Argument(help=f"One of {', '.join(schemas.NAMES)}.")]) -> None:
    """Print the JSON Schema of a report."""
    terminal.emit(schemas.text(name))


def _load(
    model: Path, arch: str | None, arch_arg: list[str] | None, data: Path | None, mean: str | None, std: str | None, size: int | None,
    limit: int,
) -> Source:  # fmt: skip
    """The model, its clean batches, and where both came from; says what was chosen."""
    from tacfast.sources import channels, load

    if data is None:
        raise ProblemError(f"--data needed to run {model.name}: a folder of clean images, an .npz or an .npy; --help says more")
    arguments = {}
    for item in arch_arg or []:
        key, equals, value = item.partition("=")
        if not (key and equals):
            raise ProblemError(f"--arch-arg must be key=value, got {item!r}")
        arguments[key] = value
    means, stds = (None if text is None else channels(name, text) for name, text in (("mean", mean), ("std", std)))
    source = load(model, data, arch=arch, arguments=arguments, size=size, mean=means, std=stds, limit=limit)
    terminal.note("; ".join((str(source.file["arch"]), *source.notes)))
    for hint in source.batches.images.hints:
        terminal.warn(hint)
    return source


def _capture(source: Source, device: str, most: int | None = None) -> tuple[Captured, Doubt | None]:
    """Latents of the clean images, or of at most so many of them; warns where the data cannot be what the model expects."""
    from tacfast.heads import capture
    from tacfast.patterns import IMAGES
    from tacfast.sources import doubt

    batches = source.batches if most is None else source.batches.thinned(most)
    captured = capture(source.model, batches, device=device, keep=IMAGES, progress=terminal.bars())
    found = doubt(captured.predictions, captured.labels)
    if found is not None:
        terminal.warn(found.reason)
    return captured, found


def _names(source: Source, classes: int) -> dict[str, Any]:
    """What a page calls the classes, where a file names them."""
    names = [source.names.get(k) for k in range(classes)]
    return {"names": names, "names_from": source.names_from} if any(names) else {}


def _provenance() -> dict[str, Any]:
    """The command line, as it can be typed again."""
    return {"command": shlex.join(["tacfast", *sys.argv[1:]])}


def _with_doubt(report: ScanReport, doubt: Doubt | None) -> ScanReport:
    """A model that was shown what it does not know is neither clean nor backdoored for it."""
    if doubt is None:
        return report
    report = replace(report, file={**report.file, "notes": [*report.file.get("notes", ()), doubt.reason]})
    if not doubt.grave or report.verdict == "inconclusive":
        return report
    return replace(report, verdict="inconclusive", reason=doubt.reason, suspects=(), kind=None, pairs=())


def _read_head(path: Path) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray | None, str]:
    from tacfast.files import read_npz

    arrays, digest = read_npz(path)
    for name in ("W", "Z"):
        if name not in arrays:
            raise CheckpointError(
                f"{path.name} must hold W (C,d) and Z (n,d), and perhaps b and y; it holds {', '.join(map(repr, arrays)) or 'nothing'}"
            )
    return arrays["W"], arrays.get("b"), arrays["Z"], arrays.get("y"), digest
