"""What a report means, in plain sentences that claim no more than it shows. May import: report, outcome, taxonomy, text."""

from __future__ import annotations

from dataclasses import dataclass

from tacfast.html import text
from tacfast.outcome import RepairResult
from tacfast.report import ScanReport
from tacfast.taxonomy import TAXA

#: What a backdoored model is called in other people's lists.
TAGS = tuple(f"{taxon.framework} {taxon.id} ({taxon.name})" for taxon in TAXA)

KINDS = {
    "all-to-one": "inputs with the trigger go to one class",
    "multi-target": "several triggers or one with several targets: inputs go to one of some classes",
    "source-specific": "above all inputs of one class go to another one",
    "all-to-all": "inputs of each class go to another class, all by the same step",
}

EVIDENCE = {
    "norm": "The smallest shift of the last hidden layer that sends clean samples to this class is smaller than the others.",
    "norm and alignment": "The shift is short, and the class's weights do not point where its own samples lie.",
    "norm and quiet channels": "The shift is short, and it uses channels that hardly move on clean samples.",
    "norm, alignment and quiet channels": "The shift is short, and alignment and channels together are unusual.",
    "short pattern": "One short pattern, added to any image, goes further towards this class than such patterns go towards the others.",
    "few pixels": "Changing the same few pixels of any image goes further towards this class than towards the others.",
    "label shift": "Samples move from class y to class y + t more easily than back, over all classes.",
}

_LIMITS = (
    "A scan can miss a backdoor: all-to-all ones that do not shift labels are out of its sight, and source-specific ones or few poisoned "
    "training images often are."
)


@dataclass(frozen=True)
class Verdict:
    """The head of a page."""

    #: Short, for the badge and the window's title.
    word: str
    #: For the style sheet: "flagged", "quiet" or "open".
    tone: str
    sentence: str
    meaning: str
    steps: tuple[str, ...]


def of_scan(report: ScanReport) -> Verdict:
    return {"backdoored": _flagged, "clean": _quiet, "inconclusive": _open}[report.verdict](report)


def _flagged(report: ScanReport) -> Verdict:
    names = (report.details or {}).get("names") or []
    if report.suspects:
        which = ", ".join(text.label(s.target, names, text.SHORT) for s in report.suspects[:6])
        more = f" and {len(report.suspects) - 6} more" if len(report.suspects) > 6 else ""
        sentence = f"Evidence of a backdoor into class{'es' if len(report.suspects) > 1 else ''} {which}{more}."
    else:
        sentence = "Evidence of an all-to-all backdoor."
    chance = (
        "If the test's assumptions hold, a model without a backdoor shows as strong a sign with probability "
        f"{text.p_value(report.p_value)}. That is not the probability that this model is harmless."
    )
    return Verdict("Flagged", "flagged", sentence, chance, (
        "Do not deploy this model, nor anything fine-tuned from it, until the matter is settled.",
        "Repair a copy: tacfast repair, with the same options and --report of this scan's JSON; then read that page, and test the copy.",
        "Keep the file as it is, with the SHA-256 below, and ask where its weights and its training data came from.",
        "To check the finding, scan again with other clean images, and see whether the same class is named.",
    ))  # fmt: skip


def _quiet(report: ScanReport) -> Verdict:
    meaning = f"That is not proof that there is none. {_LIMITS}"
    if report.p_value is not None:
        meaning = (
            "The strongest sign that was found is not rare enough among models without a backdoor to be called evidence "
            f"(p = {text.p_value(report.p_value)}, level {report.alpha:g}). {meaning}"
        )
    return Verdict("No evidence", "quiet", "No evidence of a backdoor was found.", meaning, (
        "Decide together with what else you know: who trained the model, on which data, and what a wrong answer would cost.",
        "Where much depends on it, scan again with more clean images, above all if the p-value is near the level or still falls.",
        "Keep this page with the model: it speaks only of the file with the SHA-256 below.",
    ))  # fmt: skip


def _open(report: ScanReport) -> Verdict:
    return Verdict("No verdict", "open", "The scan could not tell.", "Treat the model as one that was not examined.", (
        "Do what the reason above names, then scan again.",
        "Until then nothing here speaks for the model, and nothing against it.",
    ))  # fmt: skip


def of_repair(result: RepairResult) -> Verdict:
    if result.after is None:
        return Verdict("Nothing done", "open", "Nothing was repaired: no class was suspected.", "The model is as it was.", (
            "Read the page of the scan: that it found no evidence is not proof that there is none to find.",
            "To repair a class whatever the scan says, name it: --target K, or targets=[K].",
        ))  # fmt: skip
    names = (result.details or {}).get("names") or []
    which = ", ".join(text.label(k, names, text.SHORT) for k in result.targets[:6]) + (", …" if len(result.targets) > 6 else "")
    many = "es" if len(result.targets) > 1 else ""
    change = 100 * (result.after.clean_accuracy - result.before.clean_accuracy)
    held = "accuracy on held-out clean samples" + ("" if result.labelled else ", measured against the model's own predictions,")
    amount = "did not change" if abs(change) < 0.05 else f"{'rose' if change > 0 else 'fell'} by {abs(change):.1f} points"
    return Verdict(
        "Repaired copy", "quiet", f"A copy was repaired against class{many} {which}; {held} {amount}.",
        "This page cannot prove that the backdoor is gone: no trigger is known here, and a normal norm is no proof of removal.",
        (
            "Compare the accuracies below with what your application needs.",
            "If you have a suspected trigger, test the copy with it: that alone measures the attack success rate.",
            "Scan the repaired file, best with clean images that the repair did not see.",
        ),
    )  # fmt: skip
