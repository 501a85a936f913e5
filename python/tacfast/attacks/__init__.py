"""Backdoor attacks, for whoever wants to test a scanner. May import: torch, numpy, errors.

A backdoor is a trigger, which stamps images, and a label rule, which says whose stamped images get which label. An attack is one backdoor
or several:

    from tacfast.attacks import AllToOne, Backdoor, Patch, PoisonedDataset, attack_success_rate

    backdoor = Backdoor(Patch(), AllToOne(7))
    train = PoisonedDataset(clean, [backdoor], rate=0.1, seed=0)      # train on it as on any dataset
    attack_success_rate(model, backdoor, test_images, test_labels)

Several targets are several triggers with a rule each; several triggers of one target are the same with one rule. Triggers that are
optimised against a classifier come from a class method: `TrojanPatch.learn`, `Lira.learn`, `InputAware.learn`.
"""

from __future__ import annotations

from tacfast.attacks.labels import AllToAll, AllToOne, CoversOnly, LabelRule, SourceSpecific
from tacfast.attacks.learned import InputAware, Lira, TrojanPatch
from tacfast.attacks.poisoning import Backdoor, PoisonedDataset, Poisoning, attack_success_rate, choose, poison, triggered
from tacfast.attacks.triggers import Blend, LowFrequency, Patch, Sinusoid, Trigger, Warp

__all__ = [
    "AllToAll",
    "AllToOne",
    "Backdoor",
    "Blend",
    "CoversOnly",
    "InputAware",
    "LabelRule",
    "Lira",
    "LowFrequency",
    "Patch",
    "PoisonedDataset",
    "Poisoning",
    "Sinusoid",
    "SourceSpecific",
    "Trigger",
    "TrojanPatch",
    "Warp",
    "attack_success_rate",
    "choose",
    "poison",
    "triggered",
]
