"""What people see: the two consoles and the tables. May import: rich, report, solver; the rest for its types only."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tacfast.report import ScanReport
from tacfast.solver import TacSolutions

if TYPE_CHECKING:
    from tacfast.bench import BenchResult
    from tacfast.demo import DemoResult
    from tacfast.outcome import RepairResult

_VERDICT_STYLE = {"clean": "green", "backdoored": "bold red", "inconclusive": "yellow"}
#: Classes listed in a table before it is cut.
_ROWS = 10


class _Console(Console):
    """A reader that closes the pipe early must not change the exit code, which is the verdict."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        self.quiet = True


out = _Console()
err = Console(stderr=True)


def note(text: str) -> None:
    """What was chosen, before the work."""
    out.print(f"[dim]{escape(text)}[/]", highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """What the user should look into."""
    err.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="right")
    return table


def show_solutions(solutions: TacSolutions) -> None:
    out.print(repr(solutions), markup=False, highlight=False)
    table = _table("class", "norm", "status", "proven bound", "primal", "gap", "engine")
    order = np.argsort(solutions.norms, kind="stable")
    for t in order[:_ROWS]:
        table.add_row(
            str(solutions.classes[t]), f"{solutions.norms[t]:.4g}", solutions.status[t], f"{solutions.bound[t]:.4g}",
            f"{solutions.primal_residual[t]:.1e}", f"{solutions.gap[t]:.1e}", solutions.engine[t],
        )  # fmt: skip
    out.print(table)
    if len(order) > _ROWS:
        out.print(f"[dim]the {_ROWS} smallest of {len(order)} norms; --out writes all[/]")


def show_scan(report: ScanReport) -> None:
    out.print(f"[{_VERDICT_STYLE[report.verdict]}]{report.verdict}[/]: {report.reason}", highlight=False, soft_wrap=True)
    table = _table("class", "norm", "alignment", "spread", "p-value", "")
    suspects = {s.target: s for s in report.suspects}
    for k in np.argsort(report.norms, kind="stable")[:_ROWS]:
        suspect, status = suspects.get(int(k)), str(report.status[k])
        note = "[red]suspect[/]" if suspect else "" if status == "solved" else status
        traits = ["" if np.isnan(v[k]) else f"{v[k]:.3f}" for v in (report.alignment, report.spread)]
        table.add_row(str(k), f"{report.norms[k]:.4g}", *traits, f"{suspect.p_value:.2g}" if suspect else "", note)
    out.print(table)
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
            f"the shift into class {report.evidence[0].target} moves {report.moved:.0%} of the samples there{halves}", highlight=False
        )
    accuracy = "" if report.clean_accuracy is None else f"accuracy on them {report.clean_accuracy:.1%}; "
    index = "" if report.mad_index is None else f"MAD index {report.mad_index:.1f} (shown, never used); "
    times = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in report.timing_s.items())
    out.print(f"[dim]{report.samples} samples; {accuracy}{index}{times}[/]", highlight=False, soft_wrap=True)


def show_repair(result: RepairResult) -> None:
    before, after = result.before, result.after
    if after is None:
        out.print("nothing to do: no class is suspected; no file written (--target K repairs a class anyway)")
        return
    out.print(f"{result.method} against class {', '.join(map(str, result.targets))}", highlight=False)
    table = _table("on held-out clean samples", "before", "after")
    table.add_row("clean accuracy", f"{before.clean_accuracy:.1%}", f"{after.clean_accuracy:.1%}")
    table.add_row("accuracy on shifted latents", f"{before.recovery_accuracy:.1%}", f"{after.recovery_accuracy:.1%}")
    if before.target_accuracy is not None and after.target_accuracy is not None:
        table.add_row("accuracy on the target class", f"{before.target_accuracy:.1%}", f"{after.target_accuracy:.1%}")
    if before.reach is not None and after.reach is not None:
        table.add_row("reached by a universal perturbation", f"{before.reach:.1%}", f"{after.reach:.1%}")
    table.add_row("same class as before", "", f"{after.agreement:.1%}")
    for k in result.targets:
        table.add_row(f"norm of class {k}", f"{before.norms[k]:.4g}", f"{after.norms[k]:.4g}")
    out.print(table)
    times = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in result.timing_s.items())
    note = "" if result.labelled else "; no labels: the model's predictions stood in for them"
    out.print(f"[dim]{result.samples} samples{note}; {times}[/]", highlight=False, soft_wrap=True)


def show_demo(result: DemoResult) -> None:
    show_scan(result.report)
    out.print("trigger-activated change of the strongest latent channels")
    table = _table("channel", "reconstructed", "true")
    for channel in np.argsort(-np.abs(result.true_tac))[:6]:
        table.add_row(str(channel), f"{result.reconstructed_tac[channel]:+.3f}", f"{result.true_tac[channel]:+.3f}")
    out.print(table)
    out.print(f"cosine of the two: {result.cosine:.2f}")
    out.print(f"repair (the trigger's target is {result.target})", highlight=False)
    table = _table("on unseen digits", "before", "after")
    table.add_row("clean accuracy", *(f"{v:.1%}" for v in result.clean_accuracy))
    table.add_row("attack success rate", *(f"{v:.1%}" for v in result.asr))
    out.print(table)


def show_bench(result: BenchResult) -> None:
    out.print(repr(result), markup=False, highlight=False)
    table = _table("", "threads", "ms", "GEMMs", "ms per class")
    gemm_threads = "numpy's choice" if result.gemm_threads is None else str(result.gemm_threads)
    table.add_row("logits GEMM (numpy)", gemm_threads, f"{1e3 * result.gemm_s:.1f}", "1", "")
    table.add_row(
        f"whole solve ({result.engine})",
        str(result.threads),
        f"{1e3 * result.solve_s:.1f}",
        f"{result.ratio:.2f}",
        f"{result.ms_per_class:.3g}",
    )
    out.print(table)
    counts = ", ".join(f"{count} {status}" for status, count in result.status.items())
    stages = "".join(f"; {stage} {1e3 * s:.1f} ms" for stage, s in result.stage_s.items())
    out.print(f"[dim]medians of {result.repeats} pairs; {counts}{stages}[/]", highlight=False, soft_wrap=True)
