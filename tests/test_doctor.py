"""One law: the doctor says what is here and whether the solver is right, sees a solver that is wrong, and gives nobody away."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from schemas import strict
from tacfast import doctor, selftest
from tacfast.cli import app
from tacfast.solver import TacSolutions, solve


@pytest.fixture(scope="module")
def found() -> doctor.Diagnosis:
    return doctor.diagnose()


def test_all_is_well_here(found: doctor.Diagnosis) -> None:
    assert [check.name for check in found.checks if check.ok is not True] == []
    assert found.ok
    assert sum(check.seconds for check in found.checks) < 10
    assert found.packages["numpy"] == np.__version__
    assert found.machine["solver threads"] == len(os.sched_getaffinity(0))
    strict("doctor").validate(json.loads(json.dumps(found.to_dict(), allow_nan=False)))


def test_it_names_no_path_host_or_user(found: doctor.Diagnosis) -> None:
    text = json.dumps(found.to_dict())
    secrets = {str(Path.home()), str(Path.cwd()), sys.prefix, platform.node(), os.environ.get("USER", "")} - {"", "/"}
    assert not [secret for secret in secrets if secret in text]


def wrong(shift: float, **columns: object) -> object:
    def solver(*arguments: object, **options: object) -> TacSolutions:
        right = solve(*arguments, **options)  # type: ignore[arg-type]
        off = 1 + shift * (options.get("engine") != "clarabel") * (options.get("threads") != 1)
        return replace(right, norms=right.norms * off, perturbations=right.perturbations * off, **columns)  # type: ignore[arg-type]

    return solver


def test_a_solver_that_is_slightly_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "solve", wrong(1e-7))
    checks = {check.name: check for check in map(selftest.run, selftest.CHECKS)}
    seen = {name for name, check in checks.items() if check.ok is False}
    assert seen >= {
        "two classes, closed form",
        "orthonormal weights, closed form",
        "our kernel and Clarabel agree",
        "certificates, recomputed",
        "any number of threads",
        "pairs",
    }


def test_a_missed_proof_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "solve", wrong(0.0, status=np.full(8, "solved")))
    assert selftest.run(("proof", selftest.unreachable)).ok is False


def test_a_check_that_breaks_fails_without_other_peoples_words() -> None:
    def broken() -> tuple[bool, str]:
        raise OSError("/home/somebody/lib.so is missing")

    check = selftest.run(("broken", broken))
    assert (check.ok, check.figure) == (False, "OSError")


def test_a_failure_is_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (("arithmetic", lambda: (False, "1 + 1 = 3")),))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 2
    assert "failed arithmetic: 1 + 1 = 3" in done.stdout
    assert CliRunner().invoke(app, ["doctor", "-q"]).stdout.startswith("failed: arithmetic in ")


def test_without_torch_it_says_so_and_is_well() -> None:
    hidden = (
        "import sys, importlib.abc\n"
        "class Hide(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] in ('torch', 'timm'): raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "sys.argv = ['tacfast', 'doctor']\n"
        "from tacfast.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "torch not installed: pip install torch" in done.stdout
    assert "not run head of a torch model: torch is not installed: pip install torch" in done.stdout
    assert "8 checks passed" in done.stdout
