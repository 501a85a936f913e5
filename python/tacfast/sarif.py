"""A scan as SARIF 2.1.0 (OASIS), for code scanning. May import: report, taxonomy. A pure function of the report.

GitHub's code scanning makes an alert of every result, whatever its `kind` says, and wants `results` to be there: a clean scan is
therefore a run with an empty list, and what it found is said by the run's invocation. A result needs a physical location with a line,
even in a file that has none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from tacfast._rust import __version__
from tacfast.report import ScanReport
from tacfast.taxonomy import ATLAS, OWASP, TAXA, Taxon

SCHEMA_URI = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
#: The method that the tool implements.
_INFORMATION = "https://arxiv.org/abs/2511.08944"
_LISTS = {
    ATLAS: ("MITRE", "https://atlas.mitre.org/"),
    OWASP: ("OWASP Foundation", "https://owasp.org/www-project-machine-learning-security-top-10/"),
}
_INCONCLUSIVE = "inconclusive"
_CAUTION = "This is statistical evidence, not proof: at this level some clean models are flagged too."
_WHAT_NEXT = "Do not deploy the model before this is explained; `tacfast repair` makes a copy without the shortcut, to be scanned again."
#: By rule id, which is the report's kind: name, short description, level, full description, what to do.
_RULES: dict[str, tuple[str, str, str, str, str]] = {
    "all-to-one": (
        "AllToOneBackdoor",
        "Evidence of a backdoor into one class.",
        "error",
        "One class is abnormally easy to reach from every other class, as the target class of a backdoor is.",
        _WHAT_NEXT,
    ),
    "multi-target": (
        "MultiTargetBackdoor",
        "Evidence of backdoors into several classes.",
        "error",
        "Several classes are abnormally easy to reach from every other class, as the target classes of backdoors are.",
        _WHAT_NEXT,
    ),
    "source-specific": (
        "SourceSpecificBackdoor",
        "Evidence of a backdoor from one class into another.",
        "error",
        "One class is abnormally easy to reach, above all from one other class.",
        _WHAT_NEXT,
    ),
    "all-to-all": (
        "AllToAllBackdoor",
        "Evidence of a backdoor that shifts labels.",
        "error",
        "Samples of every class move to the class a fixed number further more easily than back.",
        _WHAT_NEXT,
    ),
    _INCONCLUSIVE: (
        "InconclusiveScan",
        "The scan could not conclude.",
        "warning",
        "Nothing was found, and nothing was ruled out: the reason says what was missing.",
        "Mend what the reason names, and scan again; until then the model counts as not scanned.",
    ),
}
_EXIT = {
    "clean": (0, "no evidence of a backdoor"),
    "backdoored": (1, "evidence of a backdoor"),
    "inconclusive": (3, "nothing could be concluded"),
}


def to_sarif(report: ScanReport, *, uri: str | None = None) -> dict[str, Any]:
    """A SARIF 2.1.0 log with one run, ready for JSON.

    Args:
        uri: the model's path relative to the root of the sources, with "/"; by default the name in the report. Where there is neither,
            a result has no location, and GitHub does not take it.
    """
    uri = uri or report.file.get("model")
    location = None if uri is None else {"uri": quote(uri), "uriBaseId": "%SRCROOT%"}
    code, meaning = _EXIT[report.verdict]
    results = [] if report.verdict == "clean" else [_result(report, location)]
    # What is no result of its own is said here: the reason of a clean scan, and what was chosen or doubted on the way.
    said = [*([] if results else [report.reason]), *(str(n) for n in report.file.get("notes", ()) if n != report.reason)]
    invocation = {
        "executionSuccessful": True,
        "exitCode": code,
        "exitCodeDescription": meaning,
        "toolExecutionNotifications": [{"level": "note", "message": {"text": text}} for text in said],
    }
    run: dict[str, Any] = {
        "tool": {"driver": _driver()},
        "taxonomies": [_taxonomy(taxon) for taxon in TAXA],
        "invocations": [invocation],
        "results": results,
        "properties": _facts(report),
    }
    if location is not None:
        # So that scans of several models in one repository do not replace one another.
        run["automationDetails"] = {"id": f"tacfast/{uri}/"}
        digest = report.file.get("sha256")
        hashes = {} if digest is None else {"hashes": {"sha-256": digest}}
        run["artifacts"] = [{"location": location, "roles": ["analysisTarget"], **hashes}]
    return {"$schema": SCHEMA_URI, "version": "2.1.0", "runs": [run]}


def _driver() -> dict[str, Any]:
    return {
        "name": "tacfast",
        "version": __version__,
        "semanticVersion": __version__,
        "informationUri": _INFORMATION,
        "supportedTaxonomies": [{"name": taxon.framework, "index": i} for i, taxon in enumerate(TAXA)],
        "rules": [_rule(name) for name in _RULES],
    }


def _rule(rule: str) -> dict[str, Any]:
    name, short, level, full, help_text = _RULES[rule]
    targets = [{"target": _reference(taxon), "kinds": ["relevant"]} for taxon in TAXA]
    return {
        "id": rule,
        "name": name,
        "shortDescription": {"text": short},
        "fullDescription": {"text": f"{full} {_CAUTION}" if level == "error" else full},
        "help": {"text": help_text},
        "helpUri": _INFORMATION,
        "defaultConfiguration": {"level": level},
        # Of no threat may be spoken where nothing was found.
        **({"relationships": targets} if level == "error" else {}),
        "properties": {"tags": ["security", "machine-learning", *((t.id for t in TAXA) if level == "error" else ())]},
    }


def _reference(taxon: Taxon) -> dict[str, Any]:
    return {"id": taxon.id, "index": 0, "toolComponent": {"name": taxon.framework, "index": TAXA.index(taxon)}}


def _taxonomy(taxon: Taxon) -> dict[str, Any]:
    organization, uri = _LISTS[taxon]
    taxa = [{"id": taxon.id, "name": taxon.name, "helpUri": taxon.url, "shortDescription": {"text": taxon.name}}]
    return {"name": taxon.framework, "organization": organization, "informationUri": uri, "isComprehensive": False, "taxa": taxa}


def _result(report: ScanReport, location: Mapping[str, Any] | None) -> dict[str, Any]:
    """The one finding of a scan that is not clean."""
    rule = report.kind if report.verdict == "backdoored" and report.kind is not None else _INCONCLUSIVE
    level, short = _RULES[rule][2], _RULES[rule][1]
    targets = [s.target for s in report.suspects]
    text = f"{short} {report.reason[:1].upper()}{report.reason[1:]}."
    # The same finding in the next version of the model is the same alert.
    mark = hashlib.sha256(f"{rule}:{targets}:{list(report.pairs)}".encode()).hexdigest()
    finding: dict[str, Any] = {
        "ruleId": rule,
        "ruleIndex": list(_RULES).index(rule),
        "level": level,
        "message": {"text": f"{text} {_CAUTION}" if level == "error" else text},
        # The first is the only one that GitHub reads.
        "partialFingerprints": {"primaryLocationLineHash": mark, "tacfastFinding/v1": mark},
        "properties": {
            "kind": report.kind,
            "suspects": [s.to_dict() for s in report.suspects],
            "pairs": [list(pair) for pair in report.pairs],
            "evidence": [e.to_dict() for e in report.evidence],
        },
    }
    if level == "error":
        finding["taxa"] = [_reference(taxon) for taxon in TAXA]
    if location is not None:
        place = {"artifactLocation": {**location, "index": 0}, "region": {"startLine": 1}}
        finding["locations"] = [{"physicalLocation": place}]
    return finding


def _facts(report: ScanReport) -> dict[str, Any]:
    """Figures of the run, by the names of the report's JSON."""
    facts = {
        "verdict": report.verdict,
        "p_value": report.p_value,
        "alpha": report.alpha,
        "quantile": report.quantile,
        "mad_index": report.mad_index,
        "stability": report.stability,
        "moved": report.moved,
        "classes": len(report.norms),
        "samples": report.samples,
        "clean_accuracy": report.clean_accuracy,
        "data_sha256": report.file.get("data_sha256"),
    }
    return {name: value for name, value in facts.items() if value is not None}
