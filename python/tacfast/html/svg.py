"""A matplotlib figure as a drawing inside a page: small, named, in its fonts and colours. May import: matplotlib, markupsafe."""

from __future__ import annotations

import io
import itertools
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

#: Inches of a drawing on a wide page and on a phone; 72 units each.
WIDE, NARROW = 9.6, 4.4

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"#([\w.-]+)")
_numbers = itertools.count()


@dataclass(frozen=True)
class Palette:
    """The colours of a figure by day. In a page each becomes the style sheet's variable of that name, so no two may be equal."""

    ink: str = "#1c2733"
    soft: str = "#5b6876"
    line: str = "#d5dbe2"
    rest: str = "#7c8fa6"
    band: str = "#e9eef4"
    flag: str = "#c02f1d"
    accent: str = "#2463a6"
    paper: str = "#fffffe"


PALETTE = Palette()
_VARIABLES = {value: f"var(--{field.name})" for field, value in zip(fields(PALETTE), astuple(PALETTE), strict=True)}
_FONT = re.compile(r"(font: [^;']*?[\d.]+px )[^;]*")
_COLOUR = re.compile("|".join(_VARIABLES))


@contextmanager
def drawing() -> Iterator[None]:
    """The settings under which all figures are drawn; whatever the user has set for figures of their own."""
    with warnings.catch_warnings(), mpl.rc_context():
        warnings.simplefilter("ignore")  # a name may use letters that the measuring font lacks; the page's has them
        logging.getLogger("matplotlib.font_manager").addFilter(_silent)
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "tacfast",
                "text.parse_math": False,
                "font.family": "DejaVu Sans",
                "font.size": 9.5,
                "text.color": PALETTE.ink,
                "axes.labelcolor": PALETTE.soft,
                "axes.edgecolor": PALETTE.line,
                "axes.titlecolor": PALETTE.ink,
                "axes.titlesize": 10,
                "axes.titlelocation": "left",
                "axes.facecolor": "none",
                "figure.facecolor": "none",
                "xtick.color": PALETTE.line,
                "ytick.color": PALETTE.line,
                "xtick.labelcolor": PALETTE.soft,
                "ytick.labelcolor": PALETTE.soft,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": False,
                "legend.frameon": False,
                "figure.constrained_layout.use": True,
            }
        )
        try:
            yield
        finally:
            logging.getLogger("matplotlib.font_manager").removeFilter(_silent)


def _silent(record: logging.LogRecord) -> bool:
    return False


def chart(draw: Callable[[float], Figure], name: str, description: str) -> Markup:
    """What `draw` makes of a width in inches, for wide pages and for narrow ones; the style sheet shows one of them.

    Args:
        name, description: for those who do not see it.
    """
    both = [_inline(draw(width), kind, name, description) for width, kind in ((WIDE, "wide"), (NARROW, "narrow"))]
    return Markup("").join(both)


def _inline(figure: Figure, kind: str, name: str, description: str) -> Markup:
    buffer = io.BytesIO()
    with drawing():
        engine = figure.get_layout_engine()
        if engine is not None:  # once here, rather than before a first drawing and after it
            engine.execute(figure)
            figure.set_layout_engine("none")
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(buffer.getvalue().decode())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag not in _DRAWN:
                parent.remove(child)
    _rename(root, f"t{next(_numbers)}")
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if "style" in element.attrib:
            style = _COLOUR.sub(lambda match: _VARIABLES[match[0]], element.attrib["style"])
            element.set("style", _FONT.sub(r"\1var(--sans)", style))
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "class": f"chart {kind}", "role": "img", "aria-label": f"{name}. {description}"})
    # Our own tree, serialised by a library that escapes every text and attribute in it.
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


#: What matplotlib draws with; metadata and style sheets are left behind.
_DRAWN = {_SVG + tag for tag in ("g", "path", "use", "defs", "clipPath", "rect", "text", "tspan", "image", "circle")}


def _rename(root: ElementTree.Element, prefix: str) -> None:
    """Names that no other drawing of the page has; those that nobody asks for go."""
    values = [value for e in root.iter() for key, value in e.attrib.items() if key == _LINK or "url(#" in value]
    asked = {name for value in values if not value.startswith("data:") for name in _REFERENCE.findall(value)}
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in asked:
            element.set("id", f"{prefix}{name}")
        link = element.attrib.pop(_LINK, None)
        if link is not None:
            element.set("href", f"#{prefix}{link[1:]}" if link.startswith("#") else link)
        for key in ("clip-path", "style"):
            if "url(#" in element.attrib.get(key, ""):
                element.set(key, element.attrib[key].replace("url(#", f"url(#{prefix}"))
