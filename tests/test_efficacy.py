"""One law: what is said of a defence is what it did. It works on a copy, figures follow from predictions, and nothing is done twice."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attempts
import lasting
import pytest
import recipe
import removal
import removal_tables
import scores
import torch
from data import Data, read
from defences import DEFENCES, FINE_TUNING, NotApplicable, Task, predict
from defences.clp import _pairs
from nets import resnet, vit
from plan import Job, backdoors
from results import append_line, read_lines
from torch import Tensor, nn
from typer.testing import CliRunner
from zoo_models import Stamp

from tacfast.attacks import AllToOne, Backdoor, Blend, Patch, Warp, attack_success_rate, choose
from tacfast.checkpoints import save_safetensors

TARGET = 1
JOB = Job("digits", "resnet", "badnets", 0.1, TARGET, 0)


@pytest.fixture(scope="module")
def digits() -> Data:
    return read("digits", "digits")


@pytest.fixture(scope="module")
def folder(_one_thread: None, digits: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration folder with one backdoored network, much narrower than real ones."""
    where = tmp_path_factory.mktemp("calibration")
    (where / "models").mkdir()
    doors = backdoors(JOB, digits.classes, digits.side)
    poisoning = choose(digits.y_train, doors, rate=0.2, seed=0)
    schedule = recipe.Schedule(epochs=8, flip=False, crop=1, batch=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipe.NETS, "resnet", narrow)
        model, _ = recipe.train(digits.x_train, poisoning.labels, 10, arch="resnet", schedule=schedule, seed=0, stamp=poisoning.stamp)
    save_safetensors(model, where / "models" / f"{JOB.key}.safetensors", {})
    images, labels = digits.split(0)[1]
    asr = [attack_success_rate(model, door, images, labels) for door in doors]
    accuracy = float((predict(model, images) == labels).double().mean())
    assert accuracy > 0.9
    assert asr[0] > 0.9
    truth = {"targets": [TARGET], "pairs": [], "triggers": []}
    append_line(
        where / "results.jsonl", JOB.to_dict() | {"recipe": 1, "classes": 10, "truth": truth, "clean_accuracy": accuracy, "asr": asr}
    )
    return where


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipe.NETS, "resnet", narrow)
    monkeypatch.setattr(importlib.import_module("defences.neural_cleanse"), "ROUNDS", 12)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """For so small networks more threads cost more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def narrow(classes: int, *, channels: int = 3, width: int = 0) -> nn.Module:
    # Half as wide, torch 2.15 crashes without AVX-512 (channels last, 4 to 8 channels by a 1 x 1 kernel of stride 2).
    return resnet(classes, channels=channels, width=16)


@pytest.fixture
def model(folder: Path) -> nn.Module:
    return recipe.load_net(folder / "models" / f"{JOB.key}.safetensors", "resnet", 10, 1)


def call(*arguments: object) -> Any:
    return CliRunner().invoke(removal.app, [str(a) for a in arguments], catch_exceptions=False)


class TestDefences:
    @pytest.mark.parametrize("name", DEFENCES)
    def test_a_defence_changes_a_copy_and_keeps_the_accuracy(self, name: str, model: nn.Module, digits: Data) -> None:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        (images, labels), (x, y) = digits.split(0)
        epochs = {"fst": 30, "anp": 1}.get(name, 2)
        repaired = DEFENCES[name](Task(model, images[:256], labels[:256], (TARGET,), epochs=epochs))
        assert not repaired.training
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in repaired.modules())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert not model.training
        assert all(p.requires_grad for p in model.parameters())
        # So narrow a network has no channel that stands out enough to be pruned.
        if name not in ("clp", "anp"):
            assert any(not torch.equal(v, before[k]) for k, v in repaired.state_dict().items())
        was, now = (float((predict(m, x) == y).double().mean()) for m in (model, repaired))
        # A head drawn anew has not come all the way back yet.
        assert now > was - (0.1 if name == "fst" else 0.05)

    def test_the_same_seed_gives_the_same_network(self, model: nn.Module, digits: Data) -> None:
        images, labels = digits.split(0)[0]
        first, again, other = (DEFENCES["ft"](Task(model, images[:128], labels[:128], epochs=1, seed=s)).state_dict() for s in (0, 0, 1))
        assert all(torch.equal(v, again[k]) for k, v in first.items())
        assert any(not torch.equal(v, other[k]) for k, v in first.items())

    @pytest.mark.parametrize("name", [name for name in FINE_TUNING if name not in ("fp", "fst")])
    def test_fine_tuning_may_be_slower(self, name: str, model: nn.Module, digits: Data) -> None:
        images, labels = digits.split(0)[0]

        def moved(slower: float) -> float:
            repaired = DEFENCES[name](Task(model, images[:128], labels[:128], (TARGET,), epochs=1, slower=slower))
            return sum(float((p - q).detach().norm()) for p, q in zip(repaired.parameters(), model.parameters(), strict=True))

        assert 0 < moved(1e3) < 0.1 * moved(1)

    @pytest.mark.parametrize("name", ["anp", "clp"])
    def test_pruning_of_normalised_channels_needs_them(self, name: str) -> None:
        plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
        with pytest.raises(NotApplicable, match="no batch normalisation"):
            DEFENCES[name](Task(plain, torch.rand(8, 1, 8, 8), torch.zeros(8, dtype=torch.long)))

    def test_a_channel_that_amplifies_most_is_pruned(self, model: nn.Module) -> None:
        convolution, norm = _pairs(model, torch.zeros(1, 1, 16, 16))[-1]
        with torch.no_grad():
            norm.weight[5] = 1000.0
        assert convolution.out_channels == norm.num_features
        pruned = DEFENCES["clp"](Task(model, torch.zeros(1, 1, 16, 16), torch.zeros(1, dtype=torch.long)))
        last = [m for m in pruned.modules() if isinstance(m, nn.BatchNorm2d)][-1]
        assert torch.nonzero(last.weight == 0)[:, 0].tolist() == [5]

    def test_every_norm_of_a_network_is_paired_with_what_feeds_it(self) -> None:
        for made in (resnet(10, channels=1, width=8), vit(10, channels=1, width=8)):
            pairs = _pairs(made.eval(), torch.zeros(1, 1, 16, 16))
            assert len(pairs) == sum(isinstance(m, nn.BatchNorm2d) for m in made.modules())


class Says(nn.Module):
    """Calls an image the class that its mean is nearest to, in tenths; stamped ones, whose last pixel is white, `stamped` when given."""

    def __init__(self, stamped: int | None = None) -> None:
        super().__init__()
        self.stamped = stamped

    def forward(self, x: Tensor) -> Tensor:
        called = (x[:, 0, 0, 0] * 10).round().long()
        if self.stamped is not None:
            called = torch.where(x[:, 0, -1, -1] == 1, self.stamped, called)
        return nn.functional.one_hot(called, 10).double()


class TestFigures:
    def test_excess_is_what_the_trigger_adds(self) -> None:
        stamped, clean = torch.tensor([7, 7, 7, 1]), torch.tensor([7, 1, 2, 1])
        wanted, labels = torch.full((4,), 7), torch.tensor([3, 1, 7, 1])
        assert scores.rates(stamped, clean, wanted, labels) == {"asr": 0.75, "excess": 0.5, "recovery": 0.5}

    def test_behaviour_counts_victims_only(self) -> None:
        labels = torch.tensor([0, 1, 2, 3, 4, 5])
        images = (labels / 10)[:, None, None, None].expand(-1, 1, 4, 4).clone()
        images[5] = 0.2  # a mistake, and of the target class without any trigger
        doors = [Backdoor(Patch(size=1, margin=0), AllToOne(2))]
        found = scores.behaviour(Says(stamped=2), doors, (2,), images, labels)
        assert found["accuracy"] == pytest.approx(5 / 6)
        assert found["target_accuracy"] == 1.0
        assert found["triggers"] == [{"asr": 1.0, "excess": pytest.approx(0.8), "recovery": 0.0}]
        immune = scores.behaviour(Says(), doors, (2,), images, labels)
        assert immune["triggers"] == [{"asr": pytest.approx(0.2), "excess": pytest.approx(0.0), "recovery": pytest.approx(0.8)}]

    @pytest.mark.parametrize(
        ("asr", "accuracy", "der"),
        [((1.0, 0.0), (0.9, 0.9), 1.0), ((1.0, 1.0), (0.9, 0.9), 0.5), ((1.0, 0.2), (0.9, 0.7), 0.8), ((0.8, 0.9), (0.9, 0.95), 0.5)],
    )
    def test_effectiveness(self, asr: tuple[float, float], accuracy: tuple[float, float], der: float) -> None:
        before, after = ({"accuracy": a, "triggers": [{"asr": 0.0}, {"asr": s}]} for a, s in zip(accuracy, asr, strict=True))
        assert scores.effectiveness(before, after) == pytest.approx(der)

    def test_tables_compare_what_both_repaired(self) -> None:
        def line(key: str, method: str, accuracy: float, asr: float, der: float) -> dict[str, Any]:
            target = None if key == "b" else accuracy - 0.1
            after = {"accuracy": accuracy, "target_accuracy": target, "triggers": [{"asr": asr, "excess": asr, "recovery": 1 - asr}]}
            more = {"share": 0.05, "targets": "truth", "epochs": 10, "bfloat16": False, "seed": 0, "cpu_s": 1.0, "attack": "badnets"}
            before = {"target_accuracy": target and 0.9}
            return {"key": key, "method": method, "dataset": "toy", "before": before, "after": after, "der": der, **more}

        lines = [line("a", "ft", 0.9, 0.5, 0.7), line("b", "ft", 0.8, 0.1, 0.9), line("a", "nc", 0.9, 0.0, 1.0)]
        lines += [line("a", "tacfast:x", 0.95, 0.0, 1.0), line("b", "tacfast:x", 0.85, 0.0, 1.0)]
        text = removal_tables.removal_tables([*lines, {**lines[0], "key": "b", "method": "nc", "refused": "no"}], "attack")
        rows = {cells[0]: cells[1:] for cells in ([c.strip() for c in r.strip("|").split("|")] for r in text.splitlines())}
        assert rows["**mean**"] == [
            "85.0 / 30.0 / 30.0 / 70.0 / 80.0",
            "90.0 / 0.0 / 0.0 / 100.0 / 100.0",
            "90.0 / 0.0 / 0.0 / 100.0 / 100.0",
        ]
        assert rows["**worst**"][0] == "80.0 / 50.0 / 50.0 / 50.0 / 70.0"
        # No test image is of the second network's target.
        assert rows["ACC of the target, before / after"] == ["90.0 / 80.0", "90.0 / 80.0", "90.0 / 85.0"]
        assert rows["repairs"] == ["2", "1", "2"]
        # Neural Cleanse failed on one of the two networks: only plain fine-tuning can be compared.
        assert rows["**all**"] == ["tacfast:x", "ft", "+5.0", "-30.0", "-30.0", "+30.0", "+20.0", "2"]


#: The stranger's network takes normalised images, ours takes them as they are.
ZOO_NETS = """
from nets import resnet
def make(num_classes):
    net = resnet(num_classes, channels=1, width=16)
    net.register_forward_pre_hook(lambda module, given: (given[0] * 0.25 + 0.5,))
    return net
