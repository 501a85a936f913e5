"""One law: a page shows what the report holds, claims no more, loads nothing, and whatever a model file calls its classes stays text."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

import pages
import tacfast
from schemas import strict
from tacfast.cli import app
from tacfast.html import text
from tacfast.outcome import Trial

#: Elements of our templates and of matplotlib's drawings; and the attributes that a page may have at all.
TAGS = set(
    """html head meta title style body main header section article footer h1 h2 h3 h4 p span bdi br em strong ol ul li dl dt dd div figure
    figcaption img table caption thead tbody tr th td details summary svg g path use defs clippath rect text tspan image circle""".split()  # noqa: SIM905
)
ATTRIBUTES = set(
    """lang charset name content http-equiv class id aria-labelledby aria-label role scope style href src alt width height viewbox
    d transform clip-path x y r cx cy preserveaspectratio""".split()  # noqa: SIM905
)
KINDS: dict[str, Any] = {
    "clean": lambda: pages.explained(43, samples=900, seed=6),
    "all-to-one": lambda: pages.explained(10, shift=3.0, targets=(3,), names=[f"name {k}" for k in range(10)]),
    "all-to-all": pages.all_to_all,
    "inconclusive": lambda: pages.explained(3, samples=60),
    "thousand": lambda: pages.explained(1000, dim=32, samples=50, pictures=False),
    "plain": lambda: tacfast.scan_head(*pages.head()[:1], None, pages.head()[1], threads=1),
    "repaired": pages.repaired,
    "nothing": pages.nothing_done,
}


@pytest.fixture(scope="module", params=KINDS)
def shown(request: pytest.FixtureRequest) -> tuple[str, Any, str]:
    """A kind of result, the result, and its page."""
    result = KINDS[request.param]()
    return request.param, result, result.to_html()


class Page(HTMLParser):
    """The elements of a page, its text, and all that it could load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.strange: list[str] = []
        self.words: list[str] = []
        self.rows: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.rows.append((tag, dict(attrs)))
        self.strange += [f"{tag} {name}" for name, _ in attrs if name not in ATTRIBUTES]
        self.loads += [value or "" for name, value in attrs if name in ("href", "src", "srcset", "action", "data", "poster")]
        self.loads += re.findall(r"url\(([^)]*)\)", " ".join(value or "" for _, value in attrs))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "style":
            self.loads += re.findall(r"url\(([^)]*)\)|@import", data)
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check_inert(html: str) -> Page:
    page = Page(html)
    assert set(page.tags) <= TAGS
    assert page.strange == []
    assert [load for load in page.loads if not load.startswith(("#", "data:image/png;base64,"))] == []
    return page


def test_a_page_is_inert_and_readable_by_all(shown: tuple[str, Any, str]) -> None:
    _, _, html = shown
    page = check_inert(html)
    assert "default-src 'none'" in html
    assert 'name="viewport"' in html
    assert all(row.get("aria-label") for tag, row in page.rows if tag == "svg")
    assert all(row.get("scope") for tag, row in page.rows if tag == "th")
    assert all(row.get("alt") for tag, row in page.rows if tag == "img")
    ids = [row["id"] for _, row in page.rows if "id" in row]
    assert len(ids) == len(set(ids))


CONTENTS = {
    "clean": ["No evidence of a backdoor was found", "not proof that there is none", "Certificates", "fewer samples", "1 − "],
    "all-to-one": [
        "Evidence of a backdoor into class 3 · name 3",
        "Do not deploy",
        "suspect",
        "Most easily pushed",
        "Least easily",
        "channel",
    ],
    "all-to-all": ["Evidence of an all-to-all backdoor", "0 → 1", "From each class to each other", "Into class"],
    "inconclusive": ["The scan could not tell", "at least 4 are needed", "not examined"],
    "thousand": ["1000", "Certificates"],
    "plain": ["How easy each class is to reach", "Which evidence spoke"],
    "repaired": ["Before and after", "97.0 %", "96.0 %", "unlearn", "cannot prove", "beta"],
    "nothing": ["no class was suspected"],
}


def test_a_page_shows_what_the_report_holds(shown: tuple[str, Any, str]) -> None:
    kind, result, html = shown
    said = Page(html).text.replace("\u00a0", " ")
    for part in (*CONTENTS[kind], "AML.T0018", "ML10:2023", tacfast.__version__, "What to do next"):
        assert part in said, part
    assert not re.search(r"\b(safe|harmless model|trustworthy|no backdoor)\b", said, re.IGNORECASE)
    if result.file:
        assert "0" * 64 in said
    if kind == "all-to-one":
        assert html.count("<img ") == 16


def test_results_survive_json(shown: tuple[str, Any, str], tmp_path: Path) -> None:
    kind, result, _ = shown
    assert result.to_json(tmp_path / "result.json") is None
    again = type(result).from_json(tmp_path / "result.json")
    assert again.to_dict() == result.to_dict() == json.loads(result.to_json())
    assert repr(again) == repr(result)
    strict("repair" if "repaired" in result.to_dict() else "scan").validate(result.to_dict())
    if kind in ("inconclusive", "repaired"):
        assert "img" not in check_inert(again.to_html()).tags


def test_notebooks_and_figures(shown: tuple[str, Any, str]) -> None:
    _, result, _ = shown
    cell = result._repr_html_()
    check_inert(cell)
    assert len(cell) < 300_000
    assert isinstance(result.plot(), Figure)


