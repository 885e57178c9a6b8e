"""Features and texts on disk, written once as a stream and read as memory maps.

Of a split NAME, ``NAME.features.bin`` are frames one after another (float16, [frames, bins]) and ``NAME.frames.npy``
where each utterance starts, and the end (int64). Its texts are a token file NAME, one document an utterance, their
prompts a token file ``NAME.prompts``, and ``NAME.utterances.jsonl`` says of each where its audio lay.

Where recordings are kept in place of features, ``NAME.audio.bin`` are files of audio one after another, and
``NAME.audio.npy`` where each starts, and the end, in bytes; features are computed when they are asked for.
"""

# M bins

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from checkpoints.options import cache_folder
from checkpoints.parallel import in_order
from modularforge.config import SpeechDataConfig
from modularforge.data.token_files import TokenFile, TokenFileWriter, open_token_file
from modularforge.errors import DataError, one_line
from modularforge.speech.audio import Samples, decode
from modularforge.speech.features import Features, features, normalised

FRAME_TYPE = np.dtype("<f2")
PARTS = ("frames.npy", "utterances.jsonl")
KEPT = {"features": ("features.bin",), "audio": ("audio.bin", "audio.npy")}
Keeps = Literal["features", "audio"]
TOKEN_PARTS = ("tokens.bin", "offsets.npy", "labels.npy")


class SpeechFileWriter:
    """Writes the files of a split as its utterances come; their bounds are written when the block ends well."""

    def __init__(self, folder: Path, name: str, vocab_size: int, keeps: Keeps = "features") -> None:
        self.folder, self.name, self.keeps = folder, name, keeps
        self.tokens = TokenFileWriter(folder, name, vocab_size)
        self.prompts = TokenFileWriter(folder, f"{name}.prompts", vocab_size)
        self.frames, self.sizes = array("q", [0]), array("q", [0])
        self.content = open(folder / f"{name}.{KEPT[keeps][0]}", "wb")  # noqa: SIM115 closed by __exit__
        self.records = open(folder / f"{name}.utterances.jsonl", "w", encoding="utf-8")  # noqa: SIM115

    def add(
        self, kept: Features | bytes, frames: int, ids: list[int], prompt: list[int], label: int, record: dict[str, Any]
    ) -> None:
        """Append an utterance, its features [F, M] or recording; `ids` are those of its text and its end."""
        content = kept if isinstance(kept, bytes) else np.ascontiguousarray(kept, FRAME_TYPE).data
        self.content.write(content)
        self.frames.append(self.frames[-1] + frames)
        self.sizes.append(self.sizes[-1] + memoryview(content).nbytes)
        for writer, own in ((self.tokens, ids), (self.prompts, prompt)):
            writer.add(np.asarray(own, writer.dtype), np.asarray([len(own)]), np.asarray([label]))
        self.records.write(json.dumps(record, ensure_ascii=False) + "\n")

    def __enter__(self) -> SpeechFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.content.close()
        self.records.close()
        for writer in (self.tokens, self.prompts):
            writer.__exit__(kind, error, trace)
        if error is None:
            np.save(self.folder / f"{self.name}.frames.npy", np.array(self.frames, dtype="<i8"))
        if error is None and self.keeps == "audio":
            np.save(self.folder / f"{self.name}.audio.npy", np.array(self.sizes, dtype="<i8"))


@dataclass(frozen=True)
class Remote:
    """A file in an object store: what reads its bytes [start, end), and its size."""

    read: Callable[[int, int], bytes]
    size: int


