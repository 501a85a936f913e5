"""Shifted latents and perturbed inputs together, with the old network as teacher. May import: torch, training,
perturbations, universal, heads."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, pad

from tacfast.heads import choose_device, head_of, latent_tap, logits_of
from tacfast.methods.perturbations import Perturbations
from tacfast.methods.training import Job, fit, recompute_statistics, shifted_loss, steps_per_epoch
from tacfast.universal import Room, watching

LR = 0.03
BETA = 0.3
STRENGTH = 0.3
#: Share of the teacher's probabilities, beside the label, in what the network is taught.
_TEACHER = 0.8


def unlearn(
    model: nn.Module, job: Job, *, beta: float = BETA, strength: float = STRENGTH, lr: float = LR, epochs: int | None = None
) -> None:
    """Train all weights so that neither a latent shift nor a small universal perturbation of the input leads to the target any more.

    Three cross-entropies: on clean images; `beta` times on latents shifted by s_p (arXiv:2511.08944); `strength` times on images under
    universal perturbations towards the target, which are adapted to the network all along (universal adversarial training, Shafahi et al.
    2020, AAAI, here with a target). The first removes nothing, the second what the head reads of a trigger, the third what the layers
    before it do with one. What is taught is a mixture of the labels and the unrepaired network's own answers to the clean images, which
    keeps the clean accuracy (distillation, Hinton et al. 2015). `epochs` are ten by default, or as many as make a hundred steps.

    Raises:
        SolveError: the loss became infinite.
    """
    where = choose_device(model, job.device)
    teacher = copy.deepcopy(model).to(where).eval()
    head = head_of(model, job.captured.name)
    routes = tuple(route.to(where) for route in job.routes)
    room = Room.of(job.images).to(where)
    perturbations = Perturbations(routes, room, job.images.shape[1:], job.seed)
    moves = torch.Generator().manual_seed(job.seed)
    with latent_tap(head) as latest:

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            images = jitter(images, moves)
            with torch.no_grad():
                answers = logits_of(teacher(images)).softmax(1)
            wanted = _TEACHER * answers + (1 - _TEACHER) * one_hot(labels, answers.shape[1])
            with watching(model):
                stamped = perturbations.stamp(model, images, labels)
            # One batch, so that batch normalisation sees both kinds together.
            clean, perturbed = logits_of(model(torch.cat([images, stamped]))).tensor_split(2)
            latents = latest[0][: len(images)]
            return (
                cross_entropy(clean, wanted)
                + beta * shifted_loss(head, latents, routes, labels, wanted)
                + strength * cross_entropy(perturbed, wanted)
            )

        fit(model, job, loss, lr=lr, epochs=epochs or epochs_of(job), what="unlearning")
    recompute_statistics(model, job)


def epochs_of(job: Job) -> int:
    """Ten epochs, or as many as make a hundred steps where the clean samples are few."""
    return max(10, -(-100 // steps_per_epoch(job)))


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """A batch of images moved by up to a sixteenth of their size, all in one direction, the border reflected."""
    if images.ndim != 4:
        return images
    height, width = images.shape[2:]
    up, left = height // 16, width // 16
    dy, dx = (int(torch.randint(0, 2 * by + 1, (), generator=generator)) for by in (up, left))
    return pad(images, (left, left, up, up), mode="reflect")[:, :, dy : dy + height, dx : dx + width]
