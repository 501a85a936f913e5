"""Where a backdoor sends whom. May import: torch, solver, pairs, heads, errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tacfast.errors import SolveError
from tacfast.heads import Captured
from tacfast.pairs import solve_pairs
from tacfast.solver import solve


@dataclass(frozen=True, eq=False)
class Route:
    """Where a backdoor sends the samples of each class, and the smallest latent shifts that do the same (arXiv:2511.08944, eq. of s_k)."""

    #: int64 (C,): the class that samples of class y are sent to; y itself where the backdoor leaves them alone.
    wanted: Tensor
    #: float32 (C, d): the shift of samples of class y; zeros where they are left alone.
    shifts: Tensor

    def to(self, device: torch.device) -> Route:
        return Route(self.wanted.to(device), self.shifts.to(device))


def targets_of(routes: Sequence[Route]) -> list[int]:
    """All classes that some other class is sent to."""
    return sorted({int(p) for route in routes for y, p in enumerate(route.wanted) if p != y})


def routes_of(captured: Captured, labels: Tensor, targets: tuple[int, ...], pairs: Sequence[tuple[int, int]]) -> tuple[Route, ...]:
    """A route for each target, from all classes; or for pairs as few as there are targets of one source."""
    if pairs:
        return _pair_routes(captured, labels, pairs)
    if not targets:
        return ()
    solutions = solve(captured.weight, captured.bias, captured.latents, classes=targets)
    classes, routes = len(captured.weight), []
    for k, status, shift in zip(targets, solutions.status, solutions.perturbations, strict=True):
        _need_shift(f"class {k}", status)
        routes.append(Route(torch.full((classes,), k), torch.from_numpy(shift).float().expand(classes, -1)))
    return tuple(routes)


def _pair_routes(captured: Captured, labels: Tensor, pairs: Sequence[tuple[int, int]]) -> tuple[Route, ...]:
    solutions = solve_pairs(captured.weight, captured.bias, captured.latents, labels.numpy(), targets=sorted({k for _, k in pairs}))
    classes, d = captured.weight.shape
    routes: list[Route] = []
    for source, target in pairs:
        if solutions.status[source, target] == "none":
            continue  # no clean sample of the source: nothing to train on either
        _need_shift(f"class {source} to {target}", solutions.status[source, target])
        free = (r for r in routes if int(r.wanted[source]) == source)
        route = next(free, None)
        if route is None:
            route = Route(torch.arange(classes), torch.zeros(classes, d))
            routes.append(route)
        route.wanted[source] = target
        route.shifts[source] = torch.from_numpy(solutions.perturbation(source, target)).float()
    return tuple(routes)


def _need_shift(what: str, status: str) -> None:
    if status not in ("solved", "trivial"):
        raise SolveError(f"{what} ended {status}: there is no shift to repair against")
