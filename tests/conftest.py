"""What several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from belongings import all_of_them


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small networks run faster so, and a busy machine disturbs them less."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def small_model() -> nn.Sequential:
    """3 x 8 x 8 images to 5 logits, with batch normalisation and dropout, so that a wrong mode shows."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8, 5),
    )


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(60, 3, 8, 8, generator=generator)
    y = torch.arange(60) % 5
    return list(zip(x.split(16), y.split(16), strict=True))


@pytest.fixture(scope="session")
def belongings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what users have, under the names that the documentation gives to it; not to be written to."""
    place = tmp_path_factory.mktemp("belongings")
    all_of_them(place)
    return place
