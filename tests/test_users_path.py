"""One law: somebody else's model, a folder of images and one line give a verdict and a report; the README's lines, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sources import CASES, CLASSES, make_images
from typer.testing import CliRunner

from schemas import strict
from tacfast.cli import app
from tacfast.report import ScanReport

pytestmark = pytest.mark.usefixtures("one_thread")
README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "clean_images"
    make_images(folder, per_class=12)
    return folder


def saved(source: str, form: str, example: str, folder: Path, data: Path) -> Path:
    for library in ("torchvision", "timm", "transformers"):
        pytest.importorskip(library)
    folder.mkdir()
    case = next(c for c in CASES if (c.source, c.format, c.example) == (source, form, example))
    return case.save(folder, data).path


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def lines_of_readme(word: str) -> list[str]:
    return [line for line in README.splitlines() if line.startswith("tacfast scan") and word in line]


PATHS = {
    "model.pth": ("torchvision", "pth", "resnet18", "shorter side to 256, bilinear, centre crop 224 x 224"),
    "vit_folder/": ("transformers", "folder", "ViT", "32 x 32, bilinear"),
    "timm_folder/": ("timm", "folder", "vit_tiny_patch16_224", "shorter side to 35, bicubic, centre crop 32 x 32"),
}


@pytest.mark.parametrize("word", PATHS)
def test_the_line_of_the_readme(word: str, data: Path, tmp_path: Path) -> None:
    source, form, example, shown = PATHS[word]
    path = saved(source, form, example, tmp_path / "saved", data)
    (line,) = lines_of_readme(word)
    words = line.partition("#")[0].split()[1:]
    given: dict[str, object] = {word: path, "clean_images/": data, "scan.json": tmp_path / "scan.json"}
    code, output = run(*(given.get(w, w) for w in words), "--json", tmp_path / "scan.json")
    assert code in (0, 1, 3), output
    assert shown in output
    assert "warning" not in output
    strict("scan").validate(json.loads((tmp_path / "scan.json").read_text()))
    report = ScanReport.from_json(tmp_path / "scan.json")
    assert report.clean_accuracy is not None
    assert report.clean_accuracy > 0.6
    assert len(report.norms) == len(CLASSES)
    assert report.file["preprocessing"]["origin"]
    assert report.file["data_sha256"]
    assert len(report.file["sha256"]) == 64


def test_a_repaired_model_of_a_folder_is_scanned_with_its_folder(data: Path, tmp_path: Path) -> None:
    path, out = saved("transformers", "folder", "ViT", tmp_path / "saved", data), tmp_path / "repaired.safetensors"
    _, _ = run("scan", path, "--data", data, "--json", tmp_path / "scan.json")
    target = json.loads((tmp_path / "scan.json").read_text())["status"].index("solved")
    code, output = run("repair", path, "--data", data, "--out", out, "--target", target, "--method", "head")
    assert code == 0, output
    code, output = run("scan", out, "--arch", path, "--data", data)
    assert code in (0, 1, 3), output


def test_wrong_pixels_and_a_wrong_order_of_classes_are_warned_of(data: Path, tmp_path: Path) -> None:
    path = saved("transformers", "folder", "ViT", tmp_path / "saved", data)
    code, output = run("scan", path, "--data", data, "--mean", "-90", "--json", tmp_path / "scan.json")
    assert code in (1, 3)
    assert "warning: accuracy on the clean images is only" in " ".join(output.split())
    assert "mean as given, else" in " ".join(output.split())
    images = np.stack([np.full((32, 32, 3), 40 * k, np.uint8) for k in range(5)])
    np.savez(tmp_path / "unknown.npz", x=images, y=np.full(5, 9))
    result: Any = CliRunner().invoke(app, ["scan", str(path), "--data", str(tmp_path / "unknown.npz")])
    assert "labels must be classes of the model" in str(result.exception)


def test_the_order_of_folders_is_questioned(data: Path, tmp_path: Path) -> None:
    path = saved("transformers", "folder", "ViT", tmp_path / "saved", data)
    for k, name in enumerate(CLASSES):  # names that the model does not know, so that they count in their own order
        (tmp_path / "renamed" / f"{k}").mkdir(parents=True)
        for file in (data / name).iterdir():
            (tmp_path / "renamed" / f"{k}" / file.name).write_bytes(file.read_bytes())
    code, output = run("scan", path, "--data", tmp_path / "renamed")
    assert code in (0, 1, 3)
    assert "in another order than the model" in " ".join(output.split())
