"""Convert and widen rows of tensors on their way through the assembler, with numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

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