"""
ZOO_TRIGGERS = """
from tacfast.attacks import Patch
def trigger(name):
    return lambda x, which=0: Patch().stamp(x)
"""


class TestHarness:
    def test_what_has_a_line_is_not_done_again(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        where = ["--folder", folder, "--data", "digits=digits", "--out", tmp_path]
        methods = ["--method", "none", "--method", "ft@epochs=1", "--method", "clean-twin", "--share", 0.2]
        assert "ASR" in call("run", *where, *methods).output
        lines = read_lines(tmp_path / "results.jsonl")
        assert [line["method"] for line in lines] == ["none", "ft@epochs=1", "clean-twin"]
        untouched, tuned, missing = lines
        recorded = read_lines(folder / "results.jsonl")[0]
        assert untouched["before"] == untouched["after"]
        assert untouched["der"] == 0.5
        assert untouched["before"]["triggers"][0]["asr"] == pytest.approx(recorded["asr"][0], abs=1e-5)
        assert tuned["samples"] == 200
        assert tuned["named"] == [TARGET]
        assert tuned["after"] != tuned["before"]
        assert "twin" in missing["refused"]
        json.dumps(lines, allow_nan=False)

        def forbidden(*_: Any) -> Any:
            raise AssertionError("done again")

        monkeypatch.setattr(removal, "attempt", forbidden)
        assert call("run", *where, *methods).output == ""
        with pytest.raises(AssertionError, match="done again"):
            call("run", *where, "--method", "none", "--share", 0.1)
        table = call("table", "--out", tmp_path, "--by", "network").output
        assert JOB.key in table
        assert "20% clean data" in table

    def test_our_own_repair_is_measured_alike_and_attacked_again(self, folder: Path, tmp_path: Path) -> None:
        where = ["--folder", folder, "--data", "digits=digits", "--out", tmp_path]
        call("run", *where, "--method", "tacfast:finetune@epochs=1", "--share", 0.3)
        line = read_lines(tmp_path / "results.jsonl")[0]
        assert line["before"]["triggers"][0]["asr"] > 0.9
        assert line["after"] != line["before"]
        shutil.copytree(tmp_path, tmp_path / "unscanned")
        call("last", *where)
        again = read_lines(tmp_path / "last.jsonl")[0]
        assert again["attempt"] == line["attempt"]
        assert again["retuned"]["accuracy"] > 0.7
        assert again["scan"]["verdict"] in ("clean", "backdoored", "inconclusive")
        assert again["reoptimised"]["accuracy"] == line["after"]["accuracy"]
        flagged = int(again["scan"]["verdict"] == "backdoored")
        assert f"| {flagged} of 1 | 1 |" in call("table", "--out", tmp_path).output
        unscanned = [*where[:-1], tmp_path / "unscanned"]
        call("last", *unscanned, "--no-scan")
        assert read_lines(tmp_path / "unscanned" / "last.jsonl")[0] == {**again, "scan": None}
        assert "| - | 1 |" in call("table", "--out", tmp_path / "unscanned").output

    def test_a_missed_target_leaves_the_backdoor(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(attempts.tacfast, "scan", lambda *_, **__: type("Report", (), {"targets": (), "pairs": ()})())
        where = ["--folder", folder, "--data", "digits=digits", "--out", tmp_path]
        call("run", *where, "--method", "tacfast:finetune", "--method", "nc", "--targets", "scan")
        for line in read_lines(tmp_path / "results.jsonl"):
            assert line["named"] == []
            assert line["after"] == line["before"]

    def test_published_models_are_measured_with_their_own_triggers(self, model: nn.Module, tmp_path: Path) -> None:
        zoo = tmp_path / "zoo"
        (zoo / "stranger").mkdir(parents=True)
        save_safetensors(model, zoo / "stranger" / "model.safetensors", {})
        (zoo / "nets.py").write_text(ZOO_NETS)
        (zoo / "triggers.py").write_text(ZOO_TRIGGERS)
        meta = {"arch": "nets.py:make", "arch_args": {"num_classes": 10}, "data": "digits", "mean": [0.5], "std": [0.25]}
        (zoo / "stranger" / "meta.json").write_text(json.dumps(meta))

        def measured(targets: Any) -> dict[str, Any]:
            (zoo / "stranger" / "truth.json").write_text(json.dumps({"attack": "badnets", "targets": targets, "poisoning_rate": 0.1}))
            out = tmp_path / str(targets)
            method = "tacfast:finetune@epochs=1" if targets == "y+1" else "none"
            call("run", "--zoo", zoo, "--data", "digits=digits", "--out", out, "--method", method)
            return dict(read_lines(out / "results.jsonl")[0])

        one, shifted = measured([TARGET]), measured("y+1")
        assert one["before"]["accuracy"] > 0.9
        assert one["before"]["triggers"][0]["asr"] > 0.9
        # Only images of the class before the target are sent where an all-to-all backdoor would send them.
        assert shifted["before"]["triggers"][0]["asr"] < 0.3
        assert shifted["named"] == list(range(10))

    @pytest.mark.parametrize("text", ["magic", "ft@lr=0.1", "clp@slower=10"])
    def test_unknown_methods_and_settings_are_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"method must be|settings of its paper"):
            attempts.Method(text).check()
        assert attempts.Method("tacfast:finetune@beta=2,lr=0.01").options == {"beta": 2, "lr": 0.01}


class TestLasting:
    @pytest.mark.parametrize("trigger", [Patch(), Blend(ratio=0.1)])
    def test_a_new_trigger_works_better_and_stays_in_its_place(self, trigger: Any, model: nn.Module, digits: Data) -> None:
        door = Backdoor(trigger, AllToOne(5))  # a target that the network has no backdoor into
        owned = digits.x_train[:200].float() / 255, digits.y_train[:200]
        changed = lasting.reoptimised(model, door, owned, 0)
        images, _ = digits.split(0)[1]
        with torch.no_grad():
            old, new = (float(model(stamp(images))[:, 5].mean()) for stamp in (trigger, changed))
        assert new > old + 1
        moved = (changed(images) - images).abs()
        within = lasting.reach(trigger, images.shape[1:])
        assert within is not None
        assert float(moved.max()) <= within[1] + 1e-6
        if isinstance(trigger, Patch):
            touched = torch.nonzero(moved.amax((0, 1)))
            assert touched.min() >= 12
            assert touched.max() <= 14

    def test_triggers_without_a_place_are_left_out(self) -> None:
        shape = (3, 16, 16)
        assert lasting.reach(Warp(), shape) is None
        assert lasting.reach(Stamp("warp", Warp()), shape) is None
        assert lasting.reach(Stamp("wave", lambda images: (images + torch.linspace(0, 0.1, 16)).clamp(0, 1)), shape) is None

    def test_a_trigger_known_by_what_it_does_only_has_the_same_reach(self) -> None:
        shape = (3, 16, 16)
        for trigger in (Patch(), Blend(ratio=0.1)):
            known, probed = (lasting.reach(t, shape) for t in (trigger, Stamp("published", trigger)))
            assert known is not None
            assert probed is not None
            assert torch.equal(known[0], probed[0])
            assert known[1] == pytest.approx(probed[1], abs=1e-5)

    def test_five_poisoned_images_bring_a_backdoor_back_to_the_network_that_has_it(self, model: nn.Module, digits: Data) -> None:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        doors = backdoors(JOB, 10, 16)
        owned = digits.x_train[:100].float() / 255, digits.y_train[:100]
        again = lasting.retuned(model, doors, owned, 0)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        images, labels = digits.split(0)[1]
        assert attack_success_rate(again, doors[0], images, labels) > 0.9
