"""What is installed here, on what machine, and whether it works. May import: selftest, progress; other packages only where they are there.

The answer belongs in bug reports: no path, no host name, no user.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import numpy as np

from tacfast._rust import __version__
from tacfast.bench import cores
from tacfast.progress import track
from tacfast.selftest import CHECKS, Check, run

SCHEMA = "tacfast.doctor/1"
#: Packages beside ourselves, and what brings them.
_PACKAGES = {
    "numpy": "pip install numpy",
    "torch": "pip install torch (needed to scan a model; heads as .npz do without)",
    "torchvision": "pip install torchvision (needed for --arch torchvision:NAME and folders of transformers)",
    "timm": "pip install timm (needed for --arch timm:NAME and folders of timm)",
    "transformers": "pip install transformers (needed for its folders)",
    "safetensors": "pip install safetensors (needed for .safetensors files)",
    "matplotlib": "pip install matplotlib (needed for plot())",
}
#: What our kernels dispatch on, and what a BLAS does.
_FEATURES = ("AVX2", "FMA3", "AVX512F", "ASIMD", "SVE")


@dataclass(frozen=True)
class Diagnosis:
    """Versions, hardware and the self-test."""

    #: Version by package, None where it is not installed.
    packages: Mapping[str, str | None]
    machine: Mapping[str, str | float | None]
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed; one that cannot run here does not count."""
        return all(check.ok is not False for check in self.checks)

    @property
    def remedies(self) -> dict[str, str]:
        """What brings the packages that are absent."""
        return {name: _PACKAGES[name] for name, found in self.packages.items() if found is None}

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: schema `tacfast.doctor/1`."""
        facts = {"ok": self.ok, "packages": dict(self.packages), "machine": dict(self.machine)}
        return {"schema": SCHEMA, "tool_version": __version__, **facts, "checks": [asdict(check) for check in self.checks]}


def diagnose(*, progress: bool = False) -> Diagnosis:
    """Look at everything, and run the self-test: a few seconds, most of them for the import of torch."""
    packages = {"tacfast": __version__, "python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    machine = {**_hardware(), **_blas(), **(_torch() if packages["torch"] else {})}
    return Diagnosis(packages, machine, tuple(run(check) for check in track(CHECKS, "self-test", shown=progress)))


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError, ValueError, ImportError):
        return version(package) if find_spec(package) else None
    return None


def _hardware() -> dict[str, str | float | None]:
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": cores(),
        "solver threads": cores(),
        "CPU features": ", ".join(_features()) or None,
        "memory (GiB)": _gibibytes("SC_PHYS_PAGES"),
        "memory free (GiB)": _gibibytes("SC_AVPHYS_PAGES"),
    }


def _features() -> list[str]:
    """As numpy detects them."""
    with suppress(ImportError, AttributeError):
        known = import_module("numpy._core._multiarray_umath").__cpu_features__
        return [name for name in _FEATURES if known.get(name)]
    return []


def _gibibytes(pages: str) -> float | None:
    with suppress(AttributeError, ValueError, OSError):  # not every system tells
        return round(os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return None


def _blas() -> dict[str, str | float | None]:
    """numpy's, and with threadpoolctl how many threads it takes. (Our own kernel calls none.)"""
    built: Mapping[str, Any] = dict(np.show_config(mode="dicts"))
    blas = built.get("Build Dependencies", {}).get("blas", {})
    found: dict[str, str | float | None] = {"BLAS of numpy": f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()}
    with suppress(ImportError):
        pools = import_module("threadpoolctl").threadpool_info()
        counts = [pool["num_threads"] for pool in pools if pool.get("user_api") == "blas"]
        found["BLAS threads"] = max(counts, default=None)
    return found


def _torch() -> dict[str, str | float | None]:
    try:
        import torch
    except Exception as error:  # a broken installation is what people come here with
        return {"torch": f"cannot be imported: {type(error).__name__}"}
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "BLAS of torch": "MKL" if torch.backends.mkl.is_available() else "not MKL",
        "torch threads": torch.get_num_threads(),
        "CUDA": ", ".join(cuda) if cuda else f"none (torch built for {torch.version.cuda or 'CPU'})",
        "MPS": "yes" if torch.backends.mps.is_available() else "none",
    }
