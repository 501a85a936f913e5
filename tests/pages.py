"""Results of every kind, made on the spot, for the tests of their pages: heads without a network, and digits with one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tacfast
from tacfast.explain import explain_head
from tacfast.outcome import State

#: What a model file may call its classes.
HOSTILE = (
    "<script>document.title='owned'</script>",
    "</title><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><style>*{display:none}</style>",
    "]]></text><script>alert(1)</script>",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{1}{0}$ $x$",
    "javascript:alert(1) https://example.org/x.js",
    "\u202egpj.exe\u2066\u200f\x1b[2J\x00\x07\u2028",
    "Z" + "\u0301\u0302\u0303\u0304" * 60,
    "W" * 5000,
    "名前 😀 \ud800",
    "&lt;b&gt; &amp;&#x3c;script&#x3e;",
    "<svg onload=alert(1)><foreignObject>",
)


def head(
    classes: int = 10, *, shift: float = 0.0, targets: Sequence[int] = (), dim: int = 64, samples: int = 600, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Class means in random directions; the targets also read directions that clean latents never use."""
    rng = np.random.default_rng(seed)
    means = np.abs(rng.normal(size=(classes, dim)))
    w = means - means.mean(axis=0) + 0.1 * rng.normal(size=(classes, dim))
    y = np.arange(samples) % classes
    z = 3 * means[y] + 0.2 * np.abs(rng.normal(size=(samples, dim)))
    for at, k in enumerate(targets):
        z[:, at] = 0
        w[k, at] += shift
    return w, z, y


def explained(classes: int = 10, *, names: Sequence[str | None] | None = None, pictures: bool = True, **options: Any) -> tacfast.ScanReport:
    """A scan of such a head, with details and pictures of noise."""
    w, z, y = head(classes, **options)
    images = np.random.default_rng(1).integers(0, 256, size=(len(z), 8, 8, 3), dtype=np.uint8) if pictures else None
    report = tacfast.scan_head(w, None, z, labels=y, threads=1, file={"model": "head.npz", "sha256": "0" * 64, "notes": ["made by a test"]})
    return explain_head(
        report, w, None, z, names=names, images=images, threads=1, provenance={"command": "tacfast scan head.npz", "seed": 0}
    )


def all_to_all(classes: int = 8, dim: int = 48, samples: int = 640) -> tacfast.ScanReport:
    """Each class has a direction of its own, clean latents of class y lean against that of y + 1."""
    rng = np.random.default_rng(0)
    means = 3 * np.eye(classes, dim) + 0.1 * rng.normal(size=(classes, dim))
    y = np.arange(samples) % classes
    z = means[y] + 0.1 * rng.normal(size=(samples, dim))
    w = means.copy()
    # A channel a pair that only its target reads: it is quiet on clean samples, and wide open for class y alone.
    for a in range(classes):
        channel, k = classes + a, (a + 1) % classes
        w[:, channel] = -1.5
        w[[a, k], channel] = (-1.5, 3.0)
        z[:, channel] = np.where(y == a, 0.6, 0.0)
    report = tacfast.scan_head(w, None, z, labels=y, threads=1)
    return explain_head(report, w, None, z, threads=1)


def repaired(names: list[str | None] | None = None) -> tacfast.RepairResult:
    """What a repair of such a model could have come to."""
    before = np.exp(np.random.default_rng(0).normal(1.0, 0.1, size=10))
    after = before.copy()
    before[3] = 0.9
    details: dict[str, Any] = {"provenance": {"command": "tacfast repair model.pth"}}
    return tacfast.RepairResult(
        model=None,
        method="unlearn",
        targets=(3,),
        before=State(0.97, 0.98, 1.0, 0.12, 0.99, before),
        after=State(0.96, 0.97, 0.98, 0.95, 0.05, after),
        samples=450,
        labelled=True,
        settings={"beta": 1.0, "lr": 0.02, "epochs": 10, "seed": 0},
        timing_s={"latents": 0.2, "unlearn": 12.0, "check": 0.3},
        file={"model": "model.pth", "sha256": "0" * 64},
        details=details if names is None else {**details, "names": names, "names_from": "config.json"},
    )


def nothing_done() -> tacfast.RepairResult:
    return replace(repaired(), targets=(), after=None)