def poisoned(data: dict[str, Any]) -> dict[str, Any]:
    """A result whose every word is hostile."""
    nasty = pages.HOSTILE[2]
    data["file"] = {nasty: nasty, "model": nasty, "notes": [nasty, {nasty: nasty}], "arch_args": {nasty: [nasty]}}
    data["timing_s"] = {nasty: 1.0}
    data["details"]["provenance"] = {nasty: nasty}
    if "settings" in data:
        return {**data, "settings": {nasty: nasty}}
    data["evidence"][0]["kind"] = nasty
    return {**data, "reason": nasty, "head": {"name": nasty, "proof_error": nasty}}


@pytest.mark.parametrize("kind", ["scan", "repair"])
def test_hostile_words_stay_text(kind: str) -> None:
    made = pages.repaired([*pages.HOSTILE[:10]]) if kind == "repair" else pages.explained(15, shift=3.0, targets=(3,), names=pages.HOSTILE)
    result = type(made).from_dict(poisoned(made.to_dict()))
    html = str(result.to_html())
    page = check_inert(html)
    html.encode()
    assert not re.search("[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u2028-\u202e\u2066-\u2069]", html)
    assert "W" * 100 not in html
    assert "onerror=alert(1)" in page.text
    check_inert(str(result._repr_html_()))


DAMAGE: list[tuple[str, Any]] = [
    ("p_value", "<b>"),
    ("kind", "other"),
    ("timing_s", {"solve": "long"}),
    ("mad_index", [1]),
    ("samples", 1.5),
    ("file", []),
    ("head", "x"),
    ("details", []),
    ("details", {"names": ["one"]}),
    ("details", {"pairs": [[0.0]]}),
    ("details", {"shifts": [{"class": 99}]}),
    ("details", {"certificate": {"counts": {"guessed": 1}}}),
    ("details", {"convergence": 3}),
    ("details", {"provenance": {"a": float("nan")}}),
]


@pytest.mark.parametrize(("field", "value"), DAMAGE)
def test_damaged_reports_are_refused(field: str, value: Any) -> None:
    data = tacfast.scan_head(pages.head()[0], None, pages.head()[1], threads=1).to_dict()
    with pytest.raises(tacfast.CheckpointError, match="damaged"):
        tacfast.ScanReport.from_dict({**data, field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("schema", "other/1"), ("before", {}), ("targets", [99]), ("method", "magic"), ("labelled", 1), ("repaired", False)],
)
def test_damaged_repairs_are_refused(field: str, value: Any) -> None:
    with pytest.raises(tacfast.CheckpointError):
        tacfast.RepairResult.from_dict({**pages.repaired().to_dict(), field: value})


def test_details_keep_only_what_is_known() -> None:
    data = pages.explained(10, pictures=False).to_dict()
    data["details"]["more"] = "<script>"
    assert "more" not in (tacfast.ScanReport.from_dict(data).details or {})


def test_the_command_line_writes_a_page(tmp_path: Path) -> None:
    w, z, y = pages.head(10, shift=3.0, targets=(3,))
    np.savez(tmp_path / "head.npz", W=w, Z=z, y=y)
    file, page = tmp_path / "scan.json", tmp_path / "scan.html"
    done = CliRunner().invoke(app, ["scan", str(tmp_path / "head.npz"), "--json", str(file), "--html", str(page), "--threads", "1"])
    assert done.exit_code == 1, done.output
    said = check_inert(page.read_text()).text
    assert "head.npz" in said
    assert "tacfast" in json.loads(file.read_text())["details"]["provenance"]["command"]
    refused = CliRunner().invoke(app, ["scan", str(tmp_path / "head.npz"), "--html", str(tmp_path / "nowhere" / "scan.html")])
    assert isinstance(refused.exception, tacfast.CheckpointError)


@pytest.mark.parametrize(
    ("p", "shown"), [(None, "none"), (1.0, "1.00"), (0.85, "0.85"), (0.049, "0.049"), (0.00006199, "0.000062"), (1e-9, "< 0.000001")]
)
def test_p_values_are_plain_decimals(p: float | None, shown: str) -> None:
    assert text.p_value(p) == shown


@pytest.mark.parametrize("forgotten", [True, False])
def test_a_repair_page_says_when_the_target_is_hardly_named_any_more(forgotten: bool) -> None:
    result = pages.repaired()
    assert result.after is not None
    before, after = (
        replace(result.before, target_probability=0.0026),
        replace(result.after, target_probability=0.00002 if forgotten else 0.002),
    )
    page = replace(result, before=before, after=after).to_html()
    assert ("hardly names the target class" in page) is forgotten
    assert "0.0026" in page


def test_a_repair_page_tells_what_was_tried() -> None:
    trials = (Trial(0.03, 0.975, 0.25, 0.2345), Trial(0.01, 0.985, None, None))
    page = replace(pages.repaired(), method="auto", trials=trials).to_html()
    rows = [[html.unescape(cell) for cell in re.findall(r"<td[^>]*>([^<]*)</td>", row)] for row in re.findall(r"<tr>.*?</tr>", page)]
    assert ["0.03", "97.5\u00a0%", "25.0\u00a0%", "0.2345"] in rows
    assert ["0.01", "98.5\u00a0%", "unknown", "–"] in rows
