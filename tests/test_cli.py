"""One law: the command line answers with its exit code, one line per error, and JSON that says where it came from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import tacfast
from schemas import strict
from tacfast.checkpoints import load_weights, read_weights
from tacfast.cli import _with_doubt
from tacfast.preprocessing import of_metadata
from tacfast.sources import Doubt, load_model

FACTORY = """
from torch import nn
def make(classes=6):
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, int(classes)))
"""


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "tacfast", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with heads, a model, its architecture and its data."""
    place = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    w, y = np.eye(20, 64) + rng.normal(size=(20, 64)) * 0.1, np.arange(400) % 20
    z = 3 * np.eye(20, 64)[y] + np.abs(rng.normal(size=(400, 64))) * 0.1
    z[:, -1] = 0
    np.savez(place / "clean.npz", W=w, b=np.zeros(20), Z=z, y=y)
    w[3, -1] = 5
    np.savez(place / "backdoored.npz", W=w, Z=z.astype(np.float32))
    np.savez(place / "three.npz", W=w[:3], Z=z)
    np.savez(place / "data.npz", x=rng.integers(0, 256, size=(80, 12, 12, 3), dtype=np.uint8), y=np.arange(80) % 6)
    (place / "arch.py").write_text(FACTORY)
    (place / "folder.json").mkdir()
    np.savez(place / "hostile.npz", **{"\x1b[2J\nerror: [red]": np.eye(3)})
    torch.manual_seed(0)
    # Spread the logits so that no class is predicted for every image.
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 6))
    save_file(model.state_dict(), place / "model.safetensors")
    torch.save({"state_dict": model.state_dict()}, place / "model.pth")
    return place


def model_options(place: Path) -> list[str]:
    return ["--arch", "arch.py:make", "--arch-arg", "classes=6", "--data", "data.npz", "--mean", "0.5,0.5,0.5", "--std", "0.25"]


@pytest.mark.parametrize(
    ("file", "code", "verdict"), [("clean", 0, "clean"), ("backdoored", 1, "backdoored"), ("three", 3, "inconclusive")]
)
def test_the_exit_code_is_the_verdict(file: str, code: int, verdict: str, place: Path, tmp_path: Path) -> None:
    done = run("scan", f"{file}.npz", "--json", tmp_path / "scan.json", cwd=place)
    assert done.returncode == code, done.stderr
    assert done.stdout.startswith(verdict)
    assert ("of the samples there" in done.stdout) == (code == 1)
    report = json.loads((tmp_path / "scan.json").read_text())
    strict("scan").validate(report)
    assert report["verdict"] == verdict
    assert report["file"]["sha256"] == hashlib.sha256((place / f"{file}.npz").read_bytes()).hexdigest()
    assert (report["clean_accuracy"] is not None) == (file == "clean")
    assert [s["class"] for s in report["suspects"]] == ([3] if code == 1 else [])


@pytest.mark.parametrize("file", ["model.safetensors", "model.pth"])
def test_scan_then_repair_a_checkpoint(file: str, place: Path, tmp_path: Path) -> None:
    scan = run("scan", file, *model_options(place), "--limit", 60, "--json", tmp_path / "scan.json", cwd=place)
    assert scan.returncode in (0, 1, 3), scan.stderr
    report = json.loads((tmp_path / "scan.json").read_text())
    strict("scan").validate(report)
    assert report["samples"] == 60
    assert report["head"]["name"] == "4"
    assert set(report["file"]) == {"model", "sha256", "arch", "arch_args", "data", "data_sha256", "preprocessing", "notes"}
    # Labels at random: no accuracy, so no clean bill.
    assert report["verdict"] != "clean"
    assert "a verdict on such data means little" in report["file"]["notes"][-1]
    options = ["--out", tmp_path / "no.safetensors", "--report", tmp_path / "scan.json"]
    other = run("repair", file, *model_options(place), "--size", 8, *options, cwd=place)
    assert other.returncode == 2
    assert "the report was made with no --size; this run has --size 8: give the same options" in other.stderr
    report["suspects"] = []
    (tmp_path / "scan.json").write_text(json.dumps(report))
    nothing = run(
        "repair", file, *model_options(place), "--out", tmp_path / "no.safetensors", "--report", tmp_path / "scan.json", cwd=place
    )
    assert nothing.returncode == 0, nothing.stderr
    assert "nothing to do" in nothing.stdout
    assert "--target K" in nothing.stdout
    assert not (tmp_path / "no.safetensors").exists()


