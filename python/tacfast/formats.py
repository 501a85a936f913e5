"""The formats of checkpoints: bytes in, whatever lies in them out. May import: torch, safetensors, archives, pickles, errors.

Every size that a file claims is compared with the bytes that are there before a parser may allocate anything.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from typing import Any

import numpy as np

from tacfast.archives import open_archive
from tacfast.errors import CheckpointError
from tacfast.pickles import Storages, walk

#: Bytes of a .safetensors header: a hundred a tensor. safetensors itself allows 100 MB.
MAX_HEADER = 4 * 2**20
#: Bytes of the pickle in a .pth file, which holds names, shapes and what lies beside the tensors.
MAX_PICKLE = 64 * 2**20
#: The last hole known in torch's restricted unpickler was closed in this version.
_TORCH = (2, 10)

_MEMBER = re.compile(r"[^/]+/(?:data\.pkl|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id|data/[0-9]+)")
#: In the names of a TorchScript archive's members; looked for only to say why a file was refused.
_TORCHSCRIPT = (b"/code/", b"/constants.pkl")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def parse_safetensors(content: bytes) -> Any:
    """Tensors by name.

    Raises:
        CheckpointError: the reason why the file was refused.
        Exception: whatever a damaged file makes safetensors raise.
    """
    import safetensors.torch

    length = int.from_bytes(content[:8], "little")
    if length > MAX_HEADER:
        raise CheckpointError(f"its header would have {length} bytes, more than {MAX_HEADER}")
    json.loads(content[8 : 8 + length], object_pairs_hook=_unique)
    return safetensors.torch.load(content)


def safetensors_metadata(content: bytes) -> dict[str, str]:
    """What `tacfast` wrote beside the tensors of a file that `parse_safetensors` took: claims of the file, unchecked."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {k: v for k, v in header.get("__metadata__", {}).items() if k.startswith("tacfast.")}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise CheckpointError("its header names an entry twice")
    return entries


def parse_pickled(content: bytes) -> Any:
    """What torch's restricted unpickler makes of a file of torch.save, in its zip format or in the one before.

    Raises:
        CheckpointError: the reason why the file was refused.
        Exception: whatever a damaged file makes zipfile, pickletools and torch raise.
    """
    import torch

    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _TORCH:
        raise CheckpointError(f"torch {torch.__version__} is too old to read it safely; install torch >= {'.'.join(map(str, _TORCH))}")
    if content.startswith(b"PK"):
        try:
            _check_zipped(content)
        except CheckpointError:
            if all(name in content for name in _TORCHSCRIPT):
                raise CheckpointError("it is a TorchScript archive, which holds code") from None
            raise
    else:
        _check_legacy(content)
    # Leaving the context removes what entering added, and would take what the caller's own code had allowed with it.
    more = [g for g in _numpy_globals() if g not in torch.serialization.get_safe_globals()]
    with torch.serialization.safe_globals(more):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True, mmap=False)


def _numpy_globals() -> list[Any]:
    """What numpy writes numeric arrays and scalars with, and nothing that can hold an object."""
    from numpy._core.multiarray import _reconstruct, scalar

    functions = [(f, f"numpy.{core}.multiarray.{f.__name__}") for core in ("core", "_core") for f in (_reconstruct, scalar)]
    return [*functions, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"}]


def _check_zipped(content: bytes) -> None:
    # torch maps storages as they lie in the file: it never compresses them.
    archive, members = open_archive(content, compressions=(zipfile.ZIP_STORED,), most=len(content))
    strange = [m.filename for m in members if not _MEMBER.fullmatch(m.filename)]
    if strange:
        raise CheckpointError(f"it holds {strange[0][:80]!r}, which torch.save never writes")
    folders = {m.filename.partition("/")[0] for m in members}
    if len(folders) != 1:
        raise CheckpointError("its members lie in several folders")
    sizes = {m.filename.partition("/")[2]: m.file_size for m in members}
    if sizes.get("data.pkl", 0) > MAX_PICKLE:
        raise CheckpointError(f"its pickle has {sizes['data.pkl']} bytes, more than {MAX_PICKLE}")
    pickled = archive.read(f"{folders.pop()}/data.pkl")
    walk(io.BytesIO(pickled), Storages({k.removeprefix("data/"): v for k, v in sizes.items() if k.startswith("data/")}, len(content)))


def _check_legacy(content: bytes) -> None:
    """Five pickles (magic number, version, system, object, order of storages), then each storage: its number of elements, its bytes."""
    stream, storages = io.BytesIO(content), Storages(None, len(content))
    magic, protocol = (walk(stream, storages) for _ in range(2))
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
        raise CheckpointError("it is no file of torch.save")
    for _ in range(2):
        walk(stream, storages)
    keys = walk(stream, storages)
    if stream.tell() > MAX_PICKLE:
        raise CheckpointError(f"its pickles have {stream.tell()} bytes, more than {MAX_PICKLE}")
    if type(keys) is not list or sorted(keys) != sorted(storages.claims):
        raise CheckpointError("its storages are not those that its tensors lie in")
    for key in keys:
        elements, size = storages.claims[key][1], storages.bytes_of(key)
        if int.from_bytes(stream.read(8), "little") != elements or len(content) - stream.tell() < size:
            raise CheckpointError(f"it is damaged: storage {key[:40]!r} is not as long as its tensors claim")
        stream.seek(size, io.SEEK_CUR)
