"""Which networks are trained, and in which order: any prefix of the plan is a fair sample of the whole.

A round gives every data set four pairs of one clean and one poisoned network: two ResNets, on an even and an odd seed, every third of
them wide, one of another architecture, and a ResNet that is hardly trained; then a second poisoned network beside one of the clean
ResNets, with a trigger that was learnt on it. Attacks and targets rotate with the round, at another phase in each of these places, so that
every attack meets both parities of the seed: rules are chosen on even seeds and reported on odd ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from tacfast.attacks import AllToAll, AllToOne, Backdoor, Blend, LowFrequency, Patch, Sinusoid, SourceSpecific, Trigger, Warp

#: Attack and nominal poisoning rate, in the order of their turns. Their number has no factor in common with the periods of the
#: architectures and of the parity, so that all combinations come up.
TURNS: tuple[tuple[str, float], ...] = (
    ("badnets", 0.1),
    ("wanet", 0.1),
    ("badnets", 0.01),
    ("blend", 0.1),
    ("all-to-all", 0.1),
    ("blend", 0.01),
    ("multi-target", 0.1),
    ("sig", 0.1),
    ("wanet", 0.01),
    ("source-specific", 0.02),
    ("multi-trigger", 0.1),
    ("lf", 0.1),
    ("badnets", 0.05),
    ("lf", 0.01),
    ("badnets", 0.005),
    ("blend", 0.05),
    ("blend", 0.005),
)

#: Attacks whose trigger is learnt on the clean network of the pair, at rate 0.1; one in every round.
LEARNED = ("trojan", "lira", "iab")

OTHERS = ("vgg", "mobilenet", "vit")
#: Turns between the places of a round, so that they train different attacks.
_PHASES = (0, 7, 11, 3)


@dataclass(frozen=True)
class Job:
    """One network: what is trained on what, and how it is poisoned."""

    dataset: str
    arch: str
    attack: str
    rate: float
    #: None for clean networks; the first target of several; the shift of all-to-all.
    target: int | None
    seed: int

    @property
    def key(self) -> str:
        """Names the job in results, files and locks."""
        target = "none" if self.target is None else self.target
        return f"{self.dataset}-{self.arch}-{self.attack}-{self.rate:g}-{target}-{self.seed}"

    @classmethod
    def parse(cls, key: str, archs: tuple[str, ...]) -> Job:
        """The job of a key, for networks beside the plan.

        Raises:
            ValueError: it is not a key.
        """
        names = "|".join(sorted(archs, key=len, reverse=True))
        found = re.fullmatch(rf"([^-]+)-({names})-([a-z-]+)-([0-9.]+)-(none|[0-9]+)-([0-9]+)", key)
        if found is None:
            raise ValueError(f"a network's key is DATASET-ARCH-ATTACK-RATE-TARGET-SEED, got {key!r}")
        dataset, arch, attack, rate, target, seed = found.groups()
        return cls(dataset, arch, attack, float(rate), None if target == "none" else int(target), int(seed))

    def to_dict(self) -> dict[str, Any]:
        return {"key": self.key, **asdict(self)}


def backdoors(job: Job, classes: int, side: int) -> list[Backdoor]:
    """The job's attack, where its triggers are not learnt; those with a random part differ from seed to seed. Patches grow with the side of
    the images, in pixels: 3 for all up to 63, 6 for 64."""
    if job.target is None:
        return []
    patch = partial(Patch, size=3 * max(1, side // 32))
    if job.attack == "all-to-all":
        return [Backdoor(patch(), AllToAll(classes, job.target))]
    if job.attack == "source-specific":
        return [Backdoor(patch(), SourceSpecific(source_of(job, classes), job.target))]
    patches = [patch(), patch(corner="top-left", seed=job.seed), patch(corner="bottom-left", seed=job.seed + 1000)]
    if job.attack == "multi-target":
        targets = [(job.target + i * max(1, classes // 3)) % classes for i in range(3)]
        return [Backdoor(trigger, AllToOne(target)) for trigger, target in zip(patches, targets, strict=True)]
    if job.attack == "multi-trigger":
        return [Backdoor(trigger, AllToOne(job.target)) for trigger in (patch(), Blend(seed=job.seed), Sinusoid())]
    single: dict[str, Trigger] = {
        "badnets": patch(),
        "blend": Blend(seed=job.seed),
        "sig": Sinusoid(),
        "wanet": Warp(strength=1.0, seed=job.seed),
        "lf": LowFrequency(seed=job.seed),
    }
    return [Backdoor(single[job.attack], AllToOne(job.target))]


def source_of(job: Job, classes: int) -> int:
    """The source class of a source-specific attack."""
    assert job.target is not None
    return (job.target + 1 + job.seed % (classes - 1)) % classes


def target_of(attack: str, seed: int, classes: int) -> int:
    """Rotates through all classes on the even seeds, and likewise on the odd ones."""
    return 1 if attack == "all-to-all" else (3 * (seed // 2) + 4 * (seed % 2) + 1) % classes


def pair(dataset: str, arch: str, turn: int, seed: int, classes: int) -> Iterator[Job]:
    """The clean network of a seed and the poisoned one beside it."""
    attack, rate = TURNS[turn % len(TURNS)]
    yield Job(dataset, arch, "clean", 0.0, None, seed)
    yield Job(dataset, arch, attack, rate, target_of(attack, seed, classes), seed)


def resnet(seed: int) -> str:
    return "resnet-wide" if seed % 3 == 2 else "resnet"


def plan(classes: dict[str, int], rounds: int) -> Iterator[Job]:
    """All jobs, in order; `classes` maps data sets to their number of classes."""
    for turn in range(rounds):
        other = OTHERS[turn % len(OTHERS)], turn // len(OTHERS)
        places = ((resnet(2 * turn), 2 * turn), other, (resnet(2 * turn + 1), 2 * turn + 1), ("resnet-short", turn))
        for place, (arch, seed) in enumerate(places):
            for number, (dataset, count) in enumerate(classes.items()):
                yield from pair(dataset, arch, turn + _PHASES[place] + 4 * number, seed, count)
        seed = 2 * turn + turn // len(LEARNED) % 2
        for number, (dataset, count) in enumerate(classes.items()):
            attack = LEARNED[(turn + number) % len(LEARNED)]
            yield Job(dataset, resnet(seed), attack, 0.1, target_of(attack, seed + 1, count), seed)