def test_a_model_that_was_shown_what_it_does_not_know_is_not_judged(place: Path) -> None:
    heads = {name: np.load(place / f"{name}.npz") for name in ("clean", "backdoored")}
    clean, flagged = (tacfast.scan_head(head["W"], None, head["Z"], file={"notes": ["before"]}) for head in heads.values())
    assert (clean.verdict, flagged.verdict) == ("clean", "backdoored")
    for report in (clean, flagged):
        hedged = _with_doubt(report, Doubt("wrong pixels", grave=True))
        assert (hedged.verdict, hedged.reason, hedged.suspects) == ("inconclusive", "wrong pixels", ())
        assert hedged.file["notes"] == ["before", "wrong pixels"]
    assert _with_doubt(flagged, Doubt("another order", grave=False)).verdict == "backdoored"
    assert _with_doubt(clean, Doubt("another order", grave=False)).verdict == "clean"
    assert _with_doubt(clean, None) is clean


def test_repair_writes_weights_that_fit(place: Path, tmp_path: Path) -> None:
    # A class that some sample is not sent to already, so that it has a shift.
    target = _reachable(place)
    out = tmp_path / "fixed.safetensors"
    done = run("repair", "model.safetensors", *model_options(place), "--out", out, "--target", target, "--method", "head",
               "--json", tmp_path / "repair.json", cwd=place)  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 6))
    load_weights(model, read_weights(out).tensors)
    with safe_open(out, "np") as file:
        told = file.metadata()
    assert told["arch"] == "arch.py:make"
    noted = of_metadata(told)
    assert noted is not None
    assert (noted.mean, noted.std) == ((0.5,) * 3, (0.25,))
    # Whoever scans it next needs no flags for the images.
    assert load_model(out, f"{place / 'arch.py'}:make", {"classes": 6}).expected() == noted
    assert json.loads(told["tacfast"])["targets"] == [target]
    result = json.loads((tmp_path / "repair.json").read_text())
    strict("repair").validate(result)
    assert (result["repaired"], result["targets"], result["method"]) == (True, [target], "head")


def _reachable(place: Path) -> int:
    state = read_weights(place / "model.safetensors").tensors
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 6))
    model.load_state_dict(state)
    x = (np.load(place / "data.npz")["x"].astype(np.float32) / 255 - 0.5) / 0.25
    report = tacfast.scan(model, [torch.from_numpy(x.transpose(0, 3, 1, 2))])
    return int(np.flatnonzero(report.status == "solved")[0])


def test_a_report_on_another_file_is_refused(place: Path, tmp_path: Path) -> None:
    run("scan", "model.pth", *model_options(place), "--json", tmp_path / "scan.json", cwd=place)
    done = run(
        "repair",
        "model.safetensors",
        *model_options(place),
        "--out",
        tmp_path / "x.safetensors",
        "--report",
        tmp_path / "scan.json",
        cwd=place,
    )
    assert done.returncode == 2
    assert "another file" in done.stderr


def test_solve_writes_json_and_npz(place: Path, tmp_path: Path) -> None:
    for suffix in ("json", "npz"):
        done = run("solve", "clean.npz", "--out", tmp_path / f"s.{suffix}", "--threads", 1, cwd=place)
        assert done.returncode == 0, done.stderr
        assert "20 solved" in done.stdout
    data = json.loads((tmp_path / "s.json").read_text())
    arrays = np.load(tmp_path / "s.npz")
    strict("solve").validate(data)
    # Every array can be read: nothing was pickled.
    assert all(arrays[name].ndim <= 2 for name in arrays.files)
    assert set(data["stage_seconds"]) == {name.removeprefix("seconds_") for name in arrays.files if name.startswith("seconds_")}
    np.testing.assert_allclose(arrays["norms"], data["norms"])
    assert max(data["primal_residual"]) <= 1e-9


