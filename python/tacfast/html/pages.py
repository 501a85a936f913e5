"""Reports into pages, by templates. May import: jinja2, charts, svg, thumbnails, words, text, report, outcome, errors.

The engine escapes whatever it is given, and every text passes `text.plain` first; the pages allow no scripts and load nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from tacfast._rust import __version__
from tacfast.html import charts, text, words
from tacfast.html.svg import chart
from tacfast.html.thumbnails import data_uri
from tacfast.outcome import FORGOTTEN, RepairResult
from tacfast.report import ScanReport

#: Classes in the table of norms.
_ROWS = 12


def scan_page(report: ScanReport) -> str:
    """The page of a scan."""
    return _environment().get_template("scan.html.j2").render(
        **_shared(report, words.of_scan(report)), report=report, **_norms(report), **_explained(report), evidence_words=words.EVIDENCE,
        kind_words=words.KINDS, warnings=_notes(report.file),
    )  # fmt: skip


def repair_page(result: RepairResult) -> str:
    """The page of a repair."""
    return _environment().get_template("repair.html.j2").render(
        **_shared(result, words.of_repair(result)), result=result, chart=_change(result), settings=text.lines(result.settings),
        warnings=[*_notes(result.file), *([FORGOTTEN] if result.forgotten else [])], rows=_changes(result),
    )  # fmt: skip


def scan_cell(report: ScanReport) -> str:
    """A scan in a notebook."""
    figures = [
        ("p-value", text.p_value(report.p_value)),
        ("classes", str(len(report.norms))),
        ("clean samples", str(report.samples)),
        *([] if report.clean_accuracy is None else [("clean accuracy", text.share(report.clean_accuracy))]),
    ]
    return _cell(words.of_scan(report), report.reason, figures, _norms(report)["norms_chart"])


def repair_cell(result: RepairResult) -> str:
    """A repair in a notebook."""
    figures = [("method", result.method), ("held-out accuracy before", text.share(result.before.clean_accuracy))]
    figures += [] if result.after is None else [("after", text.share(result.after.clean_accuracy))]
    return _cell(words.of_repair(result), "", figures, _change(result))


def _cell(verdict: words.Verdict, reason: str, figures: list[tuple[str, str]], drawn: Markup) -> str:
    template = _environment().get_template("cell.html.j2")
    return template.render(verdict=verdict, reason=reason, figures=figures, chart=drawn)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tacfast.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else text.plain(value),
    )
    environment.filters.update(
        {name: getattr(text, name) for name in ("p_value", "share", "quantity", "small", "seconds", "sentence")},
        cut=partial(text.plain, most=text.LONG),
    )
    return environment


def _shared(result: ScanReport | RepairResult, verdict: words.Verdict) -> dict[str, Any]:
    """What both pages have."""
    told = result.details or {}
    names = told.get("names") or []
    longest = max(result.timing_s.values(), default=0.0) or 1.0
    return {
        "version": __version__,
        "verdict": verdict,
        "tags": words.TAGS,
        "named": lambda k, most=text.LONG: text.label(k, names, most),
        "names_from": told.get("names_from"),
        "timings": [(phase, spent, round(100 * spent / longest)) for phase, spent in result.timing_s.items()],
        "file": [(name, value) for name, value in text.lines(result.file) if name != "notes"],
        "provenance": text.lines(told.get("provenance") or {}),
        "model": result.file.get("model"),
    }


def _notes(file: Mapping[str, Any]) -> list[str]:
    notes = file.get("notes")
    return [str(note) for note in notes][:20] if isinstance(notes, (list, tuple)) else []


def _norms(report: ScanReport) -> dict[str, Any]:
    """The picture of the norms, and the table beside it: the smallest norms, in the units of the picture's bands."""
    suspects = {s.target: s for s in report.suspects}
    with np.errstate(divide="ignore"):
        logs = np.log(report.norms)
    others = np.array([k for k, v in enumerate(logs) if np.isfinite(v) and k not in suspects])
    rows = [
        {
            "class": k,
            "below": _below(logs[k], logs[others[others != k]]),
            "suspect": suspects.get(k),
            "status": str(report.status[k]),
            **{
                name: float(values[k])
                for name, values in (("norm", report.norms), ("alignment", report.alignment), ("spread", report.spread))
            },
        }
        for k in [*suspects, *(k for k in np.argsort(report.norms, kind="stable").tolist() if k not in suspects)][:_ROWS]
    ]
    marked = ", ".join(str(k) for k in suspects) or "none"
    description = f"Norms of the {len(report.norms)} classes on one line; marked as suspects: {marked}. The table below lists the smallest."
    infinite = int(np.isinf(report.norms).sum())
    drawn = chart(partial(charts.norms_figure, report), "Norms of all classes", description)
    return {"norms_chart": drawn, "rows": rows, "infinite": infinite}


