"""One law: the automatic repair goes back to the old weights only where it was dear and the target stays as hard to reach."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from tacfast.heads import capture
from tacfast.methods import Job

# The package has the function under the same name.
auto_module = importlib.import_module("tacfast.methods.auto")


@pytest.fixture
def job(small_model: nn.Sequential, batches: Any) -> Job:
    images, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    return Job(capture(small_model, batches), images, labels, torch.arange(40), torch.arange(40, 60), (), "cpu", 0, False)


@pytest.mark.parametrize(
    ("accuracies", "reaches", "tried", "taken"),
    [
        ((0.9, 0.895), (0.2,), 1, 1.0),  # within the budget
        ((0.9, 0.85, 0.88), (0.2, 0.29), 2, 0.85),  # dear; a step back is better and as closed
        ((0.9, 0.85, 0.88), (0.2, 0.31), 2, 1.0),  # there the way is more open
        ((0.9, 0.85, 0.85), (0.2, 0.1), 2, 1.0),  # there it is no more accurate
        ((0.9, 0.85, 0.88), (None, None), 2, 0.85),  # nothing to be reached
    ],
)
def test_the_better_place_is_taken(
    accuracies: tuple[float, ...],
    reaches: tuple[float | None, ...],
    tried: int,
    taken: float,
    job: Job,
    small_model: nn.Sequential,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = {k: v.clone() for k, v in small_model.named_parameters()}

    def unlearn(model: nn.Module, job: Job, **_: Any) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)

    told, reached = iter(accuracies), iter(reaches)
    monkeypatch.setattr(auto_module, "unlearn", unlearn)
    monkeypatch.setattr(auto_module, "_accuracy", lambda *_: next(told))
    monkeypatch.setattr(auto_module, "reach", lambda *_: next(reached))
    chosen = auto_module.auto(small_model, job)
    assert chosen["way"] == taken
    assert [t.way for t in chosen["trials"]] == [1.0, 0.85][:tried]
    for name, p in small_model.named_parameters():
        torch.testing.assert_close(p.detach(), old[name].detach() + taken)
    with torch.no_grad():
        inputs: Any = small_model[0](job.images[:40])
    norm: Any = small_model[1]
    # On the way back the statistics of batch normalisation are those of the weights there.
    assert torch.allclose(norm.running_mean, inputs.mean((0, 2, 3)), atol=1e-4) == (taken < 1)
