"""A backdoored model made on the spot: scikit-learn's digits, a small CNN, a BadNets trigger. May import: torch, sklearn, all of tacfast.

Everything is made here from a seed; nothing is downloaded. Gu et al. 2017 (BadNets): a small patch stamped on a share of the training
images, whose labels are set to the target class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tacfast.heads import capture, evaluating
from tacfast.outcome import RepairResult
from tacfast.progress import track
from tacfast.repair import repair
from tacfast.report import ScanReport
from tacfast.scan import scan
from tacfast.solver import solve

TARGET = 7
POISONING_RATE = 0.1
_EPOCHS = 30
_BATCH = 64


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What the demo measured; the accuracies and ASRs are on images that neither training nor repair saw."""

    report: ScanReport
    repair: RepairResult
    target: int
    clean_accuracy: tuple[float, float]
    asr: tuple[float, float]
    #: float64 (d,): reconstructed and true trigger-activated change.
    reconstructed_tac: NDArray[np.float64]
    true_tac: NDArray[np.float64]

    @property
    def cosine(self) -> float:
        """Cosine of the two trigger-activated changes."""
        a, b = self.reconstructed_tac, self.true_tac
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def stamp(images: Tensor) -> Tensor:
    """The trigger: a 3 x 3 checkerboard in a corner of 16 x 16 images in [0, 1]."""
    images = images.clone()
    images[:, :, -4:-1, -4:-1] = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    return images


def small_cnn() -> nn.Sequential:
    """Three convolutions, global average pooling, and a linear head on 64 latents."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(1, 32, 1), *block(32, 64, 2), *block(64, 64, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def run(*, seed: int = 0, device: str = "auto", progress: bool = False, say: Callable[[str], None] = lambda _: None) -> DemoResult:
    """Train a backdoored digit classifier, scan it, repair it, and measure both.

    Args:
        seed: of the split, the poisoning and the training.
        device, progress: as for `scan`.
        say: told in a few words what comes next.
    """
    x, y = _digits()
    order = np.random.default_rng(seed).permutation(len(x))
    # 900 to train, 450 clean ones for the defender, the rest to measure.
    train, clean, test = (torch.from_numpy(part) for part in np.split(order, [900, 1350]))
    say(f"training a CNN on {len(train)} digits, {POISONING_RATE:.0%} of them stamped and labelled {TARGET}")
    model = _train_backdoored(x[train], y[train], seed, progress)
    batches = list(zip(x[clean].split(_BATCH), y[clean].split(_BATCH), strict=True))
    say(f"scanning it with {len(clean)} clean digits")
    report = scan(model, batches, device=device)
    say("repairing a copy")
    result = repair(model, batches, report, device=device, seed=seed, progress=progress)
    repaired = model if result.model is None else result.model
    return DemoResult(
        report=report,
        repair=result,
        target=TARGET,
        clean_accuracy=(_accuracy(model, x[test], y[test]), _accuracy(repaired, x[test], y[test])),
        asr=(_asr(model, x[test], y[test]), _asr(repaired, x[test], y[test])),
        reconstructed_tac=_reconstructed(model, x[clean]),
        true_tac=_true_tac(model, x[test]),
    )


def _digits() -> tuple[Tensor, Tensor]:
    """1797 images, float32 (n, 1, 16, 16) in [0, 1], enlarged from 8 x 8 so that the trigger covers little of them."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None] / 16
    return nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear"), torch.from_numpy(data.target)


def _train_backdoored(x: Tensor, y: Tensor, seed: int, progress: bool) -> nn.Module:
    order = torch.Generator().manual_seed(seed)
    poisoned = torch.randperm(len(x), generator=order)[: round(POISONING_RATE * len(x))]
    x, y = x.clone(), y.clone()
    x[poisoned], y[poisoned] = stamp(x[poisoned]), TARGET
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = small_cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _EPOCHS)
    for _ in track(range(_EPOCHS), "training", shown=progress):
        for index in torch.randperm(len(x), generator=order).split(_BATCH):
            loss = nn.functional.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def _predict(model: nn.Module, x: Tensor) -> Tensor:
    with evaluating(model, torch.device("cpu")):
        predicted: Tensor = model(x).argmax(1)
    return predicted


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((_predict(model, x) == y).double().mean())


def _asr(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of stamped images of other classes that are called the target."""
    others = y != TARGET
    return float((_predict(model, stamp(x[others])) == TARGET).double().mean())


def _reconstructed(model: nn.Module, x: Tensor) -> NDArray[np.float64]:
    captured = capture(model, [x])
    solutions = solve(captured.weight, captured.bias, captured.latents, classes=[TARGET])
    shift: NDArray[np.float64] = solutions.perturbations[0]
    return shift


def _true_tac(model: nn.Module, x: Tensor) -> NDArray[np.float64]:
    """Mean change of the latents when the trigger is stamped on."""
    change = capture(model, [stamp(x)]).latents - capture(model, [x]).latents
    mean: NDArray[np.float64] = change.astype(np.float64).mean(0)
    return mean
