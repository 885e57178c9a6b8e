"""The format of weight files (safetensors): the only place that knows their headers, types and indices. Loads no torch.

A file is the length of the header (8 bytes), the header (JSON) and the tensors' bytes, in order and without gaps. What
the safetensors library refuses is refused here, and in addition: a name that is there twice, entries that are lists
instead of objects, nesting deeper than 64 levels.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from checkpoints import paths
from checkpoints.errors import DataError
from checkpoints.parsing import parse_object
from checkpoints.screen import literal
from checkpoints.urls import checked_part

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the format
MAX_SIZE = 2**64 - 1  # the library computes sizes in bits with 64 bits
ALIGNMENT = 8
USUAL_HEADER_BYTES = 32 << 10  # of an expert of 32 layers: 96 tensors of some 120 bytes each
METADATA = "__metadata__"
# In the order of the format: tensors are sorted by descending type, then by name, so that all are aligned.
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
# Types of whole bytes; of the others, values are not addressed one by one.
ITEM_BYTES = {dtype: bits // 8 for dtype, bits in BITS.items() if bits % 8 == 0}
FLOATS = ("F32", "F16", "BF16")
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


class TensorEntry(NamedTuple):
    """Type and shape of one tensor, and its bytes [start, end) behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorSpan:
    """One tensor inside a weight file: type, shape, and its bytes [start, start + length) of the file at `url`."""

    url: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int
    digest: str = ""


@dataclass(frozen=True)
class Header:
    """The tensors of a weight file by name, in the order of their bytes, which begin at `data_start` in the file."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        return self.data_start + max((entry.end for entry in self.tensors.values()), default=0)

    def check_size(self, size: int) -> None:
        """Raise ValueError unless a file of `size` bytes holds exactly these tensors."""
        if size != self.file_size:
            raise ValueError(f"it has {size} bytes, but {self.file_size} by its header")


def read_header(read: Callable[[int, int], bytes], size: int) -> Header:
    """The header of a file of `size` bytes, of which `read` returns bytes [start, end); raises ValueError."""
    end = LENGTH_BYTES + header_length(read(0, LENGTH_BYTES))
    if end > size:
        raise ValueError(f"it ends within its header, at byte {size} of {end}")
    header = parse_header(read(LENGTH_BYTES, end))
    header.check_size(size)
    return header


def read_spans(url: str, hashes: Mapping[str, str] | None = None, size: int | None = None) -> dict[str, TensorSpan]:
    """Spans of all tensors of a weight file, from its header; `hashes` are the tensors' digests by name.

    Where the `size` of the file in bytes is known, most headers take one request.
    """
    try:
        header = read_header(reader(url, size), paths.file_size(url) if size is None else size)
    except FileNotFoundError as error:
        raise DataError(f"{url} must be there, but is missing; delete its artifact and run that stage again") from error
    except ValueError as error:
        raise DataError(f"{url} must be a safetensors file, but is not: {error}; make it again") from error
    if packed := sorted({entry.dtype for entry in header.tensors.values()} - {*ITEM_BYTES}):
        raise DataError(
            f"{url} must have values of whole bytes, but has {', '.join(packed)}; use another version of it"
        )
    return spans_in(url, header, hashes or {})


def spans_in(url: str, header: Header, hashes: Mapping[str, str]) -> dict[str, TensorSpan]:
    """Where the tensors of a file with this header are."""
    return {
        name: TensorSpan(
            url, entry.dtype, entry.shape, header.data_start + entry.start, entry.end - entry.start,
            hashes.get(name, ""),
        )
        for name, entry in header.tensors.items()
    }  # fmt: skip


def reader(url: str, size: int | None) -> Callable[[int, int], bytes]:
    """What reads bytes [start, end) of a file; of one whose size is known, its beginning comes at once."""
    head = b"" if size is None else paths.read_bytes(url, 0, min(size, USUAL_HEADER_BYTES))
    return lambda start, end: head[start:end] if end <= len(head) else paths.read_bytes(url, start, end)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, all there; raises DataError. A single file counts before an index."""
    files = [folder / name for name in _weight_names(folder)]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise DataError(f"{folder} must hold {missing[0]:.80}, but does not; make or fetch the model again")
    return files


