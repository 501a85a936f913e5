"""How far a repair moves a network, where accuracy is too coarse a measure. May import: torch, features, inner, training, heads,
universal, errors.

Of thirty held-out images one is three points of accuracy, and a network may lose more than that on all others without losing one of
these. What an inner layer says of thirty images is thousands of numbers.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from tacfast.errors import SolveError
from tacfast.heads import choose_device, head_of
from tacfast.methods.features import Features, spread_out
from tacfast.methods.inner import SIZED_ON, sites_of
from tacfast.methods.training import FORWARD, Job, wide
from tacfast.universal import watching


class Drift:
    """Tells how far what the last inner layer of a network says of held-out clean images is from what it said when this was made."""

    def __init__(self, model: nn.Module, job: Job) -> None:
        self.job, self.where = job, choose_device(model, job.device)
        self.model = model.to(self.where).eval()
        self.teacher = copy.deepcopy(model)
        with watching(model):
            sites = sites_of(model, self._images(job.train[:SIZED_ON]), head_of(model, job.captured.name))
        self.features = Features(model, self.teacher, spread_out(sites, 1))

    def __call__(self) -> float | None:
        """The squared distance, relative to the spread of what the layer says; the mean over images. None where there is no such layer.
        Leaves the model in eval mode.

        Raises:
            SolveError: it is infinite, as after a last step that made it so.
        """
        self.model.eval()
        total = 0.0
        for part in self.job.held.split(FORWARD):
            images = self._images(part)
            with torch.no_grad(), self.features.taught():
                self.teacher(images)
            with torch.no_grad(), self.features.compared() as distances:
                self.model(images)
            if not distances:
                return None
            total += len(part) * float(distances[0])
        if not math.isfinite(total):
            raise SolveError("training diverged; a smaller lr or beta is needed")
        return total / len(self.job.held)

    def _images(self, index: Tensor) -> Tensor:
        return wide(self.job.images[index]).to(self.where)
