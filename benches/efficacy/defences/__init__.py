"""Other people's ways to remove a backdoor, re-implemented from their papers to compare with. May import: torch.

Each is one function from a `Task` to a new network in eval mode, with the settings of its paper; none is tuned for an attack. The folder
benches/efficacy must be on the path.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from defences.anp import anp
from defences.clp import clp
from defences.common import NotApplicable, Task, as_they_are, predict
from defences.fine_pruning import fine_pruning
from defences.fst import fst
from defences.ft import ft
from defences.ft_sam import ft_sam
from defences.neural_cleanse import neural_cleanse
from defences.sau import sau

DEFENCES: dict[str, Callable[[Task], nn.Module]] = {
    "ft": ft,
    "fp": fine_pruning,
    "nc": neural_cleanse,
    "anp": anp,
    "clp": clp,
    "ft-sam": ft_sam,
    "sau": sau,
    "fst": fst,
}

#: Those that fine-tune, and can do it more slowly than their papers.
FINE_TUNING = ("ft", "fp", "nc", "ft-sam", "fst")

__all__ = ["DEFENCES", "FINE_TUNING", "NotApplicable", "Task", "as_they_are", "predict"]
