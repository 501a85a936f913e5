"""Refusals that the attacks share. May import: torch, errors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tacfast.errors import ProblemError


def whole(name: str, value: Any, low: int) -> None:
    """Refuse what is not an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ProblemError(f"{name} must be an integer of at least {low}, got {value!r}")


def number(name: str, value: Any, low: float, high: float) -> None:
    """Refuse what is not a number in [low, high]."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not low <= value <= high:
        raise ProblemError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")


def images(value: Any) -> None:
    """Refuse what is no batch of floating images."""
    if not isinstance(value, Tensor) or value.ndim != 4 or not value.is_floating_point():
        what = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ProblemError(f"images must be a floating tensor of shape (n, channels, H, W) with values in [0, 1], got {what}")
    if value.numel() and not (float(value.min()) >= 0 and float(value.max()) <= 1):
        raise ProblemError("images must have values in [0, 1]: stamp them before they are normalised, uint8 ones divided by 255")


def labels(value: Any, count: int | None = None) -> Tensor:
    """Labels as int64 (n,); refuse what is not one class per image."""
    try:
        y = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ProblemError(f"labels must be integers, one per image: {error}") from None
    whole_numbers = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    if y.ndim != 1 or not whole_numbers or (count is not None and len(y) != count):
        expected = "(n,)" if count is None else f"({count},)"
        raise ProblemError(f"labels must be integers of shape {expected}, got {y.dtype} of shape {tuple(y.shape)}")
    if len(y) and int(y.min()) < 0:
        raise ProblemError(f"labels must be classes from 0, got {int(y.min())}")
    return y.long()
