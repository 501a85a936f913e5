"""What people see: the consoles, the tables, the one line of --quiet. May import: rich, report, outcome, solver; the rest for types.

Answers go to standard output; notes on the way there too, warnings, errors and progress to standard error. Where a report takes standard
output (`--json -`), what people see goes to standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tacfast.outcome import FORGOTTEN, RepairResult
from tacfast.report import ScanReport
from tacfast.solver import TacSolutions

if TYPE_CHECKING:
    from tacfast.bench import BenchResult
    from tacfast.demo import DemoResult
    from tacfast.doctor import Diagnosis

_VERDICT_STYLE = {"clean": "green", "backdoored": "bold red", "inconclusive": "yellow"}
#: Classes listed in a table before it is cut, and in a sentence.
_ROWS = 10
#: Where nobody looks, a table has the room that it needs.
_WIDE = 200


class _Console(Console):
    """A reader that closes the pipe early must not change the exit code, which is the verdict."""

    def on_broken_pipe(self) -> None:
        _forget_stdout()
        self.quiet = True


def _forget_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _console(*, stderr: bool = False, plain: bool = False, quiet: bool = False) -> Console:
    # rich's own notion of NO_COLOR keeps bold and dim.
    colours = None if plain or os.environ.get("NO_COLOR") else "auto"
    console = _Console(stderr=stderr, color_system=colours, quiet=quiet)  # type: ignore[arg-type]
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDE
    return console


#: The answer in one line; all the rest; and what is wrong.
answer, out, err = _console(), _console(), _console(stderr=True)


def set_up(*, plain: bool = False, quiet: bool = False, stdout_taken: bool = False) -> None:
    """How everything is printed from now on.

    Args:
        plain: no colours and no bars, as where NO_COLOR is set.
        quiet: `answer` and `err` alone.
        stdout_taken: standard output belongs to a report.
    """
    global answer, out, err
    answer = _console(stderr=stdout_taken, plain=plain)
    out = _console(stderr=stdout_taken, plain=plain, quiet=quiet)
    err = _console(stderr=True, plain=plain)


def bars() -> bool:
    """Whether progress bars are wanted: on a terminal that may have colours, and not when quiet."""
    return err.is_terminal and err.color_system is not None and not out.quiet


def emit(text: str) -> None:
    """A report on standard output, as it is."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_stdout()


def fail(text: str) -> None:
    """The one line of an error, and nothing in it that a hostile name could make a terminal do."""
    line = "".join(c if c.isprintable() else " " for c in text)
    err.print(f"[red]error:[/] {escape(line)}", soft_wrap=True, highlight=False)


def note(text: str) -> None:
    """What was chosen, before the work."""
    out.print(f"[dim]{escape(text)}[/]", highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """What the user should look into."""
    err.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[str] = (), spare: Sequence[str] = ()) -> None:
    """A table whose figures are never cut: where it is wider than the terminal, `words` wrap, then `spare` columns go, the first first."""
    rows, left_out = list(rows), 0
    while True:
        shown = [i for i, column in enumerate(columns) if column not in spare[:left_out]]
        table = Table()
        for i in shown:
            # rich would shorten what does not wrap.
            needed = None if columns[i] in words else max(len(columns[i]), *(Text.from_markup(row[i]).cell_len for row in rows), 0)
            table.add_column(columns[i], justify="right", no_wrap=needed is not None, min_width=needed)
        for row in rows:
            table.add_row(*(row[i] for i in shown))
        if left_out == len(spare) or out.measure(table, options=out.options.update(width=_WIDE)).minimum <= out.width:
            break
        left_out += 1
    out.print(table)
    if left_out:
        out.print(f"[dim]too narrow for: {', '.join(spare[:left_out])}[/]")


def listed(items: Iterable[object]) -> str:
    """A list for a sentence; a long one is folded."""
    words = [str(item) for item in items]
    folded = f" and {len(words) - _ROWS} more" if len(words) > _ROWS else ""
    return ", ".join(words[:_ROWS]) + folded


