"""The solver against answers that are known without it. May import: solver, pairs, scan, errors; heads (and torch) where torch is.

With W the identity or two rows, the smallest shift has a closed form; what has none is solved by two engines, and recomputed in numpy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tacfast.errors import TacfastError
from tacfast.pairs import solve_pairs
from tacfast.scan import scan_head
from tacfast.solver import solve

#: Largest relative difference from an answer that is known.
_CLOSE = 1e-9
#: Largest relative difference between logits that torch computed in float32 and Wz + b.
_PROVEN = 1e-4


@dataclass(frozen=True)
class Check:
    """One line of the self-test."""

    name: str
    #: None where it cannot run here.
    ok: bool | None
    #: What was measured, against what is allowed.
    figure: str
    seconds: float


class Absent(Exception):
    """What a check needs is not installed."""


Measured = tuple[bool, str]


def run(check: tuple[str, Callable[[], Measured]]) -> Check:
    """Never raises: whatever goes wrong is what we want to know."""
    name, measure = check
    ok: bool | None
    began = time.perf_counter()
    try:
        ok, figure = measure()
    except Absent as error:
        ok, figure = None, str(error)
    except Exception as error:
        # Other people's messages may hold paths.
        ok, figure = False, str(error) if isinstance(error, TacfastError) else type(error).__name__
    return Check(name, ok, figure, time.perf_counter() - began)


def _difference(found: float, known: float, what: str) -> Measured:
    off = abs(found - known) / abs(known)
    return off <= _CLOSE, f"{what} {found:.6g}, off by {off:.1e} (at most {_CLOSE:.0e})"


def _head(classes: int, dim: int, samples: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(classes, dim)), rng.normal(size=classes), np.abs(rng.normal(size=(samples, dim)))


def two_classes() -> Measured:
    """One rival: the distance of the farthest sample from the plane between the two, max (r)₊ / ‖w_0 - w_1‖."""
    w, b, z = _head(2, 40, 300)
    farthest = (z @ (w[1] - w[0]) + b[1] - b[0]).max()
    return _difference(float(solve(w, b, z).norms[0]), float(farthest / np.linalg.norm(w[0] - w[1])), "norm")


def orthonormal() -> Measured:
    """W = I and one latent, 2 e_0: class 0 has a logit of 2 and class k must meet it halfway, at a cost of √2.

    min ½‖s‖² subject to s_k - s_0 ≥ 2 and s_k - s_j ≥ 0 for the others, whose constraints s = (-1, …, +1, …) satisfies.
    """
    found = solve(np.eye(50), None, 2 * np.eye(50)[:1])
    off = float(np.abs(found.norms[1:] / np.sqrt(2) - 1).max())
    return off <= _CLOSE and found.status[0] == "trivial", f"49 norms, off by {off:.1e} (at most {_CLOSE:.0e})"


def unreachable() -> Measured:
    """A row that is the mean of two others, with a lower bias, never has the largest logit; that takes a proof."""
    w, b, z = _head(8, 6, 100)
    w[7], b[7] = (w[0] + w[1]) / 2, (b[0] + b[1]) / 2 - 1
    found = solve(w, b, z)
    proof = float(found.dual_residual[7])
    return found.status[7] == "unreachable" and np.isinf(found.norms[7]) and proof <= _CLOSE, f"{found.status[7]}, proof to {proof:.1e}"


def engines_agree() -> Measured:
    """Our kernel and Clarabel, which share no code, on random heads."""
    worst = 0.0
    for seed, (classes, dim) in enumerate(((10, 64), (60, 30), (120, 200))):
        w, b, z = _head(classes, dim, 400, seed)
        ours, theirs = (solve(w, b, z, engine=engine) for engine in ("active-set", "clarabel"))
        if (ours.status != theirs.status).any():
            return False, "statuses differ"
        solved = ours.status == "solved"
        worst = max(worst, float(np.abs(ours.norms[solved] / theirs.norms[solved] - 1).max(initial=0)))
    return worst <= _CLOSE, f"190 norms, apart by {worst:.1e} (at most {_CLOSE:.0e})"


def certificates() -> Measured:
    """Every residual again, in numpy, from the problem alone."""
    w, b, z = _head(100, 64, 500)
    again = solve(w, b, z).verify(w, b, z)
    worst = max(float(np.nanmax(again[name])) for name in ("primal", "dual", "gap", "stationarity"))
    return worst <= _CLOSE, f"largest residual {worst:.1e} (at most {_CLOSE:.0e})"


def threads_agree() -> Measured:
    """To the last bit."""
    w, b, z = _head(80, 64, 300)
    one, all_ = solve(w, b, z, threads=1), solve(w, b, z)
    same = bool(np.array_equal(one.perturbations, all_.perturbations, equal_nan=True))
    return same, "1 thread and all of them: the same bits" if same else "1 thread and all of them differ"


def pairs() -> Measured:
    """A pair's norm is that of the same class on the samples of its source alone."""
    w, b, z = _head(6, 20, 120)
    labels = np.arange(120) % 6
    norms = solve_pairs(w, b, z, labels).norms
    worst = 0.0
    for k in range(6):
        alone = solve(w, b, z[labels == k]).norms
        others = np.arange(6) != k
        worst = max(worst, float(np.abs(norms[k, others] / alone[others] - 1).max()))
    return worst <= _CLOSE, f"30 norms, apart by {worst:.1e} (at most {_CLOSE:.0e})"


def verdicts() -> Measured:
    """Twenty classes alike, and the same with a channel, silent on clean samples, that leads into class 3."""
    rng = np.random.default_rng(0)
    w, y = np.eye(20, 64) + rng.normal(size=(20, 64)) * 0.1, np.arange(400) % 20
    z = 3 * np.eye(20, 64)[y] + np.abs(rng.normal(size=(400, 64))) * 0.1
    z[:, -1] = 0
    clean = scan_head(w, None, z)
    w[3, -1] = 5
    flagged = scan_head(w, None, z)
    right = (clean.verdict, flagged.verdict, flagged.targets) == ("clean", "backdoored", (3,))
    return (
        right,
        f"{clean.verdict} (p = {clean.p_value:.2g}); {flagged.verdict}, targets {list(flagged.targets)} (p = {flagged.p_value:.2g})",
    )


def capture() -> Measured:
    """A small network: its head is found, and proven to be the head on every image."""
    try:
        import torch
        from torch import nn
    except ModuleNotFoundError as error:
        if error.name != "torch":  # it is there, and broken
            raise
        raise Absent("torch is not installed: pip install torch") from None

    from tacfast.heads import capture

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        found = capture(model, [torch.rand(60, 3, 8, 8)], device="cpu")
    right = found.latents.shape == (60, 8) and found.proof_error <= _PROVEN
    return right, f"layer {found.name}, |Wz + b - logits| {found.proof_error:.1e} (at most {_PROVEN:.0e})"


CHECKS: tuple[tuple[str, Callable[[], Measured]], ...] = (
    ("two classes, closed form", two_classes),
    ("orthonormal weights, closed form", orthonormal),
    ("an unreachable class, proven", unreachable),
    ("our kernel and Clarabel agree", engines_agree),
    ("certificates, recomputed", certificates),
    ("any number of threads", threads_agree),
    ("pairs", pairs),
    ("a clean and a backdoored head", verdicts),
    ("head of a torch model", capture),
)