class Fetched:
    """Rows of a file in an object store. Each slice is fetched when it is asked for, and then kept in a sparse file.

    Nobody else sees that file, which is gone with the process. Slices must be those of utterances, and threads may
    share them. Raises DataError where the store has fewer bytes.
    """

    def __init__(self, remote: Remote, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            self.rows = np.memmap(file, dtype, "w+", shape=shape)
        self.remote, self.here = remote, set[int]()

    def __getitem__(self, span: slice) -> npt.NDArray[Any]:
        """These rows."""
        start, end, width = int(span.start), int(span.stop), self.rows[:1].nbytes
        if start not in self.here:
            content = self.remote.read(start * width, end * width)
            if len(content) != (end - start) * width:
                raise DataError(
                    f"prepared data must have {self.remote.size} bytes of {self.rows.dtype}, but their store gives "
                    f"{len(content)} of {(end - start) * width} from byte {start * width}; run prepare-data again"
                )
            self.rows[span] = np.frombuffer(content, self.rows.dtype).reshape(-1, *self.rows.shape[1:])
            self.here.add(start)
        return self.rows[span]


@dataclass(frozen=True)
class Recordings:
    """Files of audio one after another, of which features are computed as they are asked for."""

    content: npt.NDArray[np.uint8] | Fetched
    bounds: npt.NDArray[np.int64]
    settings: SpeechDataConfig

    def features(self, index: int) -> Features:
        """Frames [F, M], rounded as those on disk are, so that both give the same losses."""
        samples = decode(self.content[self.bounds[index] : self.bounds[index + 1]].tobytes())
        return computed_features(samples, self.settings).astype(FRAME_TYPE).astype(np.float32)


def computed_features(samples: Samples, settings: SpeechDataConfig) -> Features:
    """The features of one recording as a run's settings want them [F, M], before those of a corpus are normalised."""
    found_FM = features(samples, settings.features, settings.bins)
    return normalised(found_FM) if settings.normalise == "utterance" else found_FM


@dataclass(frozen=True)
class SpeechFile:
    """Utterances of a split; `frames` are all features, those of utterance i between bounds i and i + 1.

    Where recordings are kept there are no frames, and their bounds say how many there would be.
    """

    tokens: TokenFile
    prompts: TokenFile
    frames: npt.NDArray[Any] | Fetched
    bounds: npt.NDArray[np.int64]
    folder: Path
    name: str
    recordings: Recordings | None = None

    def features_of(self, indices: Iterable[int]) -> list[Features]:
        """Frames [F, M] of some utterances; what lies in a store is fetched for several at a time."""
        if isinstance(self.frames, Fetched):
            return list(in_order(self.features, indices, FETCHED_AT_ONCE))
        return [self.features(index) for index in indices]

    def features(self, index: int) -> Features:
        """Frames [F, M] of an utterance."""
        if self.recordings is not None:
            found = self.recordings.features(index)
        else:
            found = np.asarray(self.frames[self.bounds[index] : self.bounds[index + 1]], np.float32)
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
FETCHED_AT_ONCE = 16  # an object store answers each in tens of milliseconds


def content_name(name: str, keeps: Keeps = "features") -> str:
    """The file of a split that holds its features, or its recordings."""
    return f"{name}.{KEPT[keeps][0]}"


def file_names(name: str, keeps: Keeps = "features") -> list[str]:
    """The other files of a split, which are small."""
    token_files = [f"{own}.{part}" for own in (name, f"{name}.prompts") for part in TOKEN_PARTS]
    return [*token_files, *(f"{name}.{part}" for part in (*KEPT[keeps][1:], *PARTS))]


def open_speech_file(folder: Path, name: str, settings: SpeechDataConfig, remote: Remote | None = None) -> SpeechFile:
    """Memory-map the files of a split; raises DataError when they are missing, truncated or inconsistent.

    `remote` says where features or recordings lie, if not with the other files.
    """
    keeps, bins = settings.keeps, settings.bins
    tokens, prompts = open_token_file(folder, name), open_token_file(folder, f"{name}.prompts")
    try:
        bounds = np.load(folder / f"{name}.frames.npy")
        sizes = np.load(folder / f"{name}.audio.npy") if keeps == "audio" else bounds * bins * FRAME_TYPE.itemsize
        path = folder / content_name(name, keeps)
        size = remote.size if remote else path.stat().st_size
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder / name} must have {keeps}, but they cannot be read ({one_line(str(error))}); run prepare-data "
            "again"
        ) from error
    expected = int(sizes[-1])
    if size != expected or not len(bounds) - 1 == len(sizes) - 1 == tokens.num_documents == prompts.num_documents:
        raise DataError(
            f"{path} must hold {expected} bytes for {tokens.num_documents} utterances of {bins} "
            f"bins, but has {size} for {len(bounds) - 1}; it is truncated, or speech.data.bins changed: run "
            "prepare-data again"
        )
    dtype, shape = (np.dtype(np.uint8), (size,)) if keeps == "audio" else (FRAME_TYPE, (int(bounds[-1]), bins))
    content: Any = np.empty(shape, dtype)
    if size:
        content = Fetched(remote, dtype, shape) if remote else np.memmap(path, dtype, "r", shape=shape)
    recordings = Recordings(content, sizes, settings) if keeps == "audio" else None
    return SpeechFile(tokens, prompts, content, bounds, folder, name, recordings)