def show_solutions(solutions: TacSolutions) -> None:
    answer.print(repr(solutions), markup=False, highlight=False, soft_wrap=True)
    order = np.argsort(solutions.norms, kind="stable")
    rows = [
        (
            str(solutions.classes[t]), f"{solutions.norms[t]:.4g}", str(solutions.status[t]), f"{solutions.bound[t]:.4g}",
            f"{solutions.primal_residual[t]:.1e}", f"{solutions.gap[t]:.1e}", str(solutions.engine[t]),
        )
        for t in order[:_ROWS]
    ]  # fmt: skip
    columns = ("class", "norm", "status", "proven bound", "primal", "gap", "engine")
    _print_table(columns, rows, spare=("engine", "gap", "primal", "proven bound"))
    if len(order) > _ROWS:
        out.print(f"[dim]the {_ROWS} smallest of {len(order)} norms; --out writes all[/]")


def show_scan(report: ScanReport) -> None:
    answer.print(f"[{_VERDICT_STYLE[report.verdict]}]{report.verdict}[/]: {escape(report.reason)}", highlight=False, soft_wrap=True)
    rows = []
    suspects = {s.target: s for s in report.suspects}
    for k in np.argsort(report.norms, kind="stable")[:_ROWS]:
        suspect, status = suspects.get(int(k)), str(report.status[k])
        note = "[red]suspect[/]" if suspect else "" if status == "solved" else status
        traits = ["" if np.isnan(v[k]) else f"{v[k]:.3f}" for v in (report.alignment, report.spread)]
        rows.append((str(k), f"{report.norms[k]:.4g}", *traits, f"{suspect.p_value:.2g}" if suspect else "", note))
    _print_table(("class", "norm", "alignment", "spread", "p-value", ""), rows, spare=("spread", "alignment", "p-value"))
    for e in report.evidence:
        where = "" if e.target is None else f", class {e.target}"
        out.print(
            f"evidence by {e.kind}{where}: {e.statistic:.1f} standard deviations (p = {e.p_value:.2g} by itself)",
            highlight=False,
            soft_wrap=True,
        )
    if report.moved is not None and report.evidence and report.verdict != "clean":
        halves = "" if report.stability is None else f"; {report.stability:.0%} of halves of the samples name it too"
        out.print(
            f"the shift into class {report.evidence[0].target} moves {report.moved:.0%} of the samples there{halves}",
            highlight=False,
            soft_wrap=True,
        )
    accuracy = "" if report.clean_accuracy is None else f"accuracy on them {report.clean_accuracy:.1%}; "
    index = "" if report.mad_index is None else f"MAD index {report.mad_index:.1f} (shown, never used); "
    times = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in report.timing_s.items())
    out.print(f"[dim]{report.samples} samples; {accuracy}{index}{times}[/]", highlight=False, soft_wrap=True)


def show_repair(result: RepairResult) -> None:
    before, after = result.before, result.after
    if after is None:
        answer.print("nothing to do: no class is suspected; no file written (--target K repairs a class anyway)", soft_wrap=True)
        return
    change = f"clean accuracy {before.clean_accuracy:.1%} -> {after.clean_accuracy:.1%} on held-out samples"
    answer.print(f"{result.method} against class {listed(result.targets)}: {change}", highlight=False, soft_wrap=True)
    shares = {
        "clean accuracy": (before.clean_accuracy, after.clean_accuracy),
        "accuracy on shifted latents": (before.recovery_accuracy, after.recovery_accuracy),
        "accuracy on the target class": (before.target_accuracy, after.target_accuracy),
        "reached by a universal perturbation": (before.reach, after.reach),
    }
    rows = [(name, f"{old:.1%}", f"{new:.1%}") for name, (old, new) in shares.items() if old is not None and new is not None]
    rows.append(("same class as before", "", f"{after.agreement:.1%}"))
    if before.target_probability is not None and after.target_probability is not None:
        rows.append(("mean probability of the target class", f"{before.target_probability:.2g}", f"{after.target_probability:.2g}"))
    rows += [(f"norm of class {k}", f"{before.norms[k]:.4g}", f"{after.norms[k]:.4g}") for k in result.targets[:_ROWS]]
    _print_table(("on held-out clean samples", "before", "after"), rows, words=("on held-out clean samples",))
    if len(result.targets) > _ROWS:
        out.print(f"[dim]the first {_ROWS} of {len(result.targets)} targets; --json writes all[/]", soft_wrap=True)
    if result.forgotten:
        warn(FORGOTTEN)
    for trial in result.trials if len(result.trials) > 1 else ():
        said = [f"clean accuracy {trial.clean_accuracy:.1%}"]
        said += [] if trial.reach is None else [f"reached {trial.reach:.1%}"]
        said += [] if trial.drift is None else [f"drift {trial.drift:.2f}"]
        taken = " (taken)" if trial.lr == result.settings.get("lr") else ""
        out.print(f"[dim]tried lr {trial.lr:g}: {', '.join(said)}{taken}[/]", highlight=False, soft_wrap=True)
    times = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in result.timing_s.items())
    note = "" if result.labelled else "; no labels: the model's predictions stood in for them"
    out.print(f"[dim]{result.samples} samples{note}; {times}[/]", highlight=False, soft_wrap=True)


