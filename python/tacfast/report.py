"""What a scan says, in Python and in JSON. May import: solver, verdict, openness, taxonomy, details, shown, errors; explain when called."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tacfast._rust import __version__
from tacfast.details import KINDS, VERDICTS, number, optional_number, read_details, seconds, words
from tacfast.errors import CheckpointError
from tacfast.openness import FEW_PIXELS, SHORT
from tacfast.shown import Shown, read_json
from tacfast.solver import STATUSES, TacSolutions
from tacfast.taxonomy import tags
from tacfast.verdict import Evidence, Kind, Suspect, Verdict

if TYPE_CHECKING:
    from torch import nn

SCHEMA = "tacfast.scan/1"


@dataclass(frozen=True, repr=False, eq=False)
class ScanReport(Shown):
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
    #: By kind of pattern ("short pattern", "few pixels"), float64 (C,): how far one small pattern of the input goes towards each class, as
    #: mean margin in logits; NaN for classes that were not looked at. None where none was.
    patterns: Mapping[str, NDArray[np.float64]] | None
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
    #: What a page shows beyond this, see `tacfast.details`; None unless `explain` made them.
    details: Mapping[str, Any] | None = None
    #: Pictures of the samples that `details` names, uint8 (H, W, 3) by number; never in JSON.
    pictures: Mapping[int, NDArray[np.uint8]] = field(default_factory=dict)

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
        """The report as JSON can hold it: schema `tacfast.scan/1`, null for infinite norms and deviations, and for unknown alignments.

        `details` is there only where `explain` made it; `tacfast.details` says what it holds.
        """
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
            "evidence": [{**e.to_dict(), "statistic": e.statistic if np.isfinite(e.statistic) else None} for e in self.evidence],
            "norms": _nullable(self.norms),
            "status": self.status.tolist(),
            "alignment": _nullable(self.alignment),
            "spread": _nullable(self.spread),
            "patterns": None if self.patterns is None else {kind: _nullable(m) for kind, m in self.patterns.items()},
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
            **({} if self.details is None else {"details": dict(self.details)}),
        }

    def explain(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        names: Mapping[int, str] | Sequence[str | None] | None = None,
        device: str = "auto",
        threads: int | None = None,
        progress: bool = False,
    ) -> ScanReport:
        """This report with `details` and `pictures`; see `tacfast.explain`, which has `explain_head` for heads by themselves.

        Args:
            model, loader, device, threads, progress: as for `scan`; the samples are those that were scanned.
            names: of the classes, all of them in order or some by number; by default those of the loader's data set, where it has any.

        Raises:
            ModelError: see `scan`.
            ProblemError: the data are not those that were scanned.
        """
        from tacfast.explain import explain

        return explain(self, model, loader, names=names, device=device, threads=threads, progress=progress)

    @classmethod
    def from_dict(cls, data: Any) -> ScanReport:
        """Read what `to_dict` wrote.

        Raises:
            CheckpointError: it is not a report of this schema.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise CheckpointError(f'not a scan report: expected a JSON object with "schema": "{SCHEMA}"')
        try:
            return cls(**_fields(data))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"scan report is damaged: {type(error).__name__}: {error}") from None

    @classmethod
    def from_json(cls, path: str | Path) -> ScanReport:
        """Read a report file of at most 64 MiB; see `from_dict`."""
        return cls.from_dict(read_json(path, "scan report"))


def _fields(data: dict[str, Any]) -> dict[str, Any]:
    """A report's fields from its JSON.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: it is none.
    """
    norms = np.array([np.inf if v is None else number(v) for v in data["norms"]])
    if any(len(data[name]) != len(norms) for name in ("status", "alignment", "spread")):
        raise ValueError("status, alignment and spread must have an entry for every norm")
    strange = [s for s in data["status"] if s not in STATUSES]
    if strange:
        raise ValueError(f"unknown status {str(strange[0])[:40]!r}")
    for name, known in (("verdict", VERDICTS), ("kind", (None, *KINDS))):
        if data[name] not in known:
            raise ValueError(f"unknown {name} {str(data[name])[:40]!r}")

    def class_of(value: Any) -> int:
        k = operator.index(value)
        if not 0 <= k < len(norms):
            raise ValueError(f"class {k} is not among the classes")
        return k

    return {
        "verdict": data["verdict"],
        "reason": str(data["reason"]),
        "suspects": tuple(Suspect(class_of(s["class"]), number(s["p_value"]), number(s["norm"])) for s in data["suspects"]),
        "kind": data["kind"],
        "pairs": tuple((class_of(a), class_of(b)) for a, b in data["pairs"]),
        "evidence": tuple(_evidence(e, class_of) for e in data["evidence"]),
        "norms": norms,
        "status": np.array(data["status"], dtype=np.str_),
        **{name: np.array([np.nan if v is None else number(v) for v in data[name]], dtype=float) for name in ("alignment", "spread")},
        "patterns": _patterns(data.get("patterns"), len(norms)),
        **{name: optional_number(data[name]) for name in ("p_value", "mad_index", "stability", "moved", "clean_accuracy")},
        "samples": operator.index(data["samples"]),
        **{name: number(data[name]) for name in ("alpha", "quantile")},
        "timing_s": seconds(data["timing_s"]),
        "head": None if data["head"] is None else words(data["head"]),
        "file": words(data["file"]),
        "details": read_details(data.get("details"), len(norms)),
    }


def _evidence(data: Any, class_of: Callable[[Any], int]) -> Evidence:
    target = None if data["class"] is None else class_of(data["class"])
    statistic = np.inf if data["statistic"] is None else number(data["statistic"])
    return Evidence(str(data["kind"]), target, statistic, number(data["p_value"]))


def _patterns(data: Any, classes: int) -> dict[str, NDArray[np.float64]] | None:
    if data is None:
        return None
    if not isinstance(data, dict) or any(kind not in (SHORT, FEW_PIXELS) or len(m) != classes for kind, m in data.items()):
        raise ValueError("patterns must hold a margin for every class, by kind")
    return {kind: np.array([np.nan if v is None else number(v) for v in m], dtype=float) for kind, m in data.items()}


def _nullable(values: NDArray[np.float64]) -> list[float | None]:
    """For JSON, which has no infinities."""
    return [float(v) if np.isfinite(v) else None for v in values]