ERRORS = {
    "no such file": ["scan", "missing.npz"],
    "not an archive": ["scan", "arch.py", "--arch", "arch.py:make", "--data", "data.npz"],
    "no arch": ["scan", "model.pth", "--data", "data.npz"],
    "no data": ["scan", "model.pth", "--arch", "arch.py:make"],
    "bad arch-arg": ["scan", "model.pth", "--arch", "arch.py:make", "--data", "data.npz", "--arch-arg", "classes"],
    "wrong class count": ["scan", "model.pth", "--arch", "arch.py:make", "--data", "data.npz", "--arch-arg", "classes=9"],
    "bad mean": ["scan", "model.pth", "--arch", "arch.py:make", "--data", "data.npz", "--mean", "a,b"],
    "zero std": ["scan", "model.pth", "--arch", "arch.py:make", "--data", "data.npz", "--std", "0"],
    "head without W": ["scan", "data.npz"],
    "bad quantile": ["solve", "clean.npz", "--quantile", "2"],
    "bad output": ["solve", "clean.npz", "--out", "x.txt"],
    "unwritable output": ["solve", "clean.npz", "--out", "nowhere/x.json"],
    "bad option": ["scan", "clean.npz", "--nonsense"],
    "bad engine": ["solve", "clean.npz", "--engine", "simplex"],
    "arch with an npz": ["scan", "clean.npz", "--arch", "arch.py:make"],
    "repair of an npz": ["repair", "clean.npz", "--out", "x.safetensors"],
    "output is a folder": ["solve", "clean.npz", "--out", "folder.json"],
    "hostile names": ["scan", "hostile.npz"],
    "repair to pth": ["repair", "model.pth", "--arch", "arch.py:make", "--data", "data.npz", "--out", "x.pth"],
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors_are_one_line_and_exit_code_2(what: str, place: Path) -> None:
    done = run(*ERRORS[what], cwd=place)
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stderr
    if what not in ("bad option", "bad engine"):
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.strip().isprintable()
        # What would be right, or what to do next.
        assert re.search(r" must |needed|; | holds no |of no use|\. [A-Z]", done.stderr), done.stderr


def test_a_closed_pipe_does_not_change_the_verdict(place: Path) -> None:
    script = f"{sys.executable} -m tacfast scan clean.npz | true; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", script], cwd=place, check=False).returncode == 0


def test_debug_shows_the_traceback(place: Path) -> None:
    done = run("scan", "missing.npz", "--debug", cwd=place)
    assert "Traceback" in done.stderr
    assert "CheckpointError" in done.stderr


def test_version_and_help(place: Path) -> None:
    assert run("--version", cwd=place).stdout.strip() == tacfast.__version__
    for command in ("demo", "solve", "scan", "repair", "bench", "doctor", "schema"):
        done = run(command, "--help", cwd=place)
        assert done.returncode == 0
        assert "Usage" in done.stdout


@pytest.mark.parametrize(
    "code", ["import tacfast", "import tacfast.cli", "import tacfast, numpy as np; tacfast.scan_head(np.eye(5), None, np.eye(5))"]
)
def test_torch_stays_unloaded_where_it_is_not_needed(code: str, place: Path) -> None:
    check = f"import sys; {code}; assert not [m for m in ('torch', 'sklearn', 'scipy', 'PIL') if m in sys.modules]"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=place)


def test_solving_from_the_command_line_needs_no_torch(place: Path) -> None:
    hidden = "import sys; sys.modules['torch'] = None; sys.argv = ['tacfast', 'solve', 'clean.npz']; from tacfast.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", hidden], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
