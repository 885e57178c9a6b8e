"""Weight files from tensors and back, one tensor at a time, in the safetensors format and without pickle.

The bytes equal those of `safetensors.torch.save_file`; writing them ourselves lets them be hashed and uploaded as they
are made, with no second copy in memory or on the disk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from checkpoints.artifact import Artifact
from checkpoints.errors import CorruptArtifactError, StoreError
from checkpoints.safetensors import LENGTH_BYTES, Header, TensorEntry, header_bytes, header_length, parse_header

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
SAFE_ALIGNMENT = 16  # torch.set_rng_state reads its bytes as a struct and crashes below this


@dataclass(frozen=True)
class LaterTensor:
    """A dense tensor that is made only when its bytes are taken, and not kept."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]
    layout: torch.layout = torch.strided

    def to(self, dtype: torch.dtype) -> LaterTensor:
        """The same in another type."""
        return replace(self, dtype=dtype)

    def contiguous(self) -> LaterTensor:
        """Itself: bytes are taken in order."""
        return self

    def numel(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    def element_size(self) -> int:
        """Bytes of an entry."""
        return self.dtype.itemsize

    def detach(self) -> torch.Tensor:
        """The tensor."""
        return self.make().detach().to(self.dtype)


Tensors = Mapping[str, torch.Tensor | LaterTensor]


def weight_file_chunks(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """The bytes of a weight file; a tensor on another device is copied to the host only while its bytes are taken."""
    names = sorted(tensors, key=lambda name: (-RANKS[_known(name, tensors[name])], name))
    yield header_bytes(
        ((name, NAMES[tensors[name].dtype], tuple(tensors[name].shape), _bytes_of(tensors[name])) for name in names),
        metadata,
    )
    for name in names:
        content = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield _memory_of(content).toreadonly()  # nobody changes it while it is saved, so nobody has to copy it


def weight_file_size(tensors: Tensors) -> int:
    """Bytes of tensor data that a weight file would hold."""
    return sum(map(_bytes_of, tensors.values()))


def read_weight_file(artifact: Artifact, name: str) -> dict[str, torch.Tensor]:
    """All tensors of a weight file on the host; nothing is returned unless every byte matches the manifest."""
    parts = artifact.stream(name)
    try:
        head = _head(parts)
        header = parse_header(head[LENGTH_BYTES : _head_bytes(head)])
        header.check_size(artifact.manifest.files[name].size)
        _check_types(header)
    except ValueError as error:
        for _ in parts:  # a changed byte is the better reason, and found at the end
            pass
        raise CorruptArtifactError(
            f"{artifact.file_url(name)} must be a weight file, but is not: {error}; make it again"
        ) from error
    data = torch.empty(header.file_size - header.data_start, dtype=torch.uint8)
    target, position = _memory_of(data), 0
    for part in itertools.chain([bytes(head[header.data_start :])], parts):
        target[position : position + len(part)] = part
        position += len(part)
    return {tensor: _view(data, entry) for tensor, entry in header.tensors.items()}


def _head(parts: Iterator[bytes]) -> bytearray:
    """The first parts, as many as hold the header; raises ValueError when they end before."""
    head = bytearray()
    while len(head) < _head_bytes(head):
        part = next(parts, None)
        if part is None:
            raise ValueError(f"it ends within its header, after {len(head)} bytes")
        head += part
    return head


def _head_bytes(head: bytearray) -> int:
    """Where the tensors begin, as far as the first bytes tell."""
    return LENGTH_BYTES + (header_length(head) if len(head) >= LENGTH_BYTES else 0)


def _check_types(header: Header) -> None:
    unknown = sorted({entry.dtype for entry in header.tensors.values()} - {*DTYPES})
    if unknown:
        raise ValueError(f"it has tensors of type {', '.join(unknown)}, and known are {', '.join(DTYPES)}")


def _bytes_of(tensor: torch.Tensor | LaterTensor) -> int:
    return tensor.numel() * tensor.element_size()


def _known(name: str, tensor: torch.Tensor | LaterTensor) -> torch.dtype:
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


def _view(data: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    dtype = DTYPES[entry.dtype]
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    span = data[entry.start : entry.end]
    if entry.start % SAFE_ALIGNMENT:
        span = span.clone()
    return span.view(dtype).reshape(entry.shape)
