"""What a page shows beyond a report's verdict: one mapping that JSON can hold, checked when read. May import: solver, verdict.

`explain.py` makes it. All keys but `provenance` are absent where nothing is known:

* `names`: list (C,) of the classes' names, null where one has none; `names_from`: where they were found.
* `shifts`: list of routes, the most suspected class first; where none is suspected, the least inconspicuous one. Each is
    `class`, `source` (null: all sources), `norm`, `channels` (d), `half` (channels that hold half of ‖s‖²),
    `sizes`: |s| of the largest channels, decreasing, at most 400;
    `top`: at most 12 of `channel`, `change` (its entry of s), `spread` (its standard deviation on the clean samples);
    `easiest`, `hardest`: at most 8 of `sample` (its number), `predicted` (its class), `share` (the part of s that moves it there;
    null: no part does).
* `pairs`: (C, C) norms by source and target, null on the diagonal and where infinite.
* `certificate`: `counts` by status; `primal_residual`, `dual_residual`, `gap`: the largest of solved classes; `bound`: the smallest proven
    bound of a solved class over its norm; null without solved classes.
* `convergence`: list of `samples`, `verdict`, `p_value`, `kind`, `targets`: the scan again on some of the samples, last the scan itself.
* `provenance`: words and numbers by name: versions, command line, seed, time.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, get_args

from tacfast.solver import STATUSES
from tacfast.verdict import Kind, Verdict

VERDICTS, KINDS = get_args(Verdict), get_args(Kind)

#: The most that is kept of each.
CHANNELS, TOP, SAMPLES, PAIRED = 400, 12, 8, 60
#: Letters of a name or of a word of provenance that are kept.
LETTERS = 400

Reader = Callable[[Any], Any]


def read_details(value: Any, classes: int) -> dict[str, Any] | None:
    """The details of a report of so many classes, with nothing in them that a page does not expect; None for None.

    Raises:
        KeyError, TypeError, ValueError: they are not such details.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise TypeError("details must be an object")
    of_class = _whole(classes)
    sample = _record(sample=_whole(), predicted=of_class, share=_maybe(number))
    readers: dict[str, Reader] = {
        "names": _list(_maybe(_text), classes, classes),
        "names_from": _text,
        "shifts": _list(
            _record(
                **{"class": of_class, "source": _maybe(of_class), "norm": number, "channels": _whole(), "half": _whole()},
                sizes=_list(number, CHANNELS),
                top=_list(_record(channel=_whole(), change=number, spread=number), TOP),
                easiest=_list(sample, SAMPLES),
                hardest=_list(sample, SAMPLES),
            ),
            SAMPLES,
        ),
        "pairs": _list(_list(_maybe(number), classes, classes), classes, classes),
        "certificate": _record(
            counts=_mapping(_one_of(*STATUSES.tolist()), _whole()),
            **dict.fromkeys(("primal_residual", "dual_residual", "gap", "bound"), _maybe(number)),
        ),
        "convergence": _list(
            _record(
                samples=_whole(),
                verdict=_one_of(*VERDICTS),
                p_value=_maybe(number),
                kind=_maybe(_one_of(*KINDS)),
                targets=_list(of_class, classes),
            ),
            20,
        ),
        "provenance": _mapping(_text, _maybe(_word)),
    }
    return {key: read(value[key]) for key, read in readers.items() if key in value}


def number(value: Any) -> float:
    """A finite one.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {str(value)[:40]!r}")
    if not math.isfinite(value):
        raise ValueError("expected a finite number")
    return float(value)


def optional_number(value: Any) -> float | None:
    """A finite number or None.

    Raises:
        TypeError, ValueError: it is neither.
    """
    return None if value is None else number(value)


def words(value: Any) -> dict[str, Any]:
    """What a caller told of a file: any JSON by name.

    Raises:
        TypeError: it is no object.
    """
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, got {str(value)[:40]!r}")
    return dict(value)


def seconds(value: Any) -> dict[str, float]:
    """Seconds per phase.

    Raises:
        TypeError, ValueError: they are none.
    """
    return {str(phase): number(spent) for phase, spent in words(value).items()}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {str(value)[:40]!r}")
    return value[:LETTERS]


def _word(value: Any) -> Any:
    return _text(value) if isinstance(value, str) else value if isinstance(value, int) else number(value)


def _whole(below: int | None = None) -> Reader:
    def read(value: Any) -> int:
        found = operator.index(value)
        if found < 0 or (below is not None and found >= below):
            raise ValueError(f"{found} is not among the classes" if below is not None else f"{found} is below 0")
        return found

    return read


def _maybe(read: Reader) -> Reader:
    return lambda value: None if value is None else read(value)


def _one_of(*known: str) -> Reader:
    def read(value: Any) -> str:
        if value not in known:
            raise ValueError(f"unknown word {str(value)[:40]!r}")
        return str(value)

    return read


def _list(read: Reader, most: int, least: int = 0) -> Reader:
    def of(value: Any) -> list[Any]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise TypeError(f"expected a list of {least} to {most} entries, got {str(value)[:40]!r}")
        return [read(entry) for entry in value]

    return of


def _record(**fields: Reader) -> Reader:
    def of(value: Any) -> dict[str, Any]:
        return {name: read(words(value)[name]) for name, read in fields.items()}

    return of


def _mapping(key: Reader, read: Reader) -> Reader:
    def of(value: Any) -> Mapping[str, Any]:
        return {key(k): read(v) for k, v in words(value).items()}

    return of
