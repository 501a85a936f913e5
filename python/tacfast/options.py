"""The options of the command line that several commands share, in the groups that --help shows. May import: typer."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

#: Groups of commands, and of options.
FIND, SOLVER, INSTALLED = "Find and remove", "The solver by itself", "This installation"
MODEL, IMAGES, VERDICT, METHOD, OUTPUT, RUN = "The model", "Clean images", "Verdict", "Repair", "Output", "How it runs"


class EngineName(str, Enum):
    """The solver's engines, as choices."""

    AUTO = "auto"
    ACTIVE_SET = "active-set"
    CLARABEL = "clarabel"
    CLARABEL_FULL = "clarabel-full"


class MethodName(str, Enum):
    """The ways to repair, as choices."""

    AUTO = "auto"
    UNLEARN = "unlearn"
    FINETUNE = "finetune"
    EQUALIZE = "equalize"
    HEAD = "head"
    PRUNE = "prune"


Arch = Annotated[
    str | None,
    typer.Option(
        help="torchvision:NAME, timm:NAME, a folder with config.json, or file.py:factory (your own code: it is run). "
        "Not needed for a model folder.",
        rich_help_panel=MODEL,
    ),
]
ArchArgs = Annotated[
    list[str] | None,
    typer.Option("--arch-arg", help="key=value for the architecture; may be given several times.", rich_help_panel=MODEL),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Clean images: a folder (subfolders are classes), or an .npz with x (n,H,W,3) uint8 and y, or x as .npy; some hundred.",
        rich_help_panel=IMAGES,
    ),
]
Mean = Annotated[
    str | None, typer.Option(help="Per-channel mean of pixels in [0, 1], if not what the model's library says.", rich_help_panel=IMAGES)
]
Std = Annotated[str | None, typer.Option(help="Per-channel standard deviation.", rich_help_panel=IMAGES)]
Size = Annotated[int | None, typer.Option(min=1, help="Resize images to SIZE x SIZE.", rich_help_panel=IMAGES)]
Limit = Annotated[int, typer.Option(min=1, help="Use at most this many images, a random subset.", rich_help_panel=IMAGES)]
Alpha = Annotated[
    float, typer.Option(help="Significance level in (0, 1): the share of clean models that may be flagged.", rich_help_panel=VERDICT)
]
Patterns = Annotated[
    bool | None,
    typer.Option(
        "--patterns/--no-patterns",
        help="Look at patterns of the input too; by default if that is not likely to take more than ten minutes.",
        show_default=False,
        rich_help_panel=VERDICT,
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the report here, as JSON; - is standard output.", rich_help_panel=OUTPUT)]
Sarif = Annotated[
    Path | None,
    typer.Option("--sarif", help="Write SARIF 2.1.0 here, for code scanning; - is standard output.", rich_help_panel=OUTPUT),
]
Html = Annotated[
    Path | None,
    typer.Option("--html", help="Write a page for people here: one file, no scripts, loads nothing.", rich_help_panel=OUTPUT),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="One line: the answer. Warnings and errors still show.", rich_help_panel=OUTPUT)]
NoColor = Annotated[
    bool, typer.Option("--no-color", help="No colours and no progress bars, as where NO_COLOR is set.", rich_help_panel=OUTPUT)
]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, mps, ...", rich_help_panel=RUN)]
Threads = Annotated[int | None, typer.Option(min=1, help="Solver threads; all cores by default.", rich_help_panel=RUN)]
Engine = Annotated[EngineName, typer.Option(help="auto: our kernel, and Clarabel for what it cannot certify.", rich_help_panel=RUN)]
