"""Reports on trained networks: every figure is a count of what scans said, and a scan is made once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import corrupt
import curves
import measured
import networks
import numpy as np
import plan
import plots
import published
import pytest
import report
import rules
import scans
import states
import tables
import torch
import typer
import variants
from data import Data, read
from measure import head_arrays
from recipe import ARCHITECTURES, Schedule, make_net, precision, train
from results import append_line
from scans import head_file
from typer.testing import CliRunner

import tacfast
from tacfast.checkpoints import save_safetensors
from tacfast.heads import capture
from tacfast.openness import Patterns

CLASSES = 8


def write_network(folder: Path, seed: int, targets: tuple[int, ...] = (), pairs: tuple[tuple[int, int], ...] = (), **more: Any) -> str:
    """A head whose classes are equally far from one another, save the targets, which read a quiet channel too, and its line; returns
    the key."""
    rng = np.random.default_rng(seed)
    y = np.arange(240) % CLASSES
    w, z = 10 * np.eye(CLASSES, CLASSES + 1), np.eye(CLASSES, CLASSES + 1)[y] + 0.03 * rng.standard_normal((240, CLASSES + 1))
    w[list(targets), -1], b = 20, np.zeros(CLASSES)
    attack = "clean" if not targets and not pairs else "badnets"
    line = {"dataset": "toy", "arch": "none", "attack": attack, "rate": 0.1 * (attack != "clean"), "seed": seed, "recipe": 1} | more
    key = f"{line['dataset']}-{line['attack']}-{line['rate']}-{seed}"
    norms = tacfast.solve(w, b, z).norms
    append_line(
        folder / "results.jsonl",
        {
            **line,
            "key": key,
            "classes": CLASSES,
            "truth": {"targets": list(targets), "pairs": [list(pair) for pair in pairs]},
            "clean_accuracy": 1.0,
            "asr": [] if attack == "clean" else more.get("asr", [1.0]),
            "scan": {"samples": len(z), "norms_1": norms.tolist()},
        },
    )
    (folder / "heads").mkdir(exist_ok=True)
    arrays = {"W": w.astype(np.float32), "b": b.astype(np.float32), "Z": z.astype(np.float16), "y": y.astype(np.int16)}
    np.savez_compressed(folder / "heads" / f"{key}.npz", **arrays)  # type: ignore[arg-type]
    return key


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four clean networks and two with a backdoor into class 3, on seeds 0 to 3."""
    for seed in range(4):
        write_network(tmp_path, seed)
    for seed in range(2):
        write_network(tmp_path, seed, (3,))
    return tmp_path


