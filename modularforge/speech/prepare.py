"""Turn audio into what training reads: features and ids of three splits, a tokenizer, and what was left out.

Features are computed once, on all cores, in groups that survive a kill: a repeated preparation loads them. What cannot
be used is counted by its reason, or stops the preparation, as the settings say.
"""

# F frames  M bins

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from checkpoints.parallel import in_order
from checkpoints.paths import write_atomically
from checkpoints.redact import redact_values
from checkpoints.screen import progress
from modularforge.config import Config, SourceConfig, SpeechDataConfig
from modularforge.data.corpus import HELD_OUT_CAP_DIVISOR, SPLITS, Split
from modularforge.data.tokenizer import (
    EOS,
    adopt_tokenizer,
    save_tokenizer,
    take_bytes,
    train_tokenizer,
    vocabulary_size,
)
from modularforge.errors import DataError
from modularforge.log import logger
from modularforge.speech.audio import SAMPLE_RATE, Samples, UnusableAudio, check_audible, decode, encode, resampled
from modularforge.speech.cmvn import mean_and_deviation, statistics_in
from modularforge.speech.feature_files import FRAME_TYPE, STATISTICS_NAME, SpeechFileWriter, computed_features
from modularforge.speech.features import FRAMES_A_SECOND, Features, frame_count
from modularforge.speech.records import Utterance, utterances

Dropped = dict[str, Counter[str]]
FORMAT = 1
"""Raise it when the same settings and files give other features."""
GROUP = 16
"""Utterances that are computed, and kept until all is done, together."""


@dataclass(frozen=True)
class Computed:
    """An utterance with its features, its recording, or both; or the reason why it is left out and words for it."""

    utterance: Utterance
    features: Features | None
    seconds: float = 0.0
    reason: str = ""
    words: str = ""
    audio: bytes = b""
    frames: int = 0


