"""Values of single tensors of committed weight files, for the few places where the assembler has to look at them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from checkpoints import paths
from checkpoints.safetensors import ITEM_BYTES, TensorSpan
from modularforge.assembly.convert import converted
from modularforge.errors import MismatchError

BLOCK_BYTES = 8 << 20


def values_of(span: TensorSpan) -> NDArray[np.float32]:
    """A small tensor as float32, flat; raises MismatchError when it is not what its manifest says."""
    return np.concatenate(list(_blocks(span, ITEM_BYTES[span.dtype])))


def rms_of_rows(span: TensorSpan, epsilon: float) -> NDArray[np.float64]:
    """Root mean square of every row of a matrix, read block by block, as RMSNorm takes it."""
    columns = span.shape[1]
    blocks = (
        block.reshape(-1, columns).astype(np.float64) for block in _blocks(span, columns * ITEM_BYTES[span.dtype])
    )
    return np.concatenate([np.sqrt((block**2).mean(axis=1) + epsilon) for block in blocks])


def _blocks(span: TensorSpan, unit: int) -> Iterator[NDArray[np.float32]]:
    """The tensor in blocks of whole units of bytes; its hash is compared at the end."""
    digest = hashlib.sha256()
    step = max(BLOCK_BYTES // unit, 1) * unit
    for start in range(0, span.length, step):
        end = min(start + step, span.length)
        content = paths.read_bytes(span.url, span.start + start, span.start + end)
        digest.update(content)
        yield converted(content, span.dtype, "F32")
    if span.sha256 and digest.hexdigest() != span.sha256:
        raise MismatchError(
            f"a tensor in {span.url} must have the sha256 that its manifest says, but differs: the file was changed or "
            "damaged after it was committed; delete that artifact and run its stage again"
        )