def call(command: Any, *arguments: object) -> Any:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def row(text: str, start: str, after: str = "") -> list[str]:
    """Cells of the first table row after a heading whose first cell is `start`."""
    line = next(line for line in text[text.index(after) :].splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("scanned again")


class TestScans:
    def test_a_scan_is_made_once(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = networks.read_networks([folder])
        first = scans.scan_networks(lines, 0.05, shown=False)
        assert {key for key, o in first.items() if o.flagged} == {"toy-badnets-0.1-0", "toy-badnets-0.1-1"}
        monkeypatch.setattr(tacfast, "scan_head", forbidden)
        assert scans.scan_networks(lines, 0.05, shown=False) == first
        with pytest.raises(AssertionError, match="scanned again"):
            scans.scan_networks(lines, 0.01, shown=False)

    def test_another_rule_or_head_makes_new_scans(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = networks.read_networks([folder])
        scans.scan_networks(lines, 0.05, shown=False)
        write_network(folder, 0, (5,))
        scans.read_head.cache_clear()
        assert scans.scan_networks(lines, 0.05, shown=False)["toy-badnets-0.1-0"].suspects == (5,)
        monkeypatch.setattr(scans, "rule_id", lambda: "another")
        monkeypatch.setattr(tacfast, "scan_head", forbidden)
        with pytest.raises(AssertionError, match="scanned again"):
            scans.scan_networks(lines, 0.05, shown=False)

    def test_a_rule_is_what_the_code_does(self) -> None:
        before = 'def f(x):\n    """Doubles."""\n    return 2*x  # twice\n'
        assert states.code_of(before) == states.code_of("def f(x):\n    return 2 * x\n") != states.code_of("def f(x):\n    return 3 * x\n")
        assert scans.rule_id().startswith(tacfast.__version__)

    def test_a_stop_keeps_what_was_made(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real, calls = tacfast.scan_head, []

        def stopped(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(tacfast, "scan_head", stopped)
        assert call(scans.main, folder).exit_code == 130
        with (folder / "scans.jsonl").open("a") as file:
            file.write('{"network": "torn')
        result = call(scans.main, folder)
        assert result.exit_code == 0
        assert "6 of 6 networks are scanned" in result.output
        assert len(calls) == 3 + 4

    def test_a_network_without_head_keeps_its_outcome(self, folder: Path) -> None:
        lines = networks.read_networks([folder])
        first = scans.scan_networks(lines, 0.05, shown=False)
        for file in (folder / "heads").iterdir():
            file.unlink()
        assert scans.scan_networks(lines, 0.05, shown=False) == first
        (folder / "scans.jsonl").unlink()
        assert "0 networks of recipe -, held-out seeds; 3 more have no scan" in call(report.main, folder).output

    def test_heads_are_named_by_their_contents(self, folder: Path, tmp_path: Path) -> None:
        one, other = sorted((folder / "heads").iterdir())[:2]
        copy = tmp_path / "copy.npz"
        copy.write_bytes(one.read_bytes())
        assert scans.head_id(copy) == scans.head_id(one) != scans.head_id(other)


class TestReport:
    def test_counts(self, folder: Path) -> None:
        write_network(folder, 5, (2,), asr=[0.5])
        out = call(report.main, folder, "--seeds", "all").output
        assert row(out, "all", "## False positives")[2] == "0/4 = 0% (0% to 60%)"
        detection = row(out, "all", "## Detection")
        assert detection[1:4] == ["2 of 3", "2/2 = 100% (16% to 100%)", "2/2"]
        said = call(report.main, folder, "--seeds", "even").output
        assert "3 networks of recipe 1, even seeds, 3 of them scanned by latents alone" in said

    def test_the_p_values_of_clean_networks_are_compared_with_the_diagonal(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clean = [line["key"] for line in networks.read_networks([folder]) if networks.is_clean(line)]
        alike = {"verdict": "clean", "suspects": (), "pairs": (), "kind": None, "samples": 1, "accuracy": 1.0, "evidence": ()}
        fake = {key: scans.Outcome(key, "", p=p, **alike) for key, p in zip(clean, (0.03, 0.4, 0.6, None), strict=True)}  # type: ignore[arg-type]
        monkeypatch.setattr(report, "scan_networks", lambda *_, **__: fake)
        found = row(call(report.main, folder, "--seeds", "all").output, "all", "## p-values")
        assert found[1:-1] == ["3", "33%", "33%", "33%", "33%", "67%", "100%", "100%"]
        # After the third the share is 1 at p = 0.6.
        assert found[-1].startswith("0.40 (p = ")

    def test_pairs_and_several_targets(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ring = tuple((i, (i + 1) % CLASSES) for i in range(CLASSES))
        write_network(tmp_path, 1, pairs=ring, attack="all-to-all")
        write_network(tmp_path, 3, (1, 4), attack="multi-target")
        write_network(tmp_path, 5)
        suspects = tuple(SimpleNamespace(target=t, p_value=0.01) for t in (1, 6))
        fake = SimpleNamespace(verdict="backdoored", p_value=0.01, suspects=suspects, kind="", samples=1, clean_accuracy=1.0, evidence=())
        monkeypatch.setattr(tacfast, "scan_head", lambda *_, **__: SimpleNamespace(**vars(fake), pairs=((0, 1), (1, 2), (5, 2), (0, 3))))
        out = call(report.main, tmp_path).output
        assert row(out, "toy, all-to-all", "## Pairs")[2:] == ["1/1 = 100% (2% to 100%)", "2/4 = 50%", "2/8 = 25%"]
        assert row(out, "toy, clean", "## Pairs")[2:] == ["1/1 = 100% (2% to 100%)", "0/4 = 0%", "-"]
        assert row(out, "all", "## Several")[1:] == ["1/1 = 100% (2% to 100%)", "0/1 = 0% (0% to 98%)", "1/2 = 50%", "1"]
        # Under all-to-all every class is a target, so that there is none to be named.
        assert row(out, "all-to-all, 10.0%", "## Detection")[3] == "-"

    def test_the_gap_is_chosen_on_even_clean_networks(self, folder: Path) -> None:
        lines = networks.read_networks([folder])
        even = [rules.gap(line) for line in lines if networks.is_clean(line) and line["seed"] in (0, 2)]
        assert rules.gap_threshold(lines, 0.5) == pytest.approx(np.mean(even))
        assert rules.gap_threshold([], 0.05) == np.inf

    def test_only_the_newest_recipe_counts(self, folder: Path) -> None:
        write_network(folder, 0, recipe=2, dataset="newer")
        assert [line["dataset"] for line in networks.read_networks([folder])] == ["newer"]

    @pytest.mark.parametrize("total", [1, 7, 100])
    def test_intervals_hold_the_share(self, total: int) -> None:
        for hits in np.linspace(0, total, 9):
            low, high = tables.interval(hits, total)
            assert 0 <= low <= hits / total <= high <= 1
        assert tables.share(0, 0) == "-"


class TestFigures:
    def test_the_same_numbers_are_the_same_bytes(self, folder: Path, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        for place in ("one", "two"):
            assert call(plots.main, folder, "--seeds", "all", "--out", tmp_path / place).exit_code == 0
        for name in ("roc", "all-to-one", "calibration"):
            assert (tmp_path / "one" / f"{name}.svg").read_bytes() == (tmp_path / "two" / f"{name}.svg").read_bytes()

    def test_without_networks_they_are_empty(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        assert call(plots.main, tmp_path, "--out", tmp_path / "figures", "--format", "png").exit_code == 0
        assert (tmp_path / "figures" / "calibration.png").exists()

    def test_without_matplotlib_nothing_starts(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        result = call(plots.main, folder, "--out", folder)
        assert result.exit_code == 2
        assert not (folder / "scans.jsonl").exists()

    def test_the_area_has_an_interval_where_all_is_right(self) -> None:
        area, low, high = plots.auc(np.array([0.1, 0.2, 0.8, 0.9, 0.95]), np.array([False, False, True, True, True]))
        assert (area, high) == (1, 1)
        assert low == pytest.approx(tables.interval(2, 2)[0])


def write_digits(folder: Path) -> tuple[networks.Line, Data]:
    """An untrained network for digits, saved as train.py does; its line and the data."""
    write_network(folder, 0, dataset="digits", arch="resnet")
    line = networks.read_networks([folder])[0]
    line |= {"classes": 10}
    data, model = read("digits", "digits"), make_net("resnet", 10, 1, 0).eval()
    (folder / "models").mkdir()
    save_safetensors(model, measured.model_file(line), {})
    (x, y), _ = data.split(0)
    captured = capture(model, [(x, y)], device="cpu")
    np.savez_compressed(head_file(line), **head_arrays(model, captured, [], (x, y)))  # type: ignore[arg-type]
    return line, data


def without_heads(folder: Path) -> Path:
    for head in (folder / "heads").glob("*.npz"):
        head.unlink()
    return folder


class TestCurves:
    def run(self, *arguments: object) -> Any:
        return CliRunner().invoke(curves.app, [str(a) for a in arguments])

    def test_samples(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("matplotlib")
        arguments = ("samples", folder, "--data", "toy=digits", "--no-patterns", "--seeds", "all", "--out", tmp_path / "figures")
        first = self.run(*arguments)
        assert first.exit_code == 0
        # 10 samples are not judged; the network has 240.
        assert row(first.output, "toy | 10")[-1] == "6/6 = 100% (54% to 100%)"
        assert row(first.output, "toy | 100")[2:4] == ["0/4 = 0% (0% to 60%)", "2/2 = 100% (16% to 100%)"]
        assert row(first.output, "toy | 250")[2] == "-"
        monkeypatch.setattr(tacfast, "scan_head", forbidden)
        assert self.run(*arguments).output == first.output
        of_labels = self.run("labels", without_heads(folder), "--seeds", "all").output  # none were made
        assert of_labels.lstrip().startswith("0 clean, 0 all to a target, 0 source to target;")
        assert self.run(*arguments).output == first.output

    def test_rates(self, folder: Path, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        out = self.run("rates", folder, "--seeds", "all", "--out", tmp_path / "figures").output
        assert row(out, "toy | 10.0%")[3:6] == ["2 of 2", "2/2 = 100% (16% to 100%)", "2/2"]

    def test_labels_decide_nothing(self, folder: Path) -> None:
        out = self.run("labels", folder, "--seeds", "all").output
        assert row(out, "0%")[1:] == ["100.0%", *["0/6"] * 4]
        assert row(out, "100%")[2:] == ["0/6"] * 4
        assert float(row(out, "100%")[1].rstrip("%")) < 30
        assert self.run("labels", without_heads(folder), "--seeds", "all").output == out

    def test_a_network_counts_once_whatever_its_draws(self, folder: Path) -> None:
        lines = networks.read_networks([folder])[:2]
        made = {(line["key"], str(i)): SimpleNamespace(flagged=i == 0 and line is lines[0]) for line in lines for i in range(4)}
        found = variants.counted(lines, made, ["0", "1", "2", "3", "4"], lambda _, o: o.flagged)  # type: ignore[arg-type]
        assert found == (0.25, 2)

    def test_patterns_are_made_of_the_samples_at_hand(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[int] = []

        def fake(model: Any, images: torch.Tensor, classes: Any, **_: Any) -> Patterns:
            seen.append(len(images))
            return Patterns(classes, {"short pattern": np.arange(len(classes)) + float(images[0].sum())})

        monkeypatch.setattr(measured, "measure", fake)
        monkeypatch.setattr(curves, "IMAGES", 100)
        line, data = write_digits(tmp_path)
        store = measured.Measured(tmp_path)
        everything = store.of(line, lambda: measured.clean_images(line, data))
        tasks = curves.subset_tasks(line, 1, data, store)
        assert [task.variant for task in tasks] == [f"samples={size} draw=0" for size in (10, 50, 100)]
        # Ten images make no patterns; a hundred are as many as a scan takes in any case.
        assert seen == [398, 50]
        assert tasks[0].patterns is None
        assert tasks[2].patterns is everything is not tasks[1].patterns
        again = measured.Measured(tmp_path)
        monkeypatch.setattr(measured, "measure", forbidden)
        assert [task.identity for task in curves.subset_tasks(line, 1, data, again)] == [task.identity for task in tasks]
        monkeypatch.setattr(measured, "maker_id", lambda: "another")
        assert measured.Measured(tmp_path).kept(line["key"], "samples=50 draw=0") is None

    def test_subset_and_shuffle(self) -> None:
        head = scans.Head(np.eye(2), None, np.arange(50)[:, None].astype(float), np.arange(50))
        part = curves.take(head, curves.subset(50, 20, (1, 2)))
        assert len(np.unique(part.latents)) == 20
        assert np.array_equal(part.latents[:, 0], part.labels)
        assert np.array_equal(part.labels, curves.subset(50, 20, (1, 2)))
        mixed = curves.shuffle(head, 0.3, 0)
        assert np.array_equal(np.sort(mixed.labels), head.labels)
        assert 0 < (mixed.labels != head.labels).sum() <= 15
        assert np.array_equal(mixed.latents, head.latents)

    def test_shift_captures_stored_networks_anew(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("matplotlib")
        monkeypatch.setattr(corrupt, "LEVELS", {"noise": (0.1,), "grey": (1.0,)})
        monkeypatch.setattr(curves, "LEVELS", corrupt.LEVELS)
        line, _ = write_digits(tmp_path)
        result = self.run("shift", tmp_path, "--seeds", "all", "--data", "digits=digits", "--no-patterns", "--out", tmp_path / "figures")
        assert result.exit_code == 0, result.output
        assert row(result.output, "grey=1")[1:] == row(result.output, "none")[1:]  # digits are grey already
        shifted, latents = (
            scans.read_head(f).latents for f in (corrupt.shifted_file(tmp_path / "shifted", line, "noise", 0.1), head_file(line))
        )
        assert shifted.shape == latents.shape
        assert not np.array_equal(shifted, latents)


class TestCorruptions:
    @pytest.mark.parametrize(("kind", "level"), [(kind, level) for kind, levels in corrupt.LEVELS.items() for level in levels])
    def test_images_stay_images(self, kind: str, level: float) -> None:
        images = (torch.rand(4, 3, 8, 8) * 255).round() / 255
        changed = corrupt.corrupted(images, kind, level, 0)
        assert changed.dtype == torch.float32
        assert torch.equal(changed, corrupt.corrupted(images, kind, level, 0))
        assert torch.allclose((changed * 255).round() / 255, changed)
        assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
        assert not torch.equal(changed, images)

    def test_what_they_do(self) -> None:
        images = torch.rand(4, 3, 8, 8)
        assert corrupt.corrupted(images, "grey", 1.0, 0).std(1).max() < 1e-6
        assert corrupt.corrupted(images, "contrast", 0.3, 0).std() < 0.5 * images.std()
        assert corrupt.corrupted(images, "blur", 1.5, 0).std() < images.std()
        with pytest.raises(ValueError, match="noise, blur"):
            corrupt.corrupted(images, "fog", 1.0, 0)


def test_lines_are_json_of_one_line(folder: Path) -> None:
    scans.scan_networks(networks.read_networks([folder]), 0.05, shown=False)
    for text in (folder / "scans.jsonl").read_text().splitlines():
        assert {"network", "head", "rule", "alpha", "verdict", "p"} <= set(json.loads(text))


def test_a_published_network_starts_anew_with_other_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    stem, last = torch.nn.Conv2d(3, 4, 3, 2), torch.nn.Conv2d(4, 1280, 1)
    rest = {name: torch.nn.Identity() for name in ("_bn0", "_swish", "_bn1")}
    whole = SimpleNamespace(_conv_stem=stem, _blocks=[torch.nn.ReLU()], _conv_head=last, **rest)
    monkeypatch.setattr(published, "lite0", lambda: whole)
    images = torch.rand(2, 3, 20, 20)
    one, other, same = (make_net("lite0", CLASSES, 3, seed)(images) for seed in (0, 1, 0))
    assert one.shape == (2, CLASSES)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    with pytest.raises(ValueError, match="colour images"):
        make_net("lite0", CLASSES, 1, 0)


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_is_for_processors_that_have_it(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    assert {arch: precision(arch) for arch in ("vgg", "vit")} == {"vgg": "bfloat16" if has else "float32", "vit": "float32"}
    seen = []
    monkeypatch.setattr("recipe.make_net", lambda *_: Seen(seen))
    images, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4) % 2
    train(images, labels, 2, arch="vgg", schedule=Schedule(epochs=3, flip=False, crop=1, batch=4), seed=0)
    assert set(seen) == {torch.bfloat16 if has else torch.float32}


class Seen(torch.nn.Linear):
    """Notes the precision of what it gives."""

    def __init__(self, seen: list[torch.dtype]) -> None:
        super().__init__(3, 2)
        self.seen = seen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x.mean((2, 3)))
        self.seen.append(logits.dtype)
        return logits


def test_a_key_names_its_job():
    jobs = list(plan.plan({"gtsrb": 43, "cifar10": 10}, rounds=12))
    assert [plan.Job.parse(job.key, tuple(ARCHITECTURES)) for job in jobs] == jobs
    with pytest.raises(ValueError, match="DATASET-ARCH-ATTACK"):
        plan.Job.parse("gtsrb-resnet50-badnets-0.1-3-1", tuple(ARCHITECTURES))


@pytest.mark.parametrize(("side", "size"), [(16, 3), (32, 3), (63, 3), (64, 6), (96, 9)])
@pytest.mark.parametrize("attack", ["badnets", "all-to-all", "source-specific", "multi-target"])
def test_patches_grow_with_the_images(attack, side, size):
    job = plan.Job("any", "resnet", attack, 0.1, 1, 0)
    assert {door.trigger.size for door in plan.backdoors(job, 10, side)} == {size}
