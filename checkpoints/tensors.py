"""Weight files from tensors and back, one tensor at a time, in the safetensors format and without pickle.

The bytes equal those of `safetensors.torch.save_file`; writing them ourselves lets them be hashed and uploaded as they
are made, with no second copy in memory or on the disk.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from checkpoints.artifact import Artifact
from checkpoints.errors import CorruptArtifactError, StoreError
from checkpoints.hashing import LENGTH_BYTES, MAX_HEADER_BYTES

# In the order of the format: tensors are sorted by descending dtype, then by name, so that all are aligned.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
ALIGNMENT = 8
SAFE_ALIGNMENT = 16  # torch.set_rng_state reads its bytes as a struct and crashes below this


def weight_file_chunks(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a weight file; a tensor on another device is copied to the host only while its bytes are taken."""
    names = sorted(tensors, key=lambda name: (-RANKS[_known(name, tensors[name])], name))
    yield _header(names, tensors)
    for name in names:
        content = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield _memory_of(content).toreadonly()  # nobody changes it while it is saved, so nobody has to copy it


def weight_file_size(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of tensor data that a weight file would hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def read_weight_file(artifact: Artifact, name: str) -> dict[str, torch.Tensor]:
    """All tensors of a weight file on the host; nothing is returned unless every byte matches the manifest."""
    parts = artifact.stream(name)
    head = bytearray()
    while len(head) < _header_end(head):
        head += next(parts)
    end = _header_end(head)
    header = json.loads(head[LENGTH_BYTES:end])
    header.pop("__metadata__", None)
    data = torch.empty(artifact.manifest.files[name].size - end, dtype=torch.uint8)
    target, position = _memory_of(data), 0
    for part in itertools.chain([bytes(head[end:])], parts):
        target[position : position + len(part)] = part
        position += len(part)
    return {tensor: _view(data, entry) for tensor, entry in header.items()}


def _header_end(head: bytearray) -> int:
    """Where the tensors begin, as far as the first bytes tell; raises CorruptArtifactError for what cannot be."""
    if len(head) < LENGTH_BYTES:
        return LENGTH_BYTES
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise CorruptArtifactError(f"a weight file must have a short header, but claims {length} bytes; restore it")
    return LENGTH_BYTES + length


def _header(names: list[str], tensors: Mapping[str, torch.Tensor]) -> bytes:
    entries: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": [*tensor.shape],
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _known(name: str, tensor: torch.Tensor) -> torch.dtype:
    if tensor.dtype not in RANKS or tensor.layout != torch.strided:
        raise StoreError(
            f"tensor {name} must be dense with one of the dtypes {', '.join(DTYPES)} to be saved, "
            f"but is {tensor.layout} with {tensor.dtype}; convert it first"
        )
    return tensor.dtype


def _memory_of(content: torch.Tensor) -> memoryview:
    """The bytes of a flat uint8 tensor, shared and not copied."""
    array: Any = content.numpy()
    return memoryview(array)


def _view(data: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
    (start, end), dtype = entry["data_offsets"], DTYPES[entry["dtype"]]
    if start == end:
        return torch.empty(entry["shape"], dtype=dtype)
    span = data[start:end]
    if start % SAFE_ALIGNMENT:
        span = span.clone()
    return span.view(dtype).reshape(entry["shape"])
