"""What a scan says, in Python and in JSON. May import: solver, verdict, taxonomy, files, errors."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tacfast._rust import __version__
from tacfast.errors import CheckpointError
from tacfast.files import read_bytes
from tacfast.solver import STATUSES, TacSolutions
from tacfast.taxonomy import tags
from tacfast.verdict import Evidence, Kind, Suspect, Verdict

SCHEMA = "tacfast.scan/1"

#: Bytes of a report file; that of a thousand classes has some hundred thousand.
_LARGEST_REPORT = 64 << 20


@dataclass(frozen=True, repr=False, eq=False)
class ScanReport:
    """What a scan found. True when it calls the model backdoored."""

    verdict: Verdict
    #: One sentence that says why.
    reason: str
    #: The probability that a model without a backdoor shows as strong a sign of one, of whatever kind; None where nothing could be tested.
    p_value: float | None
    #: Classes that are abnormally easy to reach, the most abnormal first; none for "all-to-all".
    suspects: tuple[Suspect, ...]
    #: What the backdoor looks like: "all-to-one", "multi-target", "source-specific" or "all-to-all"; None where there is none.
    kind: Kind | None
    #: (source, target) classes of an all-to-all or a source-specific backdoor.
    pairs: tuple[tuple[int, int], ...]
    #: What each kind of evidence says by itself.
    evidence: tuple[Evidence, ...]
    #: float64 (C,): norm of the smallest shift into each class; +inf where unreachable.
    norms: NDArray[np.float64]
    #: str (C,): see `TacSolutions.status`.
    status: NDArray[np.str_]
    #: float64 (C,): cosine between a class's weights and the mean latent of its samples, both centred; NaN with too few samples.
    alignment: NDArray[np.float64]
    #: float64 (C,): standard deviation, on the samples, of the latent channels that the smallest shift uses; NaN without a shift.
    spread: NDArray[np.float64]
    #: The field's usual index of the smallest norm. Shown, never used.
    mad_index: float | None
    #: Of the most abnormal class: the share of disjoint halves of the samples that would have named it (or another suspect) first, and the
    #: share of samples that its shift really moves there. None where that was not looked at.
    stability: float | None
    moved: float | None
    samples: int
    #: Accuracy on the given samples; None without labels.
    clean_accuracy: float | None
    #: Significance level and order statistic of the scan.
    alpha: float
    quantile: float
    #: Seconds per phase.
    timing_s: Mapping[str, float]
    #: Name of the last layer and largest relative |Wz + b - logits|, where a model was scanned.
    head: Mapping[str, Any] | None = None
    #: The solved problems; None in a report that was read from a file.
    solutions: TacSolutions | None = None
    #: Provenance: SHA-256 of the model file and whatever else the caller knows.
    file: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        p = "" if self.p_value is None else f", p={self.p_value:.2g}"
        kind = "" if self.kind is None else f", {self.kind}"
        suspects = [s.target for s in self.suspects]
        return f"ScanReport({self.verdict}{kind}{p}, suspects={suspects}, {len(self.norms)} classes, {self.samples} samples)"

    @property
    def targets(self) -> tuple[int, ...]:
        """Classes that a backdoor sends samples to: the suspects, or the targets of its pairs."""
        return tuple(s.target for s in self.suspects) or tuple(sorted({target for _, target in self.pairs}))

    def __bool__(self) -> bool:
        return self.verdict == "backdoored"

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it: schema `tacfast.scan/1`, null for infinite norms and unknown alignments."""
        return {
            "schema": SCHEMA,
            "tool_version": __version__,
            "verdict": self.verdict,
            "reason": self.reason,
            "p_value": self.p_value,
            "tags": tags(self.verdict),
            "kind": self.kind,
            "suspects": [s.to_dict() for s in self.suspects],
            "pairs": [list(pair) for pair in self.pairs],
            "evidence": [e.to_dict() for e in self.evidence],
            "norms": _nullable(self.norms),
            "status": self.status.tolist(),
            "alignment": _nullable(self.alignment),
            "spread": _nullable(self.spread),
            "mad_index": self.mad_index,
            "stability": self.stability,
            "moved": self.moved,
            "samples": self.samples,
            "clean_accuracy": self.clean_accuracy,
            "alpha": self.alpha,
            "quantile": self.quantile,
            "timing_s": dict(self.timing_s),
            "head": None if self.head is None else dict(self.head),
            "file": dict(self.file),
        }

    @classmethod
    def from_dict(cls, data: Any) -> ScanReport:
        """Read what `to_dict` wrote.

        Raises:
            CheckpointError: it is not a report of this schema.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise CheckpointError(f'not a scan report: expected a JSON object with "schema": "{SCHEMA}"')
        try:
            suspects = tuple(Suspect(operator.index(s["class"]), float(s["p_value"]), float(s["norm"])) for s in data["suspects"])
            norms = np.array([np.inf if v is None else float(v) for v in data["norms"]])
            pairs = tuple((operator.index(a), operator.index(b)) for a, b in data["pairs"])
            evidence = tuple(
                Evidence(
                    str(e["kind"]), None if e["class"] is None else operator.index(e["class"]), float(e["statistic"]), float(e["p_value"])
                )
                for e in data["evidence"]
            )
            if data["verdict"] not in ("clean", "backdoored", "inconclusive"):
                raise ValueError(f"unknown verdict {data['verdict']!r}")
            if any(not 0 <= k < len(norms) for k in (*(s.target for s in suspects), *(k for pair in pairs for k in pair))):
                raise ValueError("a suspect is not among the classes")
            strange = [s for s in data["status"] if s not in STATUSES]
            if strange:
                raise ValueError(f"unknown status {str(strange[0])[:40]!r}")
            if any(len(data[name]) != len(norms) for name in ("status", "alignment", "spread")):
                raise ValueError("status, alignment and spread must have an entry for every norm")
            return cls(
                verdict=data["verdict"],
                reason=str(data["reason"]),
                p_value=data["p_value"],
                suspects=suspects,
                kind=data["kind"],
                pairs=pairs,
                evidence=evidence,
                norms=norms,
                status=np.array(data["status"], dtype=np.str_),
                alignment=np.array([np.nan if v is None else float(v) for v in data["alignment"]]),
                spread=np.array([np.nan if v is None else float(v) for v in data["spread"]]),
                mad_index=data["mad_index"],
                stability=data["stability"],
                moved=data["moved"],
                samples=int(data["samples"]),
                clean_accuracy=data["clean_accuracy"],
                alpha=float(data["alpha"]),
                quantile=float(data["quantile"]),
                timing_s=dict(data["timing_s"]),
                head=data["head"],
                file=dict(data["file"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"scan report is damaged: {type(error).__name__}: {error}") from None

    @classmethod
    def from_json(cls, path: str | Path) -> ScanReport:
        """Read a report file of at most 64 MiB; see `from_dict`."""
        content = read_bytes(Path(path), most=_LARGEST_REPORT)
        try:
            data = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot read scan report {str(path)!r}: {error}") from None
        return cls.from_dict(data)


def _nullable(values: NDArray[np.float64]) -> list[float | None]:
    """For JSON, which has no infinities."""
    return [float(v) if np.isfinite(v) else None for v in values]
