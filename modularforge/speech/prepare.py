"""Turn audio into what training reads: features and ids of three splits, a tokenizer, and what was left out.

Features are computed once, on all cores. What cannot be used is counted by its reason, or stops the preparation, as the
settings say.
"""

# F frames  M bins

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from checkpoints.parallel import in_order
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
from modularforge.speech.audio import SAMPLE_RATE, UnusableAudio, check_audible, decode, resampled
from modularforge.speech.feature_files import STATISTICS_NAME, SpeechFileWriter
from modularforge.speech.features import FRAMES_A_SECOND, Features, features, normalised
from modularforge.speech.records import Utterance, utterances

Dropped = dict[str, Counter[str]]


@dataclass(frozen=True)
class Computed:
    """An utterance and its features; without features, the reason why it is left out and words for it."""

    utterance: Utterance
    features: Features | None
    seconds: float = 0.0
    reason: str = ""
    words: str = ""


def prepare_speech(config: Config, output: Path, pretrained: Path | None = None) -> dict[str, Any]:
    """Write tokenizer, features and ids of all splits and `metadata.json` into `output`; return the last.

    The tokenizer is that of the model folder `pretrained`, or learned from the training texts. Raises DataError.
    """
    if pretrained is not None:
        tokenizer, end_token = adopt_tokenizer(pretrained, output)
    else:
        tokenizer, end_token = train_tokenizer(_texts(config), config.data.vocab_size), EOS
        save_tokenizer(tokenizer, output)
    writer = _Writer(config, tokenizer, end_token, output)
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


def compute(utterance: Utterance, settings: SpeechDataConfig) -> Computed:
    """The features of one utterance, or why it is left out."""
    try:
        if utterance.prepared:
            prepared_FM = prepared_features(utterance, settings.bins)
            return Computed(utterance, prepared_FM, len(prepared_FM) / FRAMES_A_SECOND)
        check_text(utterance.text, settings.max_text)
        if utterance.samples is not None:
            samples = resampled(*utterance.samples)
        elif utterance.read is not None:
            samples = decode(utterance.read())
        else:
            raise UnusableAudio("missing", "it names none")
        seconds = len(samples) / SAMPLE_RATE
        check_length(seconds, settings)
        check_audible(samples, settings.refuses_clipped)
        found_FM = features(samples, settings.features, settings.bins)
        found_FM = normalised(found_FM) if settings.normalise == "utterance" else found_FM
        return Computed(utterance, found_FM, seconds)
    except UnusableAudio as error:
        return Computed(utterance, None, 0.0, error.reason, str(error))


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


def prepared_features(utterance: Utterance, bins: int) -> Features:
    """Features that a data set has already, as Whisper's extractor writes them [M, F], or as frames [F, M]."""
    found = np.asarray(utterance.prepared["input_features"], np.float32)
    if found.ndim == 2 and found.shape[0] == bins:
        return np.ascontiguousarray(found.T)
    if found.ndim == 2 and found.shape[1] == bins:
        return found
    raise DataError(
        f"{utterance.origin} must have input_features of {bins} bins, but has an array of {found.shape}; set "
        "speech.data.bins, or leave the column out"
    )


class _Writer:
    """Writes splits one after another; labels and what was left out add up."""

    def __init__(self, config: Config, tokenizer: Tokenizer, end_token: int, output: Path) -> None:
        self.config, self.tokenizer, self.end_token, self.output = config, tokenizer, end_token, output
        self.labels = [source.name for source in config.data.sources if source.label_field is None]
        self.dropped: Dropped = {}

    def write(self, split: Split) -> dict[str, dict[str, float]]:
        """The files of a split; returns utterances, tokens, bytes and seconds by label."""
        totals: dict[str, Counter[str]] = {}
        sums = np.zeros((3, self.config.speech.data.bins))
        with (
            SpeechFileWriter(self.output, split, vocabulary_size(self.tokenizer)) as writer,
            progress(f"features {split}", None, "utterances") as bar,
        ):
            for source in self.config.data.sources:
                for computed in islice(self._usable(source, split), self._limit(source, split)):
                    self._add(writer, computed, totals)
                    assert computed.features is not None
                    sums += [frames.sum(axis=0) for frames in _powers(computed.features)]
                    bar.advance(1)
        if split == "train" and self.config.speech.data.normalise == "corpus":
            np.save(self.output / STATISTICS_NAME, _statistics(sums))
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
        found = utterances(self.config, source, split)
        for computed in in_order(partial(compute, settings=settings), found, 2 * (os.cpu_count() or 1)):
            if computed.features is not None:
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
        utterance, frames = computed.utterance, computed.features
        assert frames is not None
        ids = self._ids(utterance)
        prompt = self.config.speech.model.prompt if utterance.prompt is None else utterance.prompt
        if utterance.label not in self.labels:
            self.labels.append(utterance.label)
        text = utterance.text or self.tokenizer.decode(ids[:-1])
        record = {"audio": utterance.origin, "text": text, "seconds": round(computed.seconds, 3)}
        prompt_ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        writer.add(frames, ids, prompt_ids, self.labels.index(utterance.label), record)
        counts = totals.setdefault(utterance.label, Counter())
        counts.update(documents=1, tokens=len(ids), bytes=len(text.encode()))
        counts["seconds"] += computed.seconds  # type: ignore[assignment]

    def _ids(self, utterance: Utterance) -> list[int]:
        """Ids of the text and its end; those of a data set that has them already are taken as they are."""
        if utterance.prepared:
            ids = [int(index) for index in utterance.prepared["labels"] if index >= 0]
        else:
            ids = self.tokenizer.encode(utterance.text, add_special_tokens=False).ids
        return ids if ids[-1:] == [self.end_token] else [*ids, self.end_token]


def _powers(frames_FM: Features) -> list[Any]:
    wide_FM = frames_FM.astype(np.float64)
    return [np.ones_like(wide_FM), wide_FM, wide_FM**2]


def _statistics(sums_3M: Any) -> Any:
    """Mean and standard deviation [2, M] from counts, sums and sums of squares."""
    mean_M = sums_3M[1] / np.maximum(sums_3M[0], 1)
    std_M = np.sqrt(np.maximum(sums_3M[2] / np.maximum(sums_3M[0], 1) - mean_M**2, 1e-10))
    return np.stack([mean_M, std_M]).astype(np.float32)


def _texts(config: Config) -> Iterator[str]:
    """The training texts of each source, in equal shares of `data.tokenizer_sample_bytes`."""
    share = config.data.tokenizer_sample_bytes // len(config.data.sources)
    for source in config.data.sources:
        yield from take_bytes((found.text for found in utterances(config, source, "train")), share)
