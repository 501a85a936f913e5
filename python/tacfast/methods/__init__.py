"""The ways to repair a model, in place on a copy that the caller made; a file each. May import: torch, its own files.

All use the surrogate of the trigger-activated change, s_p: the smallest latent shift into the suspected class p. A backdoored model answers
p on shifted latents; the repaired one shall answer the true class there (arXiv:2511.08944, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tacfast.methods.auto import auto
from tacfast.methods.equalize import equalize
from tacfast.methods.finetune import finetune
from tacfast.methods.head import train_head
from tacfast.methods.prune import prune
from tacfast.methods.reach import reach
from tacfast.methods.routes import Route, routes_of, targets_of
from tacfast.methods.training import Job, trainable
from tacfast.methods.unlearn import unlearn

#: Each changes a model in place; its keyword-only parameters are its options, what it returns the settings that it chose itself.
METHODS: dict[str, Callable[..., Mapping[str, Any] | None]] = {
    "auto": auto,
    "unlearn": unlearn,
    "finetune": finetune,
    "equalize": equalize,
    "head": train_head,
    "prune": prune,
}

__all__ = [
    "METHODS",
    "Job",
    "Route",
    "auto",
    "equalize",
    "finetune",
    "prune",
    "reach",
    "routes_of",
    "targets_of",
    "train_head",
    "trainable",
    "unlearn",
]
