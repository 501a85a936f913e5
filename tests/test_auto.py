"""One law: the automatic repair goes gentler only where the first try was dear and the second is better in what can be measured."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from tacfast.errors import SolveError
from tacfast.heads import capture
from tacfast.methods import Job
from tacfast.methods.training import LR

# The package has the function under the same name.
auto_module = importlib.import_module("tacfast.methods.auto")
GENTLE, THIRD = LR * 2 / 3, LR / 3


@pytest.fixture
def job(small_model: nn.Sequential, batches: Any) -> Job:
    images, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    return Job(capture(small_model, batches), images, labels, torch.arange(40), torch.arange(40, 60), (), "cpu", 0, False)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner layers that do not move."""
    monkeypatch.setattr(auto_module, "Drift", lambda *_: lambda: 0.0)


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize(
    ("accuracies", "reaches", "tried", "taken"),
    [
        ((0.9, 0.9), (0.2,), 1, LR),
        ((0.9, 0.85), (0.2,), 1, LR),  # one of the twenty held-out images
        ((0.9, 0.8, 0.85), (0.2, 0.24), 2, GENTLE),  # dear; the second is better and as closed
        ((0.9, 0.8, 0.85), (0.2, 0.3), 2, LR),  # the second leaves the way more open
        ((0.9, 0.8, 0.8), (0.2, 0.1), 2, LR),  # the second is no more accurate
        ((0.9, 0.8, 0.85), (None, None), 2, GENTLE),  # nothing to be reached
    ],
)
def test_the_better_try_is_taken(
    accuracies: tuple[float, ...],
    reaches: tuple[float | None, ...],
    tried: int,
    taken: float,
    job: Job,
    small_model: nn.Sequential,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = {k: v.clone() for k, v in small_model.state_dict().items()}

    def unlearn(model: nn.Module, job: Job, *, lr: float, **_: Any) -> None:
        assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())  # every try begins anew
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(lr)

    told, reached = iter(accuracies), iter(reaches)
    monkeypatch.setattr(auto_module, "unlearn", unlearn)
    monkeypatch.setattr(auto_module, "_accuracy", lambda *_: next(told))
    monkeypatch.setattr(auto_module, "reach", lambda *_: next(reached))
    chosen = auto_module.auto(small_model, job)
    assert chosen["lr"] == taken
    assert [t.lr for t in chosen["trials"]] == [LR, GENTLE][:tried]
    assert all(bool((p == taken).all()) for p in small_model.parameters())


def test_a_given_learning_rate_is_the_only_one(job: Job, small_model: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_module, "unlearn", lambda *_, **__: None)
    monkeypatch.setattr(auto_module, "reach", lambda *_: 0.1)
    assert [t.lr for t in auto_module.auto(small_model, job, lr=0.02, budget=0.0)["trials"]] == [0.02]


@pytest.mark.usefixtures("still")
def test_a_ruined_network_is_tried_again_with_a_third_of_the_learning_rate(
    job: Job, small_model: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    bears = {LR: SolveError("diverged"), THIRD: 0.7, LR / 9: 0.8, LR / 9 * 2 / 3: 0.85}

    def unlearn(model: nn.Module, job: Job, *, lr: float, **_: Any) -> None:
        nonlocal accuracy
        result = bears[lr]
        if isinstance(result, SolveError):
            raise result
        accuracy = result

    accuracy = 0.9
    monkeypatch.setattr(auto_module, "unlearn", unlearn)
    monkeypatch.setattr(auto_module, "_accuracy", lambda *_: accuracy)
    monkeypatch.setattr(auto_module, "reach", lambda *_: 0.1)
    chosen = auto_module.auto(small_model, job)
    assert [(t.lr, t.clean_accuracy) for t in chosen["trials"]] == [(THIRD, 0.7), (LR / 9, 0.8), (LR / 9 * 2 / 3, 0.85)]
    assert chosen["lr"] == LR / 9 * 2 / 3
    bears = {LR / by: SolveError("diverged") for by in auto_module.GENTLER}
    with pytest.raises(SolveError):
        auto_module.auto(small_model, job)


@pytest.mark.parametrize(("drifts", "tried"), [((0.1,), [LR]), ((None,), [LR]), ((0.3, 0.2, 0.1), [LR, THIRD, LR / 9])])
def test_a_network_that_drifts_far_is_ruined_however_accurate(
    drifts: tuple[float | None, ...], tried: list[float], job: Job, small_model: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter(drifts)
    monkeypatch.setattr(auto_module, "unlearn", lambda *_, **__: None)
    monkeypatch.setattr(auto_module, "reach", lambda *_: 0.1)
    monkeypatch.setattr(auto_module, "Drift", lambda *_: lambda: next(told))
    chosen = auto_module.auto(small_model, job)
    assert [(t.lr, t.drift) for t in chosen["trials"]] == list(zip(tried, drifts, strict=True))
    assert chosen["lr"] == tried[-1]
