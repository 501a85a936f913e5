"""Bytes of untrusted files in, whole files out. May import: numpy, archives, errors.

The bytes that are hashed are the bytes that are parsed.
"""

from __future__ import annotations

import errno
import hashlib
import io
import math
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tacfast.archives import open_archive
from tacfast.errors import CheckpointError

#: Largest file that is read; half the machine's memory where that is less, because a parser holds a second copy.
MAX_FILE = 16 * 2**30
#: Kinds of numpy arrays that hold values and nothing else: no objects, no records.
_PLAIN_KINDS = "biufcSU"
_ANEW = "Save plain arrays anew, with numpy.savez or numpy.save"


def most_bytes() -> int:
    """How large a file may be here, and what it expands to."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return MAX_FILE
    return min(MAX_FILE, memory // 2)


def read_bytes(path: Path, *, most: int | None = None) -> bytes:
    """A regular file of at most `most` bytes, by default `most_bytes()`.

    Raises:
        CheckpointError: it cannot be read, is a device or a pipe, or is larger.
    """
    most = most_bytes() if most is None else most
    try:
        if not path.is_file():  # a pipe would block, a device would never end
            raise CheckpointError(
                f"cannot read {str(path)!r}: {'not a regular file' if path.exists() else os.strerror(errno.ENOENT)}; check the path"
            )
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            content = b"" if size > most else stream.read(size)
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}; check the path and its permissions") from None
    if size > most:
        raise CheckpointError(f"{path.name} was refused: it has {size} bytes, at most {most} are read here; give a smaller file")
    return content


def read_npz(path: str | Path) -> tuple[dict[str, NDArray[Any]], str]:
    """Arrays by name, and the SHA-256 of the file; never anything pickled.

    Sizes are checked before anything is decompressed or allocated.

    Raises:
        CheckpointError: the file cannot be read, holds Python objects, or would expand beyond what is allowed.
    """
    path = Path(path)
    content = read_bytes(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arrays = _parse_npz(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name} was refused: {error}. {_ANEW}") from None
    except Exception:  # numpy, zipfile and zlib raise whatever a hostile file makes them raise
        raise CheckpointError(f"{path.name} was refused: it is damaged, or no .npz archive. {_ANEW}") from None
    return arrays, hashlib.sha256(content).hexdigest()


def read_npy(path: str | Path) -> tuple[NDArray[Any], str]:
    """One array and the SHA-256 of the file; never anything pickled.

    Raises:
        CheckpointError: the file cannot be read, or holds Python objects.
    """
    path = Path(path)
    content = read_bytes(path)
    stream = io.BytesIO(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_npy(stream, path.name, len(content))
            stream.seek(0)
            array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name} was refused: {error}. {_ANEW}") from None
    except Exception:  # numpy raises whatever a hostile file makes it raise
        raise CheckpointError(f"{path.name} was refused: it is damaged, or no .npy file. {_ANEW}") from None
    return array, hashlib.sha256(content).hexdigest()


def _parse_npz(content: bytes) -> dict[str, NDArray[Any]]:
    archive, members = open_archive(content, compressions=(zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED), most=most_bytes())
    for member in members:
        if not member.filename.endswith(".npy"):
            raise CheckpointError(f"{member.filename[:80]!r} is no array")
        with archive.open(member) as stream:
            _check_npy(stream, member.filename, member.file_size)
    arrays = {}
    for member in members:
        with archive.open(member) as stream:
            arrays[member.filename.removesuffix(".npy")] = np.lib.format.read_array(stream, allow_pickle=False)
            if stream.read(1):  # reading to the end is what checks the CRC
                raise CheckpointError(f"{member.filename[:80]!r} is longer than its array")
    return arrays


def _check_npy(stream: IO[bytes], name: str, size: int) -> None:
    """The header of an array promises exactly the bytes that there are."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise CheckpointError(f"{name[:80]!r} is written in version {version} of the format; 1.0 and 2.0 are read")
    shape, _, dtype = readers[version](stream)
    if dtype.kind not in _PLAIN_KINDS or dtype.itemsize == 0:
        raise CheckpointError(f"{name[:80]!r} holds Python objects or records, not numbers")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size - stream.tell():
        raise CheckpointError(f"{name[:80]!r} is not as long as its shape {shape} claims")


@contextmanager
def atomic(path: str | Path) -> Iterator[Any]:
    """A binary stream to a temporary file beside `path` that takes its place only when all went well.

    Raises:
        CheckpointError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    check_writable(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise CheckpointError(f"cannot write {str(path)!r}: {error.strerror}; choose another place") from None
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        # mkstemp makes private files; give this one the mode that open() would have.
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write {str(path)!r}: {error.strerror}; choose another place") from None
        raise


def check_writable(path: Path) -> None:
    """Before long work whose result shall go there.

    Raises:
        CheckpointError: the folder does not exist or is read-only, or the path is a folder itself.
    """
    if path.is_dir():
        raise CheckpointError(f"cannot write {str(path)!r}: it is a folder; name a file in it")
    if not path.parent.is_dir():
        raise CheckpointError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise CheckpointError(f"cannot write {str(path)!r}: the folder is read-only; choose another")
