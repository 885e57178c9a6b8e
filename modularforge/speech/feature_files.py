"""Features and texts on disk, written once as a stream and read as memory maps.

Of a split NAME, ``NAME.features.bin`` are frames one after another (float16, [frames, bins]) and ``NAME.frames.npy``
where each utterance starts, and the end (int64). Its texts are a token file NAME, one document an utterance, their
prompts a token file ``NAME.prompts``, and ``NAME.utterances.jsonl`` says of each where its audio lay.
"""

# M bins

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from modularforge.data.token_files import TokenFile, TokenFileWriter, open_token_file
from modularforge.errors import DataError, one_line
from modularforge.speech.features import Features

FRAME_TYPE = np.dtype("<f2")
PARTS = ("features.bin", "frames.npy", "utterances.jsonl")
TOKEN_PARTS = ("tokens.bin", "offsets.npy", "labels.npy")


class SpeechFileWriter:
    """Writes the files of a split as its utterances come; their bounds are written when the block ends well."""

    def __init__(self, folder: Path, name: str, vocab_size: int) -> None:
        self.folder, self.name = folder, name
        self.tokens = TokenFileWriter(folder, name, vocab_size)
        self.prompts = TokenFileWriter(folder, f"{name}.prompts", vocab_size)
        self.frames = array("q", [0])
        self.features = open(folder / f"{name}.features.bin", "wb")  # noqa: SIM115 closed by __exit__
        self.records = open(folder / f"{name}.utterances.jsonl", "w", encoding="utf-8")  # noqa: SIM115

    def add(self, features_FM: Features, ids: list[int], prompt: list[int], label: int, record: dict[str, Any]) -> None:
        """Append an utterance; `ids` are those of its text and its end."""
        self.features.write(np.ascontiguousarray(features_FM, FRAME_TYPE).data)
        self.frames.append(self.frames[-1] + len(features_FM))
        for writer, own in ((self.tokens, ids), (self.prompts, prompt)):
            writer.add(np.asarray(own, writer.dtype), np.asarray([len(own)]), np.asarray([label]))
        self.records.write(json.dumps(record, ensure_ascii=False) + "\n")

    def __enter__(self) -> SpeechFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.features.close()
        self.records.close()
        for writer in (self.tokens, self.prompts):
            writer.__exit__(kind, error, trace)
        if error is None:
            np.save(self.folder / f"{self.name}.frames.npy", np.array(self.frames, dtype="<i8"))


@dataclass(frozen=True)
class SpeechFile:
    """Utterances of a split; `frames` are all features, those of utterance i between bounds i and i + 1."""

    tokens: TokenFile
    prompts: TokenFile
    frames: npt.NDArray[Any]
    bounds: npt.NDArray[np.int64]
    folder: Path
    name: str

    def features(self, index: int) -> Features:
        """Frames [F, M] of an utterance."""
        found: Features = np.asarray(self.frames[self.bounds[index] : self.bounds[index + 1]], np.float32)
        return found if self.statistics is None else (found - self.statistics[0]) / self.statistics[1]

    @property
    def count(self) -> int:
        """How many utterances there are."""
        return len(self.bounds) - 1

    @cached_property
    def statistics(self) -> npt.NDArray[np.float32] | None:
        """Mean and standard deviation of the training frames, [2, M], where features are normalised by them."""
        path = self.folder / STATISTICS_NAME
        return np.load(path).astype(np.float32) if path.exists() else None

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """What is known of each utterance: its audio, its text, its seconds."""
        content = (self.folder / f"{self.name}.utterances.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in content.split("\n") if line]  # texts may hold other line ends


STATISTICS_NAME = "feature_statistics.npy"


def file_names(name: str) -> list[str]:
    """The files of a split."""
    token_files = [f"{own}.{part}" for own in (name, f"{name}.prompts") for part in TOKEN_PARTS]
    return [*token_files, *(f"{name}.{part}" for part in PARTS)]


def open_speech_file(folder: Path, name: str, bins: int) -> SpeechFile:
    """Memory-map the files of a split; raises DataError when they are missing, truncated or inconsistent."""
    tokens, prompts = open_token_file(folder, name), open_token_file(folder, f"{name}.prompts")
    try:
        bounds = np.load(folder / f"{name}.frames.npy")
        size = (folder / f"{name}.features.bin").stat().st_size
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder / name} must have features, but they cannot be read ({one_line(str(error))}); run prepare-data "
            "again"
        ) from error
    expected = int(bounds[-1]) * bins * FRAME_TYPE.itemsize
    if size != expected or not len(bounds) - 1 == tokens.num_documents == prompts.num_documents:
        raise DataError(
            f"{folder / name}.features.bin must hold {expected} bytes for {tokens.num_documents} utterances of {bins} "
            f"bins, but has {size} for {len(bounds) - 1}; it is truncated, or speech.data.bins changed: run "
            "prepare-data again"
        )
    shape = (int(bounds[-1]), bins)
    path = folder / f"{name}.features.bin"
    frames: Any = np.memmap(path, FRAME_TYPE, "r", shape=shape) if size else np.empty(shape, FRAME_TYPE)
    return SpeechFile(tokens, prompts, frames, bounds, folder, name)