def _below(value: float, others: NDArray[np.float64]) -> float | None:
    """How many of their standard deviations it lies below the mean of the others."""
    spread = float(others.std(ddof=1)) if len(others) > 1 else 0.0
    return (float(others.mean()) - value) / spread if spread > 0 and np.isfinite(value) else None


def _explained(report: ScanReport) -> dict[str, Any]:
    """The pictures and tables that only an explained report has; each None where there is nothing to show."""
    told = report.details or {}
    points = [p for p in told.get("convergence", []) if p["p_value"] is not None]
    return {
        "evidence_chart": _evidence(report) if report.evidence else None,
        "shifts": [_shift(shift, report) for shift in told.get("shifts", [])],
        "pairs_chart": _pairs(report, told["pairs"]) if "pairs" in told else None,
        "convergence_chart": _convergence(report, points) if len(points) > 1 else None,
        "certificate": told.get("certificate"),
    }


def _evidence(report: ScanReport) -> Markup:
    told = "; ".join(f"{e.kind} {text.p_value(e.p_value)}" for e in report.evidence)
    return chart(partial(charts.evidence_figure, report), "p-values by kind of evidence", f"{told}; the level is {report.alpha:g}.")


def _pairs(report: ScanReport, pairs: list[list[float | None]]) -> Markup:
    norms = np.array([[np.nan if v is None else v for v in row] for row in pairs], dtype=np.float64)
    draw = partial(charts.pairs_figure, report, norms)
    return chart(draw, "Norms of all pairs of classes", f"Suspected pairs: {len(report.pairs)}, framed.")


def _convergence(report: ScanReport, points: list[dict[str, Any]]) -> Markup:
    told = "; ".join(f"{p['samples']} samples: {text.p_value(p['p_value'])}" for p in points)
    draw = partial(charts.convergence_figure, report, points)
    return chart(draw, "p-value by number of samples", f"{told}; the level is {report.alpha:g}.")


def _shift(shift: Mapping[str, Any], report: ScanReport) -> dict[str, Any]:
    drawn = chart(
        partial(charts.shift_figure, dict(shift)),
        f"Size of the shift into class {shift['class']} by channel",
        f"{shift['half']} of {shift['channels']} channels hold half of its squared length.",
    )
    pictures = {
        name: [
            {**entry, "picture": data_uri(report.pictures[entry["sample"]])} for entry in shift[name] if entry["sample"] in report.pictures
        ]
        for name in ("easiest", "hardest")
    }
    return {**shift, **pictures, "chart": drawn, "suspect": any(s.target == shift["class"] for s in report.suspects)}


def _change(result: RepairResult) -> Markup:
    targets = ", ".join(map(str, result.targets))
    return chart(partial(charts.change_figure, result), "Norms of all classes before and after", f"Marked: {targets or 'none'}.")


def _changes(result: RepairResult) -> list[tuple[str, str, str]]:
    """What is measured before and after, in words."""
    if result.after is None:
        return []
    both, names = (result.before, result.after), (result.details or {}).get("names") or []
    rows: list[tuple[str, tuple[str, ...]]] = [
        ("clean accuracy", tuple(text.share(s.clean_accuracy) for s in both)),
        ("clean accuracy on the target class", tuple(text.share(s.target_accuracy) for s in both)),
        ("recovery accuracy", tuple(text.share(s.recovery_accuracy) for s in both)),
        ("reach of a universal perturbation", tuple(text.share(s.reach) for s in both)),
        ("mean probability of the target class", tuple(text.quantity(s.target_probability) for s in both)),
        ("same class as before the repair", ("", text.share(result.after.agreement))),
    ]
    for k in result.targets[:_ROWS]:
        rows.append((f"norm of class {text.label(k, names)}", tuple(text.quantity(float(s.norms[k])) for s in both)))
    rows.append(("median norm of all classes", tuple(text.quantity(_median(s.norms)) for s in both)))
    return [(name, before, after) for name, (before, after) in rows]


def _median(norms: NDArray[np.float64]) -> float | None:
    finite = norms[np.isfinite(norms)]
    return float(np.median(finite)) if len(finite) else None