def _weight_names(folder: Path) -> list[str]:
    index = folder / INDEX_NAME
    if (folder / WEIGHTS_NAME).is_file() or not index.is_file():
        return [WEIGHTS_NAME]
    return shard_names(index.read_bytes(), str(index))


def shard_names(content: bytes, origin: str) -> list[str]:
    """The weight files that an index names, sorted; raises DataError. `origin` names the index."""
    try:
        places = parse_object(content).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(f"weight_map must name files by tensor, but is {places!r:.60}")
        # Hugging Face's indices name files beside them, never files in folders.
        return sorted({checked_part(name) for name in places.values()})
    except (ValueError, TypeError) as error:  # a list cannot be part of a set
        reason = literal(str(error)[:200], keep="")
        raise DataError(
            f"{origin} must be an index of weight files, but is not ({reason}); fetch the model again"
        ) from error


def header_length(first: bytes | bytearray) -> int:
    """Bytes of the header, from the first 8 of a file; raises ValueError."""
    if len(first) < LENGTH_BYTES:
        raise ValueError(f"it ends after {len(first)} bytes")
    (length,) = struct.unpack_from("<Q", first)
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header claims {length} bytes")
    return int(length)


def parse_header(content: bytes | bytearray) -> Header:
    """The header from its JSON; raises ValueError with what is wrong."""
    if not content.lstrip(b" \t\r\n").startswith(b"{"):
        raise ValueError("its header is no JSON object")
    values = parse_object(content)
    metadata = _metadata(values.pop(METADATA, None))
    entries = [(name, _entry(name, value)) for name, value in values.items()]
    tensors = dict(sorted(entries, key=lambda item: (item[1].start, item[1].end)))
    end = 0
    for name, entry in tensors.items():
        if entry.start != end:
            raise ValueError(f"tensor {name!r:.80} begins at byte {entry.start}, but the one before ends at {end}")
        end = entry.end
    return Header(tensors, metadata, LENGTH_BYTES + len(content))


def header_bytes(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Length and header of a file of these tensors (name, type, shape, bytes) in this order, as the library writes."""
    values: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape, size in tensors:
        start, end = end, end + size
        values[name] = {"dtype": dtype, "shape": [*shape], "data_offsets": [start, end]}
    content = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % ALIGNMENT)
    return struct.pack("<Q", len(content)) + content


def _metadata(value: Any) -> dict[str, str]:
    found = {} if value is None else value
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ValueError(f"{METADATA} is not texts by name")
    return found


def _entry(name: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict):
        raise ValueError(f"tensor {name!r:.80} is no object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"tensor {name!r:.80} has the unknown type {dtype!r:.40}")
    if not _are_sizes(shape):
        raise ValueError(f"tensor {name!r:.80} has the shape {shape!r:.40}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r:.80} has the offsets {offsets!r:.40}")
    start, end = offsets
    if _size(name, dtype, shape) != end - start:
        raise ValueError(f"tensor {name!r:.80} is {dtype} {shape!r:.40}, but spans {end - start} bytes")
    return TensorEntry(dtype, tuple(shape), start, end)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_SIZE for item in value)


def _size(name: str, dtype: str, shape: list[int]) -> int:
    """Bytes of a tensor; factor by factor, as the library refuses a product that is too large before a zero."""
    count = 1
    for length in shape:
        count *= length
        if count > MAX_SIZE:
            break
    bits = count * BITS[dtype]
    if bits > MAX_SIZE or bits % 8:
        raise ValueError(f"tensor {name!r:.80} has {dtype} {shape!r:.40}, which is no whole number of bytes")
    return bits // 8
