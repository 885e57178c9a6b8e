"""Read a GGUF file (version 3): its metadata, and its tensors as float32 arrays.

Only what llama.cpp's Q4_1 conversion of a Llama holds: types F32, Q4_1 and Q8_0. Arrays of the metadata become lists.
"""

# N blocks

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, LIST = 8, 9
BLOCK = 32  # values of a quantised block
# By type: its name, bytes of a block, values of a block.
TYPES = {0: ("F32", 4, 1), 3: ("Q4_1", 20, BLOCK), 8: ("Q8_0", 34, BLOCK)}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: shape (outermost first), type, and offset in the data."""

    shape: tuple[int, ...]
    type: int
    offset: int


class Gguf:
    """One open file; tensors are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            magic, version, tensors, entries = file.read(4), *_read(file, "<IQQ")
            if magic != b"GGUF" or version != 3:
                raise ValueError(f"{path} must be a GGUF file of version 3, but is not; download it again")
            self.metadata = {_text(file): _value(file, *_read(file, "<I")) for _ in range(entries)}
            self.places = dict(_place(file) for _ in range(tensors))
            alignment = int(self.metadata.get("general.alignment", 32))
            self.start = -(-file.tell() // alignment) * alignment

    def tensors(self) -> Iterator[tuple[str, Array]]:
        """Names and values of all tensors, in the order of the file."""
        for name in self.places:
            yield name, self.tensor(name)

    def tensor(self, name: str) -> Array:
        """One tensor in float32, its shape outermost axis first."""
        place = self.places[name]
        if place.type not in TYPES:
            known = ", ".join(name for name, _, _ in TYPES.values())
            raise ValueError(f"{name} in {self.path} must be of type {known}, but is of number {place.type}")
        _, block_bytes, block_values = TYPES[place.type]
        size = int(np.prod(place.shape)) // block_values * block_bytes
        raw = np.fromfile(self.path, np.uint8, size, offset=self.start + place.offset)
        return DECODERS[place.type](raw).reshape(place.shape)


def _decode_f32(raw: npt.NDArray[np.uint8]) -> Array:
    return raw.view("<f4")


def _decode_q4_1(raw: npt.NDArray[np.uint8]) -> Array:
    """Blocks of scale, minimum (fp16) and 16 bytes, whose low halves are values 0 to 15 and high halves 16 to 31."""
    blocks_N20 = raw.reshape(-1, 20)
    scale_N1, least_N1 = (blocks_N20[:, at : at + 2].copy().view("<f2").astype(np.float32) for at in (0, 2))
    packed_N16 = blocks_N20[:, 4:]
    values_N32 = np.concatenate([packed_N16 & 15, packed_N16 >> 4], axis=1)
    return values_N32 * scale_N1 + least_N1


def _decode_q8_0(raw: npt.NDArray[np.uint8]) -> Array:
    """Blocks of a scale (fp16) and 32 signed bytes."""
    blocks_N34 = raw.reshape(-1, 34)
    scale_N1 = blocks_N34[:, :2].copy().view("<f2").astype(np.float32)
    return blocks_N34[:, 2:].view(np.int8) * scale_N1


DECODERS = {0: _decode_f32, 3: _decode_q4_1, 8: _decode_q8_0}


def _read(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _text(file: BinaryIO) -> str:
    (length,) = _read(file, "<Q")
    return file.read(length).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _text(file)
    if kind == LIST:
        kind, count = _read(file, "<IQ")
        return [_value(file, kind) for _ in range(count)]
    return _read(file, SCALARS[kind])[0]


def _place(file: BinaryIO) -> tuple[str, Place]:
    name, (axes,) = _text(file), _read(file, "<I")
    shape = _read(file, f"<{axes}Q")
    kind, offset = _read(file, "<IQ")
    return name, Place(shape[::-1], kind, offset)
