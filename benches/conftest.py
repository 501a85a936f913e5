"""Solvers that failed the accuracy gate have no time, but belong into the results."""

from __future__ import annotations

from typing import Any

import pytest

from peers import FAILED


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FAILED] = []


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["failed"] = config.stash[FAILED]
