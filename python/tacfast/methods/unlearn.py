"""Shifted latents and perturbed inputs together, with the old network as teacher. May import: torch, training,
perturbations, inner, features, views, naming, universal, heads."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from tacfast.heads import choose_device, head_of, latent_tap, logits_of
from tacfast.methods.features import Features, spread_out
from tacfast.methods.inner import SIZED_ON, InnerPerturbations, added, sites_of
from tacfast.methods.naming import name_targets
from tacfast.methods.perturbations import Perturbations
from tacfast.methods.training import Job, delicate, fit, recompute_statistics, shifted_loss, steps_per_epoch, usual_lr, wide
from tacfast.methods.views import Views, bears_mirrors
from tacfast.universal import Room, watching

BETA = 0.3
STRENGTH = 0.3
#: Share of the teacher's probabilities, beside the label, in what the network is taught.
_TEACHER = 0.8
#: Weight of the distance from what the unrepaired network's inner layers say, beside that from its answers.
_FEATURES = 10.0
#: A rare target is brought to the share of an average class, in delicate networks of five; to a tenth of all samples at most, and all
#: targets together to half of them.
_DELICATE_CLASSES, _OF_TARGET, _OF_TARGETS = 5, 0.1, 0.5


def unlearn(
    model: nn.Module, job: Job, *, beta: float = BETA, strength: float = STRENGTH, lr: float | None = None, epochs: int | None = None
) -> Mapping[str, float]:
    """Train all weights so that neither a latent shift nor a small universal perturbation leads to the target any more.

    Three cross-entropies: on clean images; `beta` times on latents shifted by s_p (arXiv:2511.08944); `strength` times on images under
    universal perturbations towards the target, which are adapted to the network all along: half of them of the input (short ones, a slight
    warping, and ones of few pixels), half behind an inner layer (universal adversarial training, Shafahi et al. 2020, AAAI, here
    with a target; latent adversarial training, Casper et al. 2024, arXiv:2403.05030). The first removes nothing, the second what the head
    reads of a trigger, the third what the layers before it do with one. What is taught is a mixture of the labels and the unrepaired
    network's own answers to the clean images (distillation, Hinton et al. 2015), and beside both cross-entropies on images what three of
    its inner layers say of the clean ones (hints, Romero et al. 2015, arXiv:1412.6550), which keeps the clean accuracy. Images of rare
    targets are taken several times, or the network would unlearn the class with what leads to it; where the network mostly normalises each
    sample, as transformers do, the target's bias is raised in the end if the class is named too seldom (see `name_targets`). `epochs` are
    ten by default, or as many as make a hundred steps, and twice that for such networks.

    Returns:
        The learning rate.

    Raises:
        SolveError: the loss became infinite.
    """
    lr = usual_lr(model) if lr is None else lr
    where = choose_device(model, job.device)
    teacher = copy.deepcopy(model).to(where).eval()
    head = head_of(model, job.captured.name)
    routes = tuple(route.to(where) for route in job.routes)
    room = Room.of(wide(job.images)).to(where)
    outer = Perturbations(routes, room, job.images.shape[1:], job.seed)
    with watching(model.to(where)):
        sites = sites_of(model, wide(job.images[job.train[:SIZED_ON]]).to(where), head)
    inner = InnerPerturbations(sites, routes, job.seed)
    features = Features(model, teacher, spread_out(sites))
    views = Views(bears_mirrors(teacher, job), torch.Generator().manual_seed(job.seed))
    with latent_tap(head) as latest:

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            images = views(images)
            with torch.no_grad(), features.taught():
                answers = logits_of(teacher(images)).softmax(1)
            wanted = _TEACHER * answers + (1 - _TEACHER) * one_hot(labels, answers.shape[1])
            batch, inside = with_perturbed(model, images, labels, outer, inner)
            with features.compared() as distances, inside:
                clean, perturbed = logits_of(model(batch)).tensor_split(2)
            apart = _FEATURES * mean_of(distances)
            return (
                cross_entropy(clean, wanted)
                + apart[0]
                + beta * shifted_loss(head, latest[0][: len(images)], routes, labels, wanted)
                + strength * (cross_entropy(perturbed, wanted) + apart[1])
            )

        fit(model, replace(job, train=taught(model, job)), loss, lr=lr, epochs=epochs or epochs_of(model, job), what="unlearning")
    recompute_statistics(model, job)
    if delicate(model):
        name_targets(model, job)
    return {"lr": lr}


def with_perturbed(
    model: nn.Module, images: Tensor, labels: Tensor, outer: Perturbations, inner: InnerPerturbations
) -> tuple[Tensor, AbstractContextManager[None]]:
    """A batch of images and then the same images under perturbations, half of them in the input, half of them further in: these the model
    gets while the second value lasts.

    One batch, so that batch normalisation sees all kinds together.
    """
    half = len(images) - (len(images) // 2 if inner.sites else 0)
    with watching(model):
        stamped = outer.stamp(model, images[:half], labels[:half])
        place = inner.adapt(model, images[half:], labels[half:]) if half < len(images) else None
    inside = added(*place, first=len(images) + half) if place else nullcontext()
    return torch.cat([images, stamped, images[half:]]), inside


def mean_of(distances: Sequence[Tensor]) -> Tensor:
    """Of clean and of perturbed images (2,), over layers; zeros where no layer ran."""
    return torch.stack(list(distances)).mean(0) if distances else torch.zeros(2)


def epochs_of(model: nn.Module, job: Job) -> int:
    """Ten epochs, or as many as make a hundred steps where the clean samples are few; twice as many for delicate networks."""
    return (2 if delicate(model) else 1) * max(10, -(-100 // steps_per_epoch(job)))


def taught(model: nn.Module, job: Job) -> Tensor:
    """Positions of the training samples (m,), those of rare targets several times."""
    labels = job.labels[job.train]
    average = 1 / len(job.captured.weight)
    share = min(_OF_TARGET, average * (_DELICATE_CLASSES if delicate(model) else 1), _OF_TARGETS / len(job.targets))
    parts = [job.train]
    for target in job.targets:
        own = job.train[labels == target]
        parts += [own] * (round(share * len(labels) / len(own)) - 1 if len(own) else 0)
    return torch.cat(parts)