def prepare_speech(
    config: Config, output: Path, pretrained: Path | None = None, work: Path | None = None
) -> dict[str, Any]:
    """Write tokenizer, features and ids of all splits and `metadata.json` into `output`; return the last.

    The tokenizer is that of the model folder `pretrained`, or learned from the training texts. `work` is a folder that
    a repeated preparation of the same settings and files finds again. Raises DataError.
    """
    if pretrained is not None:
        tokenizer, end_token = adopt_tokenizer(pretrained, output)
    else:
        tokenizer, end_token = train_tokenizer(_texts(config), config.data.vocab_size), EOS
        save_tokenizer(tokenizer, output)
    if (statistics_2M := statistics_in(config.speech.data)) is not None:
        np.save(output / STATISTICS_NAME, statistics_2M)
    writer = Writer(config, tokenizer, end_token, output, work)
    splits = {split: writer.write(split) for split in SPLITS}
    writer.check()
    metadata = {
        "vocab_size": vocabulary_size(tokenizer),
        "end_token": end_token,
        "seed": config.preparation_seed,
        "labels": writer.labels,
        "splits": splits,
        "dropped_documents": {label: sum(reasons.values()) for label, reasons in sorted(writer.dropped.items())},
        "dropped_utterances": {label: dict(sorted(found.items())) for label, found in sorted(writer.dropped.items())},
        "bins": config.speech.data.bins,
        "sources": redact_values([source.model_dump() for source in config.data.sources]),
    }
    (output / "metadata.json").write_text(json.dumps(metadata, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return metadata


def describe_speech(config: Config, states: Mapping[str, list[Any]]) -> str:
    """A hash of the settings of data, and of the names, sizes and times of the files that they name."""
    facts: dict[str, Any] = {"format": FORMAT, "data": config.data.model_dump(), "files": states}
    facts["speech"] = config.speech.data.model_dump()
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()


def compute(utterance: Utterance, settings: SpeechDataConfig) -> Computed:
    """The features of one utterance, or its recording where that is kept, or why it is left out."""
    try:
        if utterance.prepared:
            prepared_FM = prepared_features(utterance, settings)
            if not prepared_ids(utterance):
                raise UnusableAudio("no text", "its labels are empty")
            return Computed(utterance, prepared_FM, len(prepared_FM) / FRAMES_A_SECOND, frames=len(prepared_FM))
        check_text(utterance.text, settings.max_text)
        samples, audio = _recording(utterance)
        seconds = len(samples) / SAMPLE_RATE
        check_length(seconds, settings)
        check_audible(samples, settings.refuses_clipped)
        if settings.keeps == "features":
            found_FM = computed_features(samples, settings)
            return Computed(utterance, found_FM, seconds, frames=len(found_FM))
        needed_FM = computed_features(samples, settings) if settings.normalise == "corpus" else None
        kept = audio() if callable(audio) else audio
        return Computed(utterance, needed_FM, seconds, audio=kept, frames=frame_count(samples, settings.features))
    except UnusableAudio as error:
        return Computed(utterance, None, 0.0, error.reason, str(error))


def _recording(utterance: Utterance) -> tuple[Samples, bytes | Callable[[], bytes]]:
    """Samples at 16 kHz, and a file's bytes that say the same."""
    if utterance.samples is not None:
        return resampled(*utterance.samples), partial(encode, *utterance.samples)
    if utterance.read is None:
        raise UnusableAudio("missing", "it names none")
    content = utterance.read()
    return decode(content), content


def check_text(text: str, most: int) -> None:
    """Raise UnusableAudio for no text, and for more than `most` characters."""
    if not text.strip():
        raise UnusableAudio("no text", "its text is empty")
    if len(text) > most:
        raise UnusableAudio("long text", f"its text has {len(text)} characters")


def check_length(seconds: float, settings: SpeechDataConfig) -> None:
    """Raise UnusableAudio for what is shorter or longer than the settings allow."""
    if seconds < settings.min_seconds:
        raise UnusableAudio("short", f"it is {seconds:.3f} seconds long")
    if seconds > settings.max_seconds:
        raise UnusableAudio("long", f"it is {seconds:.1f} seconds long")


FILTERED = ("short", "long", "long text", "no text")
"""Reasons that filters have; the others are of recordings that nobody could use."""


def prepared_features(utterance: Utterance, settings: SpeechDataConfig) -> Features:
    """Features that a data set has already, as Whisper's extractor writes them [M, F], or as frames [F, M]."""
    bins = settings.bins
    if settings.keeps == "audio":
        raise DataError(
            f"{utterance.origin} must have audio where speech.data.keeps is audio, but has input_features; set it to "
            "features"
        )
    try:
        found = np.asarray(utterance.prepared["input_features"], np.float32)
    except (ValueError, TypeError):
        found = np.zeros(0, np.float32)  # rows of several lengths, or no numbers
    if found.ndim != 2 or bins not in found.shape:
        raise DataError(
            f"{utterance.origin} must have input_features of {bins} bins, but has an array of {found.shape}; set "
            "speech.data.bins, or leave the column out"
        )
    if not found.size:
        raise UnusableAudio("empty", "it has no frames")
    if not np.isfinite(found).all():
        raise UnusableAudio("corrupt", "some of its features are no numbers")
    return np.ascontiguousarray(found.T) if found.shape[0] == bins else found


def prepared_ids(utterance: Utterance) -> list[int]:
    """Ids that a data set has already, without the negative ones that stand for no id."""
    found = utterance.prepared["labels"]
    if not isinstance(found, list | np.ndarray) or not all(isinstance(index, int | np.integer) for index in found):
        raise DataError(
            f"{utterance.origin} must have a list of token ids in column labels, but has {found!r:.60}; fix the "
            "record, or leave the column out"
        )
    return [int(index) for index in found if index >= 0]


class Writer:
    """Writes splits one after another; labels and what was left out add up."""

    def __init__(
        self, config: Config, tokenizer: Tokenizer, end_token: int, output: Path, work: Path | None = None
    ) -> None:
        self.config, self.tokenizer, self.end_token, self.output = config, tokenizer, end_token, output
        self.work = work
        self.labels = [source.name for source in config.data.sources if source.label_field is None]
        self.dropped: Dropped = {}

    def write(self, split: Split, most: int | None = None) -> dict[str, dict[str, float]]:
        """The files of a split, of each source at most so many; returns utterances, tokens, bytes, seconds by label."""
        totals: dict[str, Counter[str]] = {}
        settings = self.config.speech.data
        sums, is_summed = np.zeros((3, settings.bins)), split == "train" and settings.normalise == "corpus"
        with (
            SpeechFileWriter(self.output, split, vocabulary_size(self.tokenizer), settings.keeps) as writer,
            progress(f"{settings.keeps} {split}", None, "utterances") as bar,
        ):
            for source in self.config.data.sources:
                for computed in islice(self._usable(source, split), most or self._limit(source, split)):
                    self._add(writer, computed, totals)
                    if is_summed and computed.features is not None:
                        sums += [frames.sum(axis=0) for frames in _powers(computed.features)]
                    bar.advance(1)
        if is_summed:
            np.save(self.output / STATISTICS_NAME, mean_and_deviation(sums))
        counts = sum(total["documents"] for total in totals.values())
        logger.info("%s: %d utterances, %.1f minutes", split, counts, sum(t["seconds"] for t in totals.values()) / 60)
        for total in totals.values():
            total["seconds"] = round(total["seconds"], 3)
        return {label: dict(totals[label]) for label in self.labels if label in totals}

    def check(self) -> None:
        """Say what was left out; raise DataError when nothing is there to train on."""
        for label, reasons in sorted(self.dropped.items()):
            listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
            logger.warning("%s: left out %s", label, listed)
        bounds = np.load(self.output / "train.frames.npy")
        if len(bounds) < 2:
            raise DataError(
                "data.sources must have training utterances, but none of theirs could be used; see above what was left "
                "out, and check speech.data"
            )

    def _usable(self, source: SourceConfig, split: Split) -> Iterator[Computed]:
        settings = self.config.speech.data
        groups = _groups(utterances(self.config, source, split))
        compute_group = partial(computed_group, settings=settings, work=self.work)
        for computed in chain.from_iterable(in_order(compute_group, groups, 2 * (os.cpu_count() or 1))):
            if not computed.reason:
                yield computed
                continue
            if settings.unusable == "refuse" and computed.reason not in FILTERED:
                raise DataError(
                    f"{computed.utterance.origin} must be a recording that can be used, but {computed.words}; replace "
                    "it, or set speech.data.unusable to skip"
                )
            self.dropped.setdefault(computed.utterance.label, Counter())[computed.reason] += 1

    def _limit(self, source: SourceConfig, split: Split) -> int | None:
        most = self.config.data.max_documents_per_source
        if most is None or split == "train":
            return most
        return None if getattr(source, split) else max(1, most // HELD_OUT_CAP_DIVISOR)

    def _add(self, writer: SpeechFileWriter, computed: Computed, totals: dict[str, Counter[str]]) -> None:
        utterance, kept = computed.utterance, computed.audio or computed.features
        assert kept is not None
        ids = self._ids(utterance)
        prompt = self.config.speech.model.prompt if utterance.prompt is None else utterance.prompt
        if utterance.label not in self.labels:
            self.labels.append(utterance.label)
        text = utterance.text or self.tokenizer.decode(ids[:-1])
        record = {"audio": utterance.origin, "text": text, "seconds": round(computed.seconds, 3)}
        prompt_ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        writer.add(kept, computed.frames, ids, prompt_ids, self.labels.index(utterance.label), record)
        counts = totals.setdefault(utterance.label, Counter())
        counts.update(documents=1, tokens=len(ids), bytes=len(text.encode()))
        counts["seconds"] += computed.seconds  # type: ignore[assignment]

    def _ids(self, utterance: Utterance) -> list[int]:
        """Ids of the text and its end; those of a data set that has them already are taken as they are."""
        if utterance.prepared:
            ids = prepared_ids(utterance)
            if max(ids) >= (size := vocabulary_size(self.tokenizer)):
                raise DataError(
                    f"{utterance.origin} must have ids below {size} in column labels, the tokenizer's size, but has "
                    f"{max(ids)}; make them with this language model's tokenizer"
                )
        else:
            ids = self.tokenizer.encode(utterance.text, add_special_tokens=False).ids
        return ids if ids[-1:] == [self.end_token] else [*ids, self.end_token]


def _groups(found: Iterator[Utterance]) -> Iterator[list[Utterance]]:
    while group := list(islice(found, GROUP)):
        yield group


def computed_group(group: list[Utterance], settings: SpeechDataConfig, work: Path | None) -> list[Computed]:
    """Features of some utterances: those in the folder `work` where an earlier preparation left them, which is named
    by what the records say, and by the states of their recordings.
    """
    path = work / f"{_name(group)}.npz" if work is not None else None
    if path is not None and path.exists():
        return list(_loaded(group, path))
    found = [compute(utterance, settings) for utterance in group]
    if path is not None:
        write_atomically(path, [_packed(found, settings)], replace=True)
    return found


def _name(group: list[Utterance]) -> str:
    said = [(one.origin, one.text, one.label, one.prompt, one.state()) for one in group]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()


def _packed(found: list[Computed], settings: SpeechDataConfig) -> bytes:
    """What was computed of a group; frames as exactly as what becomes of them asks for."""
    dtype = np.dtype("<f4") if settings.normalise == "corpus" else FRAME_TYPE
    features_FM = [one.features for one in found if one.features is not None]
    facts = [
        [one.features is not None, one.frames, one.seconds, one.reason, one.words, len(one.audio)] for one in found
    ]
    arrays: dict[str, Any] = {
        "features": np.concatenate([np.zeros((0, settings.bins), np.float32), *features_FM]).astype(dtype),
        "audio": np.frombuffer(b"".join(one.audio for one in found), np.uint8),
        "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8),
    }
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _loaded(group: list[Utterance], path: Path) -> Iterator[Computed]:
    with np.load(path) as content:
        features_FM, audio, facts = (content[name] for name in ("features", "audio", "facts"))
    frame = byte = 0
    for utterance, (has_features, frames, seconds, reason, words, size) in zip(
        group, json.loads(facts.tobytes()), strict=True
    ):
        own_FM = features_FM[frame : frame + frames].astype(np.float32) if has_features else None
        yield Computed(utterance, own_FM, seconds, reason, words, audio[byte : byte + size].tobytes(), frames)
        frame, byte = frame + frames * has_features, byte + size


def _powers(frames_FM: Features) -> list[Any]:
    wide_FM = frames_FM.astype(np.float64)
    return [np.ones_like(wide_FM), wide_FM, wide_FM**2]


def _texts(config: Config) -> Iterator[str]:
    """The training texts of each source, in equal shares of `data.tokenizer_sample_bytes`."""
    share = config.data.tokenizer_sample_bytes // len(config.data.sources)
    for source in config.data.sources:
        yield from take_bytes((found.text for found in utterances(config, source, "train")), share)
