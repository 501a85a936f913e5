"""A corpus of hostile files, kind by kind, and what must become of them. Run as a script it prints what does (`make hostile`).

Every payload that would run writes the canary, a file that must never come to be.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hostile_formats as formats
import hostile_pickles as pickles
from hostile_pickles import MIB, Files

KINDS: dict[str, Callable[[str], Files]] = {
    "instructions that call": pickles.calls,
    "objects in pickles, protocols 0 to 5": pickles.pickled_objects,
    "numpy arrays of objects": pickles.numpy_objects,
    "memory and time": pickles.exhaustion,
    "tensors that are not what they seem": pickles.tensors,
    "archives: names, layout, nesting": formats.archives,
    "archives: bombs and false sizes": formats.bombs,
    ".npy headers": formats.npy_headers,
    ".safetensors headers": formats.safetensors,
    "images": formats.images,
    "scan reports": formats.reports,
    "truncated files": formats.truncated,
    "flipped bits": formats.flipped,
    "noise": formats.noise,
}


# What becomes of them.


def read(file: Path) -> None:
    """The reader that the command line would use.

    Raises:
        CheckpointError: the file was refused.
    """
    from tacfast.checkpoints import read_weights
    from tacfast.files import read_npz
    from tacfast.images import read_images
    from tacfast.report import ScanReport

    suffix = file.suffix
    if suffix == ".npz":
        read_npz(file)
    elif suffix == ".json":
        ScanReport.from_json(file)
    elif suffix in (".safetensors", ".pth", ".ckpt"):
        read_weights(file)
    else:
        folder = file.parent / "images"
        folder.mkdir(exist_ok=True)
        copy = folder / file.name
        copy.write_bytes(file.read_bytes())
        try:
            read_images(folder)
        finally:
            copy.unlink()


@dataclass
class Tally:
    """Of one kind: files, how many were refused, how many loaded harmlessly, peak memory above the start in MiB, seconds."""

    kind: str
    files: int = 0
    refused: int = 0
    loaded: int = 0
    peak_mib: float = 0.0
    seconds: float = 0.0


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes; 0 where the system does not tell."""
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


def run(folder: Path, kinds: list[str] | None = None) -> Iterator[Tally]:
    """Every file through its reader.

    Raises:
        AssertionError: one was neither refused nor harmless, or the canary came to be.
    """
    from tacfast.errors import CheckpointError

    canary = folder / "canary"
    for kind in kinds or KINDS:
        tally = Tally(kind)
        for i, (suffix, content, harmless) in enumerate(KINDS[kind](str(canary))):
            file = folder / f"{i:03}.{suffix}"
            file.write_bytes(content)
            start, began = reset_peak(), time.perf_counter()
            try:
                read(file)
                tally.loaded += 1
                assert harmless, f"{kind}: {file.name} was loaded"
            except CheckpointError:
                tally.refused += 1
            tally.seconds += time.perf_counter() - began
            tally.peak_mib = max(tally.peak_mib, (memory("VmHWM") - start) / MIB)
            tally.files += 1
            assert not canary.exists(), f"{kind}: {file.name} ran code"
            file.unlink()
        yield tally


def reset_peak() -> int:
    """Memory now; the peak is counted from here."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # only Linux has it
        return memory("VmHWM")
    return memory("VmRSS")


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for suffix, content in formats.good().items():
            (folder / f"good.{suffix}").write_bytes(content)
            read(folder / f"good.{suffix}")  # so that imports are not counted
        print("| kind | files | refused | loaded, harmless | peak memory, MiB | s |\n|---|---|---|---|---|---|")
        for t in run(folder, sys.argv[1:]):
            print(f"| {t.kind} | {t.files} | {t.refused} | {t.loaded} | {t.peak_mib:.0f} | {t.seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
