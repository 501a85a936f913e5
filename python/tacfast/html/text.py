"""Foreign text made harmless to read, and numbers as people read them. May import: nothing.

Names come from model files. Escaping is the template engine's part; this takes out what would still act on a reader: control characters,
marks that turn the direction of writing, towers of accents, and length.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

#: Letters of a name in a table and in a picture.
LONG, SHORT = 80, 22
#: Accents on one letter.
_MARKS = 2


def plain(value: object, most: int | None = None) -> str:
    """What can be seen of a text: no controls, no direction marks, nothing unassigned; cut to `most` letters with an ellipsis."""
    kept, marks = [], 0
    for letter in str(value):
        category = unicodedata.category(letter)
        if category[0] == "C" or category in ("Zl", "Zp"):
            letter, category = " ", "Zs"
        marks = marks + 1 if category[0] == "M" else 0
        if marks <= _MARKS:
            kept.append(letter)
    text = " ".join(word for word in "".join(kept).split(" ") if word)
    return text if most is None or len(text) <= most else text[: most - 1].rstrip() + "…"


def label(k: int, names: list[str | None], most: int = LONG) -> str:
    """A class by its number, and by its name where it has one that says more."""
    name = plain(names[k] or "", most) if k < len(names) else ""
    return f"{k} · {name}" if name and name != str(k) else str(k)


def p_value(p: float | None) -> str:
    """Two significant digits, in plain decimals."""
    if p is None:
        return "none"
    if p >= 0.995:
        return "1.00"
    if p >= 0.1:
        return f"{p:.2f}"
    if p < 1e-6:
        return "< 0.000001"
    digits = max(0, 1 - math.floor(math.log10(p)))
    return f"{p:.{digits}f}"


def sentence(value: str) -> str:
    """With a capital letter, and a full stop at the end."""
    return value[:1].upper() + value[1:] + ("" if value.endswith((".", "!", "?")) else ".")


def share(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.1f}\u00a0%"


def quantity(value: float | None) -> str:
    """Four significant digits; infinity by its sign."""
    if value is None or math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.4g}"


def small(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"


def lines(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A mapping, nested ones too, as names and words."""
    found: list[tuple[str, str]] = []
    for key, entry in list(value.items())[:200]:
        name = f"{prefix}{key}"
        if isinstance(entry, Mapping):
            found += lines(entry, f"{name}: ") if prefix.count(": ") < 3 else []
        elif isinstance(entry, (list, tuple)):
            found.append((name, ", ".join(map(str, entry[:20]))))
        elif entry is not None and entry != "":
            found.append((name, str(entry)))
    return found
