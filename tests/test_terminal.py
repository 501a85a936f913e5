"""One law: what people see has the room that there is, the colours that are wanted, and never gets in the way of what machines read."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import tacfast
from schemas import sarif, strict
from tacfast import bench, terminal
from tacfast.cli import app
from tacfast.outcome import RepairResult, State, Trial
from tacfast.report import ScanReport
from tacfast.verdict import Suspect


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("terminal")
    rng = np.random.default_rng(0)
    w, y = np.eye(20, 64) + rng.normal(size=(20, 64)) * 0.1, np.arange(400) % 20
    z = 3 * np.eye(20, 64)[y] + np.abs(rng.normal(size=(400, 64))) * 0.1
    z[:, -1] = 0
    np.savez(place / "clean.npz", W=w, Z=z)
    w[3, -1] = 5
    np.savez(place / "backdoored.npz", W=w, Z=z)
    return place


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.chdir(place)
    yield lambda *words: CliRunner().invoke(app, [str(word) for word in words])
    terminal.set_up()


@pytest.mark.parametrize(("name", "code"), [("clean", 0), ("backdoored", 1)])
def test_quiet_is_one_line(name: str, code: int, run: object) -> None:
    done: Result = run("scan", f"{name}.npz", "-q")  # type: ignore[operator]
    assert done.exit_code == code
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith(f"{'clean' if code == 0 else 'backdoored'}: ")
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["solve", "bench"])
def test_other_commands_are_quiet_too(command: str, run: object) -> None:
    done: Result = run(command, "clean.npz", "--quiet")  # type: ignore[operator]
    assert (done.exit_code, done.stdout.count("\n")) == (0, 1)


def test_a_report_on_standard_output_is_alone_there(run: object) -> None:
    scan: Result = run("scan", "backdoored.npz", "--json", "-")  # type: ignore[operator]
    strict("scan").validate(json.loads(scan.stdout))
    assert scan.exit_code == 1
    assert scan.stderr.startswith("backdoored: ")
    log: Result = run("scan", "backdoored.npz", "--sarif", "-", "-q")  # type: ignore[operator]
    made = json.loads(log.stdout)
    sarif().validate(made)
    assert log.stderr.count("\n") == 1
    artifact = made["runs"][0]["artifacts"][0]["location"]
    assert artifact == {"uri": "backdoored.npz", "uriBaseId": "%SRCROOT%"}
    timed: Result = run("bench", "clean.npz", "--json", "-", "--repeats", 1)  # type: ignore[operator]
    strict("bench").validate(json.loads(timed.stdout))
    both: Result = run("scan", "clean.npz", "--json", "-", "--sarif", "-")  # type: ignore[operator]
    assert "give the other one a file" in str(both.exception)


def test_files_are_written_beside_what_people_see(run: object, tmp_path: Path) -> None:
    done: Result = run("scan", "clean.npz", "--json", tmp_path / "a.json", "--sarif", tmp_path / "a.sarif")  # type: ignore[operator]
    assert done.stdout.startswith("clean: no evidence")
    strict("scan").validate(json.loads((tmp_path / "a.json").read_text()))
    sarif().validate(json.loads((tmp_path / "a.sarif").read_text()))
    out: Result = run("solve", "clean.npz", "--out", tmp_path / "s.json")  # type: ignore[operator]
    assert out.exit_code == 0
    strict("solve").validate(json.loads((tmp_path / "s.json").read_text()))


def test_a_schema_is_printed(run: object) -> None:
    done: Result = run("schema", "scan")  # type: ignore[operator]
    assert json.loads(done.stdout)["$id"] == "urn:tacfast:scan:1"


def many(classes: int = 1000) -> ScanReport:
    rng = np.random.default_rng(0)
    report = tacfast.scan_head(rng.normal(size=(12, 9)), None, rng.normal(size=(90, 9)))
    norms = np.exp(rng.normal(size=classes)) * 1e-7
    suspects = tuple(Suspect(int(k), 1e-12, float(norms[k])) for k in np.argsort(norms)[:4])
    columns = {name: np.full(classes, -0.123456) for name in ("alignment", "spread")}
    status = np.full(classes, "solved")
    return replace(report, verdict="backdoored", kind="multi-target", norms=norms, status=status, suspects=suspects, **columns)


def seen(show: object, what: object, width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    for name in ("out", "answer"):
        monkeypatch.setattr(terminal, name, console)
    show(what)  # type: ignore[operator]
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_tables_fit_and_no_figure_is_cut(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, report = np.random.default_rng(0), many()
    w, z = rng.normal(size=(12, 9)), rng.normal(size=(90, 9))
    state = State(0.98765, 0.5, 0.75, 0.87654, 0.25, report.norms)
    targets = tuple(range(300, 600))
    repaired = RepairResult(None, "unlearn", targets, state, state, 90, False, {}, {"unlearn": 123.4})
    shows = [
        (terminal.show_scan, report, [f"{v:.4g}" for v in np.sort(report.norms)[:10]]),
        (terminal.show_repair, repaired, ["98.8%", "87.7%", "300", "290 more", f"{report.norms[309]:.4g}"]),
        (terminal.show_solutions, tacfast.solve(w, None, z), [f"{v:.4g}" for v in np.sort(tacfast.solve(w, None, z).norms)[:10]]),
        (terminal.show_bench, bench.run(w, None, z, repeats=1, threads=1), ["whole", "GEMMs"]),
    ]
    for show, what, figures in shows:
        lines = seen(show, what, width, monkeypatch)
        text = "\n".join(lines)
        # Sentences wrap as the terminal likes; tables do not.
        table = [line for line in lines if line[:1] in "┏┃┡│└"]
        assert table
        assert max(map(len, table)) <= width
        assert len({len(line) for line in table}) == 1
        assert "…" not in text
        assert not [figure for figure in figures if figure not in text]
        assert text.count(", ") < 60


def test_what_was_tried_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    state = State(0.98765, 0.5, 0.75, 0.87654, 0.25, many().norms)
    trials = (Trial(0.03, 0.975, 0.25, 0.234), Trial(0.01, 0.985, None, None))
    repaired = RepairResult(None, "auto", (3,), state, state, 90, False, {"lr": 0.01}, {"auto": 123.4}, trials)
    lines = [line.strip() for line in seen(terminal.show_repair, repaired, 120, monkeypatch) if "tried" in line]
    assert lines == ["tried lr 0.03: clean accuracy 97.5%, reached 25.0%, drift 0.23", "tried lr 0.01: clean accuracy 98.5% (taken)"]


@pytest.mark.parametrize(("after", "forgotten"), [(0.0026, False), (0.0003, False), (0.00025, True), (0.0, True), (None, False)])
def test_a_class_that_is_hardly_named_any_more_is_warned_of(
    after: float | None, forgotten: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = State(0.98765, None, 0.75, 0.87654, 0.25, many().norms, 0.0026)
    repaired = RepairResult(None, "auto", (3,), before, replace(before, target_probability=after), 90, False, {}, {})
    said = "\n".join(seen(terminal.show_repair, repaired, 120, monkeypatch))
    assert repaired.forgotten is forgotten
    assert ("hardly names the target" in capsys.readouterr().err) is forgotten
    assert ("mean probability of the target class" in said) is (after is not None)


def test_a_terminal_of_80_columns_shows_all_of_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [line for line in seen(terminal.show_scan, many(), 80, monkeypatch) if "too narrow" in line]
    assert "too narrow for: spread, alignment" in "\n".join(seen(terminal.show_scan, many(), 40, monkeypatch))


def on_a_terminal(place: Path, *words: str, script: str = "", **environment: str) -> tuple[int, bytes]:
    """Exit code and everything that a terminal of 40 columns is sent."""
    main, terminal_end = pty.openpty()
    code = f"import sys; sys.argv[0] = 'tacfast'; {script}\nfrom tacfast.cli import main; main()"
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    env |= {"TERM": "xterm-256color", "COLUMNS": "40", **environment}
    command = [sys.executable, "-c", code, *words]
    child = subprocess.Popen(command, cwd=place, env=env, stdin=terminal_end, stdout=terminal_end, stderr=terminal_end)
    os.close(terminal_end)
    sent = b""
    with contextlib.suppress(OSError):  # the other end is gone
        while part := os.read(main, 65536):
            sent += part
    os.close(main)
    return child.wait(timeout=60), sent


SLOW = """
import tacfast, time; s = sys.modules["tacfast.scan"]; solve = s.solve
def slow(*a, progress=None, **k):
    for i in range(4):
        if progress: progress(5 * i, 20)
        time.sleep(0.15)
    return solve(*a, progress=progress, **k)
