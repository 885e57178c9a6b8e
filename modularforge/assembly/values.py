"""Values of tensors with numpy alone: converted and widened on their way through the assembler, or looked at.

Single tensors of committed weight files are read for the few places where their values matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints import digests, paths
from checkpoints.safetensors import ITEM_BYTES, TensorSpan
from modularforge.errors import MismatchError

NUMPY_OF = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "U8": "u1",
    "BOOL": "?",
}
QUIET_NAN = 0x7FC0
BLOCK_BYTES = 8 << 20


def converted(content: bytes | memoryview, source: str, target: str) -> NDArray[Any]:
    """The values of type `source` as a flat array of type `target` (bfloat16 as its 16 bits), rounded to nearest even.

    The same bits as torch's ``Tensor.to``; values beyond float16's range become infinite.
    """
    values: NDArray[Any] = np.frombuffer(content, NUMPY_OF[source])
    if source == target:
        return values
    if source == "BF16":
        values = (values.astype("<u4") << 16).view("<f4")
    if target == "BF16":
        return _to_bfloat16(values.astype("<f4", copy=False))
    with np.errstate(over="ignore"):
        return values.astype(NUMPY_OF[target])


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view("<u4")
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    rounded[np.isnan(values)] = QUIET_NAN
    result: NDArray[np.uint16] = rounded
    return result


def widened(rows_RD: NDArray[Any], columns: int, beside_RC: NDArray[Any] | None) -> NDArray[Any]:
    """Rows with `columns` more entries each: those of `beside_RC`, or zeros."""
    wide = np.zeros((len(rows_RD), rows_RD.shape[1] + columns), rows_RD.dtype)
    wide[:, : rows_RD.shape[1]] = rows_RD
    if beside_RC is not None:
        wide[:, rows_RD.shape[1] :] = beside_RC
    return wide


def values_of(span: TensorSpan) -> NDArray[np.float32]:
    """A tensor as float32, flat; raises MismatchError when it is not what its manifest says."""
    found = np.empty(span.length // ITEM_BYTES[span.dtype], np.float32)
    start = 0
    for block in _blocks(span, ITEM_BYTES[span.dtype]):
        found[start : start + len(block)] = block
        start += len(block)
    return found


def rms_of_rows(span: TensorSpan, epsilon: float) -> NDArray[np.float64]:
    """Root mean square of every row of a matrix, read block by block, as RMSNorm takes it."""
    columns = span.shape[1]
    blocks = (
        block.reshape(-1, columns).astype(np.float64) for block in _blocks(span, columns * ITEM_BYTES[span.dtype])
    )
    return np.concatenate([np.sqrt((block**2).mean(axis=1) + epsilon) for block in blocks])


def _blocks(span: TensorSpan, unit: int) -> Iterator[NDArray[np.float32]]:
    """The tensor in blocks of whole units of bytes; its hash is compared at the end."""
    digest = digests.like(span.digest)
    step = max(BLOCK_BYTES // unit, 1) * unit
    for start in range(0, span.length, step):
        end = min(start + step, span.length)
        content = paths.read_bytes(span.url, span.start + start, span.start + end)
        digest.update(content)
        yield converted(content, span.dtype, "F32")
    if span.digest and digest.text() != span.digest:
        raise MismatchError(
            f"a tensor in {span.url} must have the hash that its manifest says, but differs: the file was changed or "
            "damaged after it was committed; delete that artifact and run its stage again"
        )
