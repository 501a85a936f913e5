"""What all defences share: what they are given, and how weights are trained. May import: torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

#: Images per step of every defence. The papers take 128 or 256 of 2500 images; of fewer images these make as many steps an epoch.
BATCH = 64


class NotApplicable(Exception):
    """The network lacks what the defence works on."""


def as_they_are(images: Tensor, generator: torch.Generator) -> Tensor:
    return images


@dataclass(frozen=True, eq=False)
class Task:
    """A network to repair, and clean data to do it with. No defence changes the network itself."""

    model: nn.Module
    #: float32 (n, channels, H, W) in [0, 1]: the network does its own preprocessing.
    images: Tensor
    #: int64 (n,)
    labels: Tensor
    #: The backdoor's target classes, for the defences that look for triggers.
    targets: tuple[int, ...] = ()
    #: Passes over the images. With 100 of them most defences have the budget of their papers.
    epochs: int = 10
    #: The learning rate of fine-tuning is divided by this: the papers' ruins some networks.
    slower: float = 1.0
    seed: int = 0
    #: Chooses the settings that a paper publishes by data set; those of CIFAR-10 for others than "gtsrb".
    dataset: str = "cifar10"
    #: Augmentation of a batch, for the defences that train with it.
    view: Callable[[Tensor, torch.Generator], Tensor] = as_they_are
    #: Train in bfloat16 where torch's autocast does.
    bfloat16: bool = False

    def copied(self) -> nn.Module:
        """A copy to train, in eval mode."""
        model = copy.deepcopy(self.model).to(memory_format=torch.channels_last).eval()
        for p in model.parameters():
            p.requires_grad_(True)
        return model

    def logits(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            return model(images.contiguous(memory_format=torch.channels_last)).float()

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def batches(self, *, epochs: int | None = None, augmented: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches of all epochs; a last one of a single image would break batch normalisation and is left out."""
        generator = self.generator()
        for _ in range(self.epochs if epochs is None else epochs):
            for index in torch.randperm(len(self.images), generator=generator).split(BATCH):
                if len(index) > 1:
                    images = self.images[index]
                    yield (self.view(images, generator) if augmented else images), self.labels[index]

    def steps(self) -> int:
        whole, rest = divmod(len(self.images), BATCH)
        return self.epochs * (whole + (rest > 1))


def fine_tune(
    task: Task,
    model: nn.Module,
    differentiate: Callable[[Tensor, Tensor], None],
    *,
    lr: float = 0.01,
    weight_decay: float = 5e-4,
    after: Callable[[], None] = lambda: None,
) -> nn.Module:
    """SGD with momentum 0.9 and a cosine to zero, in train mode; returns the model in eval mode.

    `differentiate` adds the gradients of a batch to the weights, `after` runs after each step.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr / task.slower, momentum=0.9, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps())
    model.train()
    for images, labels in task.batches():
        optimizer.zero_grad()
        differentiate(images, labels)
        optimizer.step()
        schedule.step()
        after()
    return model.eval()


def plain(task: Task, model: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """Gradients of the cross-entropy."""
    return lambda images, labels: cross_entropy(task.logits(model, images), labels).backward()


def head_of(model: nn.Module) -> nn.Linear:
    """The last linear layer."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise NotApplicable("no linear layer")
    return linear[-1]


def norms_of(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The batch normalisations with weights, by name."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.affine}
    if not found:
        raise NotApplicable("no batch normalisation")
    return found


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Forward passes inside leave the running statistics of batch normalisation alone."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 0.0
    yield
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum


@torch.no_grad()
def predict(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """int64 (n,): the classes that a model in eval mode answers."""
    return torch.cat([model(part).argmax(1) for part in images.split(500)])
