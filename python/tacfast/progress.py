"""One progress bar, and one stopwatch, for everything that takes long. May import: rich."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

Item = TypeVar("Item")


def track(items: Iterable[Item], what: str, *, shown: bool, total: int | None = None) -> Iterator[Item]:
    """Yield `items`; when `shown`, draw a bar on standard error with the time left, gone when it is done."""
    if not shown:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    with _bar() as bar:
        yield from bar.track(items, description=what, total=total)


@contextmanager
def counter(what: str, *, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """What the solver's `progress` wants: None, or when `shown` a function of (done, total) that draws the same bar."""
    if not shown:
        yield None
        return
    with _bar() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _bar() -> Progress:
    """What, how far, and the time left, in 40 columns."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=14), TaskProgressColumn(), TimeRemainingColumn(compact=True))
    return Progress(*columns, TextColumn("left"), console=Console(stderr=True), transient=True)


@contextmanager
def timed(timing: dict[str, float], phase: str) -> Iterator[None]:
    """Add the seconds of a block to a phase."""
    started = time.perf_counter()
    yield
    timing[phase] = timing.get(phase, 0.0) + time.perf_counter() - started
