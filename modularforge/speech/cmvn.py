"""Mean and deviation of features from a statistics file, as other toolkits write it for CMVN.

Read are WeNet's JSON (`mean_stat`, `var_stat`, `frame_num`), Kaldi's matrices (`cmvn.ark`, text or binary, those of
several speakers added up) and ESPnet's `feats_stats.npz`. All hold sums over frames, from which the same follows.
"""

# M bins  S three sums: of ones, of values, of their squares

from __future__ import annotations

import hashlib
import io
import re
import struct
import zipfile
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from checkpoints.parsing import parse_object
from checkpoints.redact import redact
from modularforge.config import SpeechDataConfig
from modularforge.data.files import open_bytes, real_location
from modularforge.errors import DataError, one_line

Array = NDArray[np.float64]
KALDI_BINARY, KALDI_TYPES = b"\0B", {b"FM ": "<f4", b"DM ": "<f8"}
NAMES = ("frame_num", "mean_stat", "var_stat"), ("count", "sum", "sum_square")
"""Of the sums in JSON, and in an archive of NumPy."""


def mean_and_deviation(sums_SM: Array) -> NDArray[np.float32]:
    """Mean and standard deviation [2, M] from counts, sums and sums of squares."""
    mean_M = sums_SM[1] / np.maximum(sums_SM[0], 1)
    std_M = np.sqrt(np.maximum(sums_SM[2] / np.maximum(sums_SM[0], 1) - mean_M**2, 1e-10))
    return np.stack([mean_M, std_M]).astype(np.float32)


def statistics_in(settings: SpeechDataConfig) -> NDArray[np.float32] | None:
    """Mean and standard deviation [2, M] of the file that the settings name, None where they name none.

    Raises DataError for a file that cannot be read, or is of other bins.
    """
    if settings.statistics_file is None:
        return None
    url = real_location(settings.statistics_file)
    try:
        with open_bytes(url) as file:
            sums_SM = _sums(file.read())
        _check(sums_SM, settings.bins)
    except (DataError, ValueError, KeyError, TypeError, struct.error, zipfile.BadZipFile, EOFError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            "speech.data.normalise must be none, utterance, corpus, or a file of statistics (WeNet's JSON, Kaldi's "
            f"matrix, ESPnet's npz), but is {redact(url)}: {one_line(why).partition('; ')[0]}; name "
            "another file"
        ) from error
    return mean_and_deviation(sums_SM)


def statistics_identity(settings: SpeechDataConfig) -> dict[str, str]:
    """Identity of what a statistics file says, wherever and in whatever format it lies; nothing without one."""
    found = statistics_in(settings)
    return {} if found is None else {"cmvn": hashlib.sha256(found.tobytes()).hexdigest()[:32]}


def _sums(content: bytes) -> Array:
    """The sums [S, M] in a file, whose format its first bytes say."""
    if content.lstrip()[:1] == b"{":
        values = parse_object(content)
        return _of_parts([values[name] for name in NAMES[0]])
    if content.startswith(b"PK"):
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return _of_parts([archive[name] for name in NAMES[1]])
    matrices = list(_binary(content) if KALDI_BINARY in content[:1000] else _text(content.decode()))
    if not matrices:
        raise ValueError("it has no matrix in brackets, and is neither JSON nor an archive of NumPy")
    if any(len(matrix) != 2 or matrix.shape[1] < 2 for matrix in matrices):
        raise ValueError(f"its matrices must have two rows, sums and squares, but one is of {matrices[0].shape}")
    whole = np.sum(matrices, axis=0)
    return _of_parts([whole[0, -1], *whole[:, :-1]])


def _of_parts(parts: list[object]) -> Array:
    count, *sums = (np.asarray(part, np.float64) for part in parts)
    if count.ndim or any(one.ndim != 1 for one in sums) or len(sums[0]) != len(sums[1]):
        raise ValueError("it must have one count, and as many sums as squares")
    return np.stack([np.full(len(sums[0]), count), *sums])


def _text(content: str) -> Iterator[Array]:
    for matrix in re.findall(r"\[([^\]]*)\]", content):
        yield np.array([row.split() for row in matrix.split("\n") if row.strip()], np.float64)


def _binary(content: bytes) -> Iterator[Array]:
    start = content.find(KALDI_BINARY)
    while start >= 0:
        kind = content[start + 2 : start + 5]
        if kind not in KALDI_TYPES:
            raise ValueError(f"its matrices must be of floats or doubles, but one is of {kind!r}")
        rows, columns = struct.unpack_from("<xixi", content, start + 5)
        found = np.frombuffer(content, KALDI_TYPES[kind], max(0, rows * columns), start + 15)
        yield found.astype(np.float64).reshape(rows, columns)
        start = content.find(KALDI_BINARY, start + 15 + found.nbytes)


def _check(sums_SM: Array, bins: int) -> None:
    if sums_SM.shape[1] != bins:
        raise ValueError(f"it is of {sums_SM.shape[1]} bins, but speech.data.bins is {bins}")
    if not np.isfinite(sums_SM).all() or sums_SM[0, 0] < 1 or (sums_SM[2] < 0).any():
        raise ValueError("its count must be positive, its sums finite, and its squares not negative")