def show_demo(result: DemoResult) -> None:
    show_scan(result.report)
    out.print("trigger-activated change of the strongest latent channels", soft_wrap=True)
    channels = np.argsort(-np.abs(result.true_tac))[:6]
    tac = [(str(c), f"{result.reconstructed_tac[c]:+.3f}", f"{result.true_tac[c]:+.3f}") for c in channels]
    _print_table(("channel", "reconstructed", "true"), tac)
    out.print(f"cosine of the two: {result.cosine:.2f}")
    out.print(f"repair (the trigger's target is {result.target})", highlight=False)
    rates = {"clean accuracy": result.clean_accuracy, "attack success rate": result.asr}
    rows = [(name, *(f"{v:.1%}" for v in values)) for name, values in rates.items()]
    _print_table(("on unseen digits", "before", "after"), rows, words=("on unseen digits",))


def show_bench(result: BenchResult) -> None:
    answer.print(repr(result), markup=False, highlight=False, soft_wrap=True)
    gemm_threads = "numpy's choice" if result.gemm_threads is None else str(result.gemm_threads)
    solve = (f"{1e3 * result.solve_s:.1f}", f"{result.ratio:.2f}", f"{result.ms_per_class:.3g}")
    rows = [
        ("logits GEMM (numpy)", gemm_threads, f"{1e3 * result.gemm_s:.1f}", "1", ""),
        (f"whole solve ({result.engine})", str(result.threads), *solve),
    ]
    _print_table(("", "threads", "ms", "GEMMs", "ms per class"), rows, words=("", "threads"), spare=("ms per class", "threads"))
    counts = ", ".join(f"{count} {status}" for status, count in result.status.items())
    stages = "".join(f"; {stage} {1e3 * s:.1f} ms" for stage, s in result.stage_s.items())
    out.print(f"[dim]medians of {result.repeats} pairs; {counts}{stages}[/]", highlight=False, soft_wrap=True)


def show_diagnosis(found: Diagnosis) -> None:
    def say(text: str) -> None:
        out.print(text, highlight=False, soft_wrap=True)

    for name, version in found.packages.items():
        say(f"{name} {version}" if version is not None else escape(f"{name} not installed: {found.remedies[name]}"))
    for name, value in found.machine.items():
        say(escape(f"{name}: {'unknown' if value is None else value}"))
    marks = {True: "[green]ok[/]", False: "[bold red]failed[/]", None: "[yellow]not run[/]"}
    for check in found.checks:
        say(f"{marks[check.ok]} {escape(check.name)}: {escape(check.figure)}")
    failed = [check.name for check in found.checks if check.ok is False]
    passed = sum(check.ok is True for check in found.checks)
    verdict = f"[bold red]failed[/]: {escape(', '.join(failed))}" if failed else f"[green]ok[/]: {passed} checks passed"
    answer.print(f"{verdict} in {sum(c.seconds for c in found.checks):.1f} s", highlight=False, soft_wrap=True)
