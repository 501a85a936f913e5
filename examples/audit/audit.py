"""Scan every model of a folder: a JSON report each, a table of all in Markdown on standard output, the worst verdict as exit code.

    python audit.py models/ --data clean_images/ --options audit.json --out reports/

A model is a file (.pth, .pt, .safetensors, .npz) or a folder with a config.json in `models/`. `audit.json` holds what each of them needs
besides, as on the command line: {"model.pth": "--arch torchvision:resnet18 --size 32"}; with `--data` among it a model has images of its
own. That file is yours, not the models' author's: it may name code that is run. What is no model is an error, so that none is passed over.

Exit codes, the worst first: 1 some model is flagged, 2 one could not be scanned, 3 one is inconclusive, 0 no evidence in any.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

SEVERITY = (1, 2, 3, 0)
SUFFIXES = {".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".npz"}


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("models", type=Path)
    options.add_argument("--data", type=Path, required=True, help="clean images for all models that bring none")
    options.add_argument("--options", type=Path, help="JSON: options by name of the model")
    options.add_argument("--out", type=Path, default=Path("reports"), help="folder for the reports")
    options.add_argument("--timeout", type=float, default=3600, help="seconds a model")
    given = options.parse_args()

    more = {} if given.options is None else json.loads(given.options.read_text())
    models = sorted(path for path in given.models.iterdir() if not path.name.startswith("."))
    if not models:
        print(f"no models in {given.models}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    print("| model | verdict | p | suspects | why |\n|---|---|---|---|---|")
    codes = []
    for model in models:
        report = given.out / f"{model.name}.json"
        code, why = scan(model, given.data, shlex.split(more.get(model.name, "")), report, given.timeout)
        codes.append(code)
        print(row(model.name, report if code != 2 else None, why), flush=True)
    return min(codes, key=SEVERITY.index)


def scan(model: Path, data: Path, options: list[str], report: Path, timeout: float) -> tuple[int, str]:
    """Exit code and last words of one scan, in a process of its own: one model that takes all memory does not stop the others."""
    if not (model.suffix in SUFFIXES or (model / "config.json").is_file()):
        return 2, "neither a checkpoint nor a model folder"
    report.unlink(missing_ok=True)  # of an earlier run
    images = [] if model.suffix == ".npz" or "--data" in options else ["--data", str(data)]
    command = [sys.executable, "-m", "tacfast", "scan", str(model), *images, *options, "--json", str(report)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return 2, f"not done after {timeout:g} s"
    sys.stderr.write(ended.stderr)
    known = ended.returncode in SEVERITY and (ended.returncode == 2 or report.is_file())
    last = ended.stderr.strip().splitlines()[-1:] or [f"ended with exit code {ended.returncode}"]
    return (ended.returncode, last[0]) if known else (2, last[0])


def row(name: str, report: Path | None, why: str) -> str:
    """A line of the table; names and reasons come from strangers' files."""
    if report is None:
        cells = [name, "**error**", "", "", why]
    else:
        told = json.loads(report.read_text())
        p = "" if told["p_value"] is None else f"{told['p_value']:.2g}"
        cells = [name, told["verdict"], p, ", ".join(str(s["class"]) for s in told["suspects"]), told["reason"]]
    return f"| {' | '.join(''.join(c if c.isalnum() or c in ' .,:;()=-+_*/%' else ' ' for c in cell) for cell in cells)} |"


if __name__ == "__main__":
    sys.exit(main())
