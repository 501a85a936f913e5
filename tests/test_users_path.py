"""One law: somebody else's model, a folder of images and one line give a verdict and a report; the README's lines, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sources import CLASSES
from typer.testing import CliRunner

from schemas import strict
from tacfast.cli import app
from tacfast.report import ScanReport

pytestmark = pytest.mark.usefixtures("one_thread")
README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture
def data(belongings: Path) -> Path:
    return belongings / "clean_images"


@pytest.fixture
def vit(belongings: Path) -> Path:
    return belongings / "vit_folder"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def lines_of_readme(word: str) -> list[str]:
    return [line for line in README.splitlines() if line.startswith("tacfast scan") and word in line]


SHOWN = {
    "model.pth": "shorter side to 256, bilinear, centre crop 224 x 224",
    "vit_folder/": "32 x 32, bilinear",
    "timm_folder/": "shorter side to 35, bicubic, centre crop 32 x 32",
}


@pytest.mark.parametrize("word", SHOWN)
def test_the_line_of_the_readme(word: str, belongings: Path, tmp_path: Path) -> None:
    (line,) = lines_of_readme(word)
    words = line.partition("#")[0].split()[1:]
    given = {word: belongings / word, "clean_images/": belongings / "clean_images", "scan.json": tmp_path / "scan.json"}
    few = ("--limit", "24") if word == "model.pth" else ()  # images of 224 x 224 take their time
    code, output = run(*(given.get(w, w) for w in words), "--json", tmp_path / "scan.json", *few)
    assert code in (0, 1, 3), output
    assert SHOWN[word] in output
    assert "warning" not in output
    strict("scan").validate(json.loads((tmp_path / "scan.json").read_text()))
    report = ScanReport.from_json(tmp_path / "scan.json")
    assert report.clean_accuracy is not None
    assert report.clean_accuracy > 0.6
    assert len(report.norms) == len(CLASSES)
    assert report.file["preprocessing"]["origin"]
    assert report.file["data_sha256"]
    assert len(report.file["sha256"]) == 64


def test_a_repaired_model_of_a_folder_is_scanned_with_its_folder(vit: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "repaired.safetensors"
    _, _ = run("scan", vit, "--data", data, "--json", tmp_path / "scan.json")
    target = json.loads((tmp_path / "scan.json").read_text())["status"].index("solved")
    code, output = run("repair", vit, "--data", data, "--out", out, "--target", target, "--method", "head")
    assert code == 0, output
    code, output = run("scan", out, "--arch", vit, "--data", data)
    assert code in (0, 1, 3), output


def test_wrong_pixels_and_a_wrong_order_of_classes_are_warned_of(vit: Path, data: Path, tmp_path: Path) -> None:
    code, output = run("scan", vit, "--data", data, "--mean", "-90", "--json", tmp_path / "scan.json")
    assert code in (1, 3)
    assert "warning: accuracy on the clean images is only" in " ".join(output.split())
    assert "mean as given, else" in " ".join(output.split())
    images = np.stack([np.full((32, 32, 3), 40 * k, np.uint8) for k in range(5)])
    np.savez(tmp_path / "unknown.npz", x=images, y=np.full(5, 9))
    result: Any = CliRunner().invoke(app, ["scan", str(vit), "--data", str(tmp_path / "unknown.npz")])
    assert "labels must be classes of the model" in str(result.exception)


def test_the_order_of_folders_is_questioned(vit: Path, data: Path, tmp_path: Path) -> None:
    for k, name in enumerate(CLASSES):  # names that the model does not know, so that they count in their own order
        (tmp_path / "renamed" / f"{k}").mkdir(parents=True)
        for file in (data / name).iterdir():
            (tmp_path / "renamed" / f"{k}" / file.name).write_bytes(file.read_bytes())
    code, output = run("scan", vit, "--data", tmp_path / "renamed")
    assert code in (0, 1, 3)
    assert "in another order than the model" in " ".join(output.split())