s.solve = slow
"""


def test_on_a_terminal_there_are_colours_and_a_bar_with_the_time_left(place: Path) -> None:
    code, sent = on_a_terminal(place, "scan", "clean.npz", script=SLOW)
    assert code == 0
    assert b"\x1b[" in sent
    bar = [line for line in re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", sent).decode().split("\r") if line.startswith("solving")]
    assert any(re.search(r"75%\s+\d\d:\d\d\s+left", line) for line in bar), bar
    assert max(map(len, bar)) <= 41


@pytest.mark.parametrize(("words", "environment"), [(["--no-color"], {}), ([], {"NO_COLOR": "1"})])
def test_without_colours_there_is_not_one_escape_code(words: list[str], environment: dict[str, str], place: Path) -> None:
    code, sent = on_a_terminal(place, "scan", "backdoored.npz", *words, script=SLOW, **environment)
    assert code == 1
    assert b"\x1b" not in sent
    assert b"backdoored: " in sent


def test_an_interruption_is_one_line_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time, os, signal; import tacfast.cli as c; sys.argv = ['tacfast', 'scan', 'clean.npz', '--json', sys.argv[1]]\n"
        # A shell's background jobs ignore the signal, and so would their children.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "c.scan_head = lambda *a, **k: (print('working', file=sys.stderr, flush=True), time.sleep(30))\nc.main()"
    )
    command = [sys.executable, "-c", script, tmp_path / "scan.json"]
    child = subprocess.Popen(command, cwd=place, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stderr is not None
    assert child.stderr.readline() == "working\n"
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=20)
    assert (child.returncode, output, errors) == (130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["", "demo", "solve", "scan", "repair", "bench", "schema", "doctor"])
def test_help_has_examples_that_parse_and_the_exit_codes(command: str, run: object) -> None:
    done: Result = run(*command.split(), "--help")  # type: ignore[operator]
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.stdout).split())
    assert "Exit codes: 0 " in words
    lines = re.findall(
        r"tacfast (?:demo|scan|solve|repair|bench|schema|doctor)[^#]*", words.partition("Examples")[2].partition("Exit codes")[0]
    )
    assert lines
    assert "2 error" in words or "2 one failed" in words
    for line in lines:
        name, *rest = line.split()[1:]
        known = " ".join(run(name, "--help").stdout.split())  # type: ignore[operator]
        assert all(option in known for option in rest if option.startswith("-"))
