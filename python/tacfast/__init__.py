"""Find and remove backdoors in image classifiers, from clean data alone.

`import tacfast` needs numpy only; torch is imported when a model is first touched.
"""

from __future__ import annotations

from tacfast._rust import __version__
from tacfast.errors import CheckpointError, ModelError, ProblemError, SolveError, TacfastError
from tacfast.outcome import RepairResult
from tacfast.pairs import PairSolutions, solve_pairs
from tacfast.repair import repair
from tacfast.report import ScanReport
from tacfast.scan import scan, scan_head
from tacfast.solver import TacSolutions, solve
from tacfast.verdict import Evidence, Suspect

__all__ = [
    "CheckpointError",
    "Evidence",
    "ModelError",
    "PairSolutions",
    "ProblemError",
    "RepairResult",
    "ScanReport",
    "SolveError",
    "Suspect",
    "TacSolutions",
    "TacfastError",
    "__version__",
    "repair",
    "scan",
    "scan_head",
    "solve",
    "solve_pairs",
]
