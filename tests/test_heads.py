"""One law: the head is the layer whose arithmetic gives the logits, proven on the data; the model is left as it was found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tacfast
from tacfast.heads import capture

Batches = list[tuple[Tensor, Tensor]]


class Wrapped(nn.Module):
    """A trunk to 8 latents and whatever comes after."""

    def __init__(self, after: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.after = after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.trunk(x))


class ConvHead(nn.Module):
    """1x1 convolution, then average over space; with a ReLU between them it is SqueezeNet's, which is not linear."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.trunk, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(torch.relu(self.trunk(x)))).mean((2, 3))


class Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, z: Tensor) -> Tensor:
        return 10 * nn.functional.normalize(z) @ nn.functional.normalize(self.weight).T


class Named(nn.Module):
    """Returns what Hugging Face models return: an object with `logits`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 5)

    def forward(self, z: Tensor) -> Any:
        return {"logits": self.fc(z), "hidden": z}


LINEAR: dict[str, tuple[nn.Module, str]] = {
    "linear": (Wrapped(nn.Linear(8, 5)), "after"),
    "no bias": (Wrapped(nn.Linear(8, 5, bias=False)), "after"),
    "weight norm": (Wrapped(nn.utils.parametrizations.weight_norm(nn.Linear(8, 5))), "after"),
    "dropout before": (Wrapped(nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 5))), "after.1"),
    "two layers": (Wrapped(nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 5))), "after.2"),
    "identity after": (Wrapped(nn.Sequential(nn.Linear(8, 5), nn.Identity())), "after.0"),
    "1x1 convolution": (Wrapped(nn.Sequential(nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 5, 1), nn.Flatten())), "after.1"),
    "convolution then pooling": (ConvHead(relu=False), "conv"),
    "dict of logits": (Wrapped(Named()), "after.fc"),
}
# Some logits of the one with a ReLU must be negative.
torch.manual_seed(0)
NOT_LINEAR: dict[str, tuple[nn.Module, str]] = {
    "softmax": (Wrapped(nn.Sequential(nn.Linear(8, 5), nn.Softmax(1))), "softmax"),
    "log-softmax": (Wrapped(nn.Sequential(nn.Linear(8, 5), nn.LogSoftmax(1))), "log-softmax"),
    "relu after": (Wrapped(nn.Sequential(nn.Linear(8, 5), nn.ReLU())), "non-linear"),
    "cosine": (Wrapped(Cosine()), "Cosine"),
    "squeezenet": (ConvHead(relu=True), "'conv'"),
    "nan": (Wrapped(nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5, eps=float("nan")))), "not finite"),
    "one output": (Wrapped(nn.Linear(8, 1)), "classes >= 2"),
    "a list": (Wrapped(nn.Identity()), "no linear layer"),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_linear_heads_are_found_and_proven(kind: str, batches: Batches) -> None:
    model, name = LINEAR[kind]
    captured = capture(model, batches)
    assert captured.name == name
    assert captured.proof_error < 1e-5
    model.eval()
    with torch.no_grad():
        output = torch.cat([o["logits"] if isinstance(o := model(x), dict) else o for x, _ in batches]).numpy()
    bias = 0 if captured.bias is None else captured.bias
    np.testing.assert_allclose(captured.latents @ captured.weight.T + bias, output, atol=1e-5)
    np.testing.assert_array_equal(captured.predictions, output.argmax(1))
    assert captured.labels is not None
    np.testing.assert_array_equal(captured.labels, torch.cat([y for _, y in batches]))


@pytest.mark.parametrize("kind", NOT_LINEAR)
def test_other_heads_are_refused_with_the_reason(kind: str, batches: Batches) -> None:
    model, reason = NOT_LINEAR[kind]
    with pytest.raises(tacfast.ModelError, match=reason):
        capture(model, batches)


@pytest.mark.parametrize("broken", [False, True])
def test_mode_and_hooks_are_put_back_also_on_error(broken: bool, small_model: nn.Sequential, batches: Batches) -> None:
    small_model.train()
    small_model[1].eval()
    modes = [m.training for m in small_model.modules()]
    before = {k: v.clone() for k, v in small_model.state_dict().items()}
    if broken:
        with pytest.raises(tacfast.ModelError, match="failed on a batch"):
            capture(small_model, [*batches, (torch.zeros(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64))])
    else:
        capture(small_model, batches)
    assert [m.training for m in small_model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small_model.modules())
    assert all(torch.equal(v, before[k]) for k, v in small_model.state_dict().items())
    assert all(p.grad is None for p in small_model.parameters())


def test_a_head_that_changes_between_batches_is_refused(batches: Batches) -> None:
    class Fickle(Wrapped):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            logits: Tensor = self.after(self.trunk(x))
            return logits if self.calls < 3 else logits.relu()

    with pytest.raises(tacfast.ModelError, match="logits of batch 1 are not"):
        capture(Fickle(nn.Linear(8, 5)), batches)


def test_batches_may_be_tensors_pairs_or_dicts_with_or_without_labels(small_model: nn.Sequential, batches: Batches) -> None:
    base = capture(small_model, batches)
    for loader in (
        [x for x, _ in batches],
        ([x] for x, _ in batches),
        [{"pixel_values": x} for x, _ in batches],
        [(x, y, "index") for x, y in batches],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*map(torch.cat, zip(*batches, strict=True))), batch_size=7),
    ):
        captured = capture(small_model, loader)  # type: ignore[arg-type]
        np.testing.assert_allclose(captured.latents, base.latents, rtol=1e-5)
    assert capture(small_model, [x for x, _ in batches]).labels is None


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        ([], "no batch"),
        (["text"], "a batch must be"),
        ([(np.zeros(3), 1)], "must be a tensor"),
        ([(torch.zeros(2, 3, 8, 8), [1])], "one class per image"),
        ([(torch.zeros(2, 3, 8, 8), [0.5, 1.5])], "must be integers"),
        ([(torch.zeros(2, 3, 8, 8), ["a", "b"])], "cannot be read"),
        ([(torch.zeros(2, 3, 8, 8), [1, 5])], "classes of the model"),
        ([(torch.zeros(2, 3, 8, 8), [0, 1]), torch.zeros(2, 3, 8, 8)], "for all or for none"),
        ([torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), torch.nan)], "not finite in batch 1"),
    ],
)
def test_strange_batches_are_named(loader: list[Any], reason: str, small_model: nn.Sequential) -> None:
    with pytest.raises(tacfast.ModelError, match=reason):
        capture(small_model, loader)


def test_an_unknown_device_is_named(small_model: nn.Sequential, batches: Batches) -> None:
    with pytest.raises(tacfast.ModelError, match="'nonsense'"):
        capture(small_model, batches, device="nonsense")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_latents(small_model: nn.Sequential, batches: Batches) -> None:
    cpu, gpu = capture(small_model, batches, device="cpu"), capture(small_model, batches, device="cuda")
    np.testing.assert_allclose(gpu.latents, cpu.latents, atol=1e-4)
    assert next(small_model.parameters()).device.type == "cpu"
