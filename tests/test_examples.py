"""One law: the examples do what they say, on small models, and the workflow's commands are the ones that are tested."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from belongings import programs
from problems import head_with_a_shortcut
from tacfast.report import ScanReport

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns of the input, which have tests of their own, take most of a minute for a torchvision model on one thread."""
    monkeypatch.setattr(sys.modules["tacfast.scan"], "PATTERN_SECONDS", 0)


def run(example: str, *arguments: object) -> int:
    """In this process, where torch is there already."""
    before, sys.argv = sys.argv, [example, *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    finally:
        sys.argv = before
    return int(ended.value.code or 0)


def test_a_torchvision_model_is_scanned(belongings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = belongings / "shufflenet.pth", belongings / "clean_images"
    code = run("scan_torchvision.py", model, data, "--arch", "shufflenet_v2_x0_5", "--json", tmp_path / "scan.json")
    report = ScanReport.from_json(tmp_path / "scan.json")
    assert code == {"clean": 0, "backdoored": 1, "inconclusive": 3}[report.verdict]
    assert report.clean_accuracy is not None
    assert report.clean_accuracy > 0.6
    assert report.reason in capsys.readouterr().out


def test_a_repaired_model_is_written_and_read_again(belongings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "repaired.safetensors"
    given = belongings / "shufflenet.pth", belongings / "clean_images", out, "--arch", "torchvision:shufflenet_v2_x0_5"
    assert run("repair_and_export.py", *given, "--target", 3, "--method", "head", "--loss", 1) == 0
    assert "gives the same logits" in capsys.readouterr().out
    assert out.is_file()


@pytest.fixture
def audited(belongings: Path, tmp_path: Path) -> Path:
    """A repository as the workflow expects it, with two heads: one has a shortcut, one has not."""
    shutil.copy(EXAMPLES / "audit" / "audit.py", tmp_path)
    (tmp_path / "clean_images").symlink_to(belongings / "clean_images")
    (tmp_path / "models").mkdir()
    (tmp_path / "audit.json").write_text(json.dumps({"clean.npz": "--alpha 0.01"}))
    w, z, _ = head_with_a_shortcut(np.random.default_rng(0))
    np.savez(tmp_path / "models" / "flagged.npz", W=w, Z=z)
    w[3, -1] = 0
    np.savez(tmp_path / "models" / "clean.npz", W=w, Z=z)
    return tmp_path


def workflow_step(name: str) -> str:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((EXAMPLES / "audit" / "audit.yml").read_text())
    assert set(workflow) == {"name", True, "permissions", "jobs"}  # YAML reads `on` as true
    (step,) = [s for s in workflow["jobs"]["audit"]["steps"] if s.get("name") == name]
    command: str = step["run"]
    return command


def audit(place: Path) -> tuple[int, dict[str, list[str]]]:
    """The workflow's own line; exit code and the table's rows."""
    path = f"{programs(place / 'programs')}:/usr/bin:/bin"
    summary = place / "summary.md"
    summary.unlink(missing_ok=True)
    environment = {"PATH": path, "GITHUB_STEP_SUMMARY": str(summary), "PYTHONPATH": ":".join(sys.path)}
    ended = subprocess.run(["bash", "-e", "-c", workflow_step("audit")], cwd=place, env=environment, capture_output=True, text=True)
    rows = [line.strip("| ").split(" | ") for line in summary.read_text().splitlines()[2:]]
    return ended.returncode, {row[0]: row[1:] for row in rows}


def test_a_folder_is_audited_by_the_workflows_line(audited: Path) -> None:
    code, rows = audit(audited)
    assert code == 1
    assert (rows["clean.npz"][0], rows["flagged.npz"][0], rows["flagged.npz"][2]) == ("clean", "backdoored", "3")
    assert bool(ScanReport.from_json(audited / "reports" / "flagged.npz.json"))
    assert ScanReport.from_json(audited / "reports" / "clean.npz.json").alpha == 0.01
    (audited / "models" / "flagged.npz").unlink()
    assert audit(audited)[0] == 0


def test_what_cannot_be_scanned_is_not_passed_over(audited: Path) -> None:
    (audited / "models" / "flagged.npz").unlink()
    (audited / "models" / "no|te.txt").write_text("not a model")
    (audited / "models" / "damaged.npz").write_bytes(b"PK\x03\x04")
    code, rows = audit(audited)
    assert code == 2
    assert {name for name, row in rows.items() if "error" in row[0]} == {"no te.txt", "damaged.npz"}


def test_the_workflow_installs_extras_that_exist() -> None:
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = workflow_step("install").partition("[")[2].partition("]")[0].split(",")
    assert set(asked) <= set(extras)
