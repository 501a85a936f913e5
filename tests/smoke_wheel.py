"""Run by `make test-wheel` in an environment without torch: the installed wheel solves, from Python and from its command line."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import tacfast
from tacfast.schemas import load

for absent in ("torch", "sklearn", "PIL"):
    assert importlib.util.find_spec(absent) is None, f"{absent} is installed here: this run proves nothing"
assert "site-packages" in tacfast.__file__, tacfast.__file__
assert Path(tacfast.__file__).with_name("html").joinpath("templates", "scan.html.j2").is_file(), "the pages' templates are not in the wheel"

rng = np.random.default_rng(0)
w, z = rng.normal(size=(50, 32)), np.abs(rng.normal(size=(200, 32))).astype(np.float32)
solutions = tacfast.solve(w, None, z)
assert solutions.certified.all()
assert max(np.nanmax(solutions.verify(w, None, z)[name]) for name in ("primal", "dual", "gap")) <= 1e-9
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "head.npz")
    np.savez(file, W=w, Z=z)
    subprocess.run([sys.argv[1], "solve", file, "--out", Path(folder, "out.json")], check=True, stdout=subprocess.DEVNULL)
    assert Path(folder, "out.json").stat().st_size > 1000
assert load("scan")["$id"] == "urn:tacfast:scan:1"
subprocess.run([sys.argv[1], "doctor", "--quiet"], check=True)
print(f"wheel of tacfast {tacfast.__version__}: {solutions}, no torch in sight")
