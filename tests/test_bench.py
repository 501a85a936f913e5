"""One law: the benchmark that users get times what it says it does, and tells what ran. No test looks at seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tacfast
from schemas import strict
from tacfast import bench

SIZE = {"classes": 7, "dim": 5, "samples": 30}


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    # torch hidden: this command must not need it.
    hidden = "import sys; sys.modules['torch'] = None; sys.argv[0] = 'tacfast'; from tacfast.cli import main; main()"
    command = [sys.executable, "-c", hidden, "bench", *map(str, arguments)]
    env = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_a_synthetic_head_is_the_same_for_the_same_seed() -> None:
    w, b, z = bench.synthetic_head(7, 5, 30)
    again = bench.synthetic_head(7, 5, 30)
    assert (w.shape, b.shape, z.shape) == ((7, 5), (7,), (30, 5))
    assert {a.dtype for a in (w, b, z)} == {np.dtype(np.float32)}
    assert z.min() == 0
    assert all(np.array_equal(x, y) for x, y in zip((w, b, z), again, strict=True))
    assert not np.array_equal(w, bench.synthetic_head(7, 5, 30, seed=1)[0])


def test_the_result_counts_every_class_and_its_ratio_is_that_of_its_times() -> None:
    w, b, z = bench.synthetic_head(**SIZE)
    result = bench.run(w, b, z, threads=1, repeats=2, engine="active-set")
    statuses = tacfast.solve(w, b, z, engine="active-set").status.tolist()
    assert result.status == {s: statuses.count(s) for s in set(statuses)}
    assert (result.classes, result.dim, result.samples) == tuple(SIZE.values())
    assert (result.threads, result.repeats) == (1, 2)
    assert result.gemm_threads in (1, None)
    assert set(result.stage_s) == {"logits", "gram", "collapse", "qp"}
    assert result.ratio == result.solve_s / result.gemm_s
    assert json.loads(json.dumps(result.to_dict()))["ms_per_class"] == result.ms_per_class


def test_malformed_input_is_refused_before_anything_is_timed() -> None:
    w, b, z = bench.synthetic_head(**SIZE)
    with pytest.raises(tacfast.ProblemError, match="latents"):
        bench.run(w, b, z[:, 1:])
    with pytest.raises(tacfast.ProblemError, match="repeats"):
        bench.run(w, b, z, repeats=0)


def test_the_command_times_a_head_or_a_synthetic_one(tmp_path: Path) -> None:
    w, b, z = bench.synthetic_head(**SIZE)
    np.savez(tmp_path / "head.npz", W=w, b=b, Z=z)
    sizes = [word for name, value in SIZE.items() for word in (f"--{name}", value)]
    for arguments in (["head.npz"], sizes):
        done = run(*arguments, "--threads", 1, "--repeats", 1, "--json", "bench.json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "whole solve" in done.stdout
        report = json.loads((tmp_path / "bench.json").read_text())
        strict("bench").validate(report)
        assert {name: report[name] for name in SIZE} == SIZE
        assert sum(report["status"].values()) == SIZE["classes"]


def test_a_missing_head_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run("missing.npz", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
