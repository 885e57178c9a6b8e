"""Speech: utterances in, transcripts (or answers) out; the loss is of the answer's ids alone."""

# B batch  F feature frames  M bins  P prompt ids  A answer ids  D encoder width  L sites

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from checkpoints import Artifact, open_artifact, paths
from modularforge.config import Config, PhaseConfig
from modularforge.errors import TrainingError
from modularforge.model.backbone import perplexity
from modularforge.pipeline import stage_url
from modularforge.routing.statistics import RouterStatistics
from modularforge.speech.costs import heard
from modularforge.speech.feature_files import (
    STATISTICS_NAME,
    Remote,
    SpeechFile,
    content_name,
    file_names,
    open_speech_file,
)
from modularforge.speech.gates import GateReader, frame_facts, reading, usage_facts, weight_facts
from modularforge.speech.metrics import Pair, pooled, worst
from modularforge.speech.model import NO_TOKEN, SpeechModel, speech_loss
from modularforge.speech.sums import gather_sums
from modularforge.stage_outputs import Corpus, derived_seed, example_seeds
from modularforge.stored_tokens import partition_artifact
from modularforge.tasks.task import SPEECH_METRICS, Batch, Examples, Metric

Indices = NDArray[np.int64]
NOBODY: Indices = np.zeros(0, np.int64)
UTTERANCES_A_VALIDATION = 256  # of all domains together; they are short


@dataclass(frozen=True)
class SpeechExamples:
    """Shuffled utterances; `sample` takes the first of another order, of `sample_frames` of 20 ms together."""

    file: SpeechFile
    utterances: Indices
    batch_size: int
    seed: int
    name: str = "the training data"
    sample_seed: int = 0
    sample_frames: int = 0

    def batches(self, position: Any = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Endless batches; positions count utterances over all ranks. Raises TrainingError where one is not filled."""
        if len(self.utterances) < self.batch_size or self.batch_size % ranks:
            raise TrainingError(
                f"{self.name} must fill one batch of {self.batch_size} utterances, in equal shares for {ranks} "
                f"processes, but has {len(self.utterances)}; lower batch_size, add audio, or make fewer partitions"
            )
        first = int(position)
        while True:
            chosen = self._order(first, first + self.batch_size)
            first += self.batch_size
            yield batch_of(self.file, chosen, first, rank, ranks)

    def _order(self, first: int, end: int) -> Indices:
        """Utterances at the positions [first, end): a permutation for each epoch."""
        count = len(self.utterances)
        epochs = range(first // count, (end - 1) // count + 1)
        orders = np.concatenate([np.random.default_rng([self.seed, epoch]).permutation(count) for epoch in epochs])
        start = first - epochs.start * count
        chosen: Indices = self.utterances[orders[start : start + end - first]]
        return chosen

    def taken(self, steps: int) -> dict[str, Any]:
        """What so many steps of a training heard."""
        return heard(self.file, self._order(0, steps * self.batch_size)) if steps else heard(self.file, NOBODY)

    def sample(self) -> Iterator[Batch]:
        """What routers are solved from, each utterance once."""
        order = np.random.default_rng([self.sample_seed]).permutation(len(self.utterances))
        chosen = self.utterances[order]
        frames = np.cumsum((self.file.bounds[chosen + 1] - self.file.bounds[chosen]) // 2)
        order = order[: 1 + int(np.searchsorted(frames, self.sample_frames))]
        for start in range(0, len(order), self.batch_size):
            yield batch_of(self.file, self.utterances[order[start : start + self.batch_size]], 0)


@dataclass(frozen=True)
class MixedSpeech:
    """The very utterances that jobs on several partitions take, each as often, in one shuffled order."""

    parts: list[SpeechExamples]
    utterances_each: int
    batch_size: int
    seed: int
    skipped: int = 0

    def batches(self, position: Any = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Batches until all were taken; positions count utterances over all ranks."""
        mixed = self._order()
        for first in range(int(position), len(mixed) - self.batch_size + 1, self.batch_size):
            end = first + self.batch_size
            yield batch_of(self.parts[0].file, mixed[first:end], end, rank, ranks)

    def taken(self, steps: int) -> dict[str, Any]:
        """What so many steps of a training heard."""
        return heard(self.parts[0].file, self._order()[: steps * self.batch_size])

    def _order(self) -> Indices:
        end = self.skipped + self.utterances_each
        taken = np.concatenate([part._order(self.skipped, end) for part in self.parts])
        mixed: Indices = np.random.default_rng([self.seed]).permutation(taken)
        return mixed


@dataclass(frozen=True)
class SpeechValidation:
    """Held-out utterances in order."""

    file: SpeechFile
    utterances: Indices
    batch_size: int

    def summed_loss(self, model: SpeechModel, rank: int = 0, ranks: int = 1) -> tuple[float, float]:
        """Summed loss in nats of this rank's batches, and the ids it was taken over."""
        loss, count = 0.0, 0
        starts = range(0, len(self.utterances), self.batch_size)
        model.eval()
        with torch.no_grad():
            for start in starts[rank::ranks]:
                batch = batch_of(self.file, self.utterances[start : start + self.batch_size], 0)
                logits_NV, target_N = model(*arguments(batch.tensors, model.device))
                loss += float(nn.functional.cross_entropy(logits_NV.float(), target_N, reduction="sum"))
                count += len(target_N)
        return loss, float(count)


@dataclass(frozen=True)
class HeldOutSpeech:
    """Test utterances of each domain, and how they are transcribed."""

    file: SpeechFile
    domains: Mapping[str, Indices]
    corpus: Corpus
    batch_size: int
    max_tokens: int
    listed: int = 0


class SpeechTask:
    """The task `speech`; `task.py` says what each method answers."""

    name, unit = "speech", "seconds"
    table: tuple[Metric, ...] = SPEECH_METRICS

    def everything(self, config: Config, corpus: Corpus) -> SpeechExamples:
        """All training utterances."""
        file = speech_file(config, corpus.artifact, "train")
        seed, sample_seed = example_seeds(config.seed, "backbone")
        everything = np.arange(file.count)
        sizes = sample_seed, config.experts.statistics_tokens
        return SpeechExamples(file, everything, config.backbone.batch_size, seed, "the training data", *sizes)

    def part(self, config: Config, partitions: Artifact, index: int) -> SpeechExamples:
        """The utterances of one partition, whose features lie with the corpus."""
        file = speech_file(config, open_artifact(stage_url(config, "prepare-data")), "train")
        chosen: Indices = np.load(partition_artifact(partitions, index).local_file(f"partition-{index}.documents.npy"))
        seed, sample_seed = example_seeds(config.seed, "expert", index)
        sizes = sample_seed, config.experts.statistics_tokens
        return SpeechExamples(file, chosen, config.experts.batch_size, seed, f"partition {index}", *sizes)

    def mixture(
        self, config: Config, partitions: Artifact, name: str, phase: PhaseConfig, skipped_windows: int = 0
    ) -> Examples:
        """All partitions mixed: of each as many utterances, the very ones that its expert takes."""
        parts = [self.part(config, partitions, index) for index in range(config.experts.count)]
        each = -(-phase.steps * phase.batch_size // config.experts.count)
        return MixedSpeech(parts, each, phase.batch_size, derived_seed(config.seed, f"{name} order"), skipped_windows)

    def validation(self, config: Config, corpus: Corpus, labels: Collection[str] = ()) -> SpeechValidation:
        """As many utterances of each domain; of all where there are none of these."""
        file = speech_file(config, corpus.artifact, "validation")
        domains = by_domain(file, corpus)
        own = {label: domains[label] for label in labels if label in domains} or domains
        share = max(1, UTTERANCES_A_VALIDATION // max(1, len(own)))
        chosen = np.concatenate([indices[:share] for indices in own.values()])
        return SpeechValidation(file, chosen, config.speech.decoding.batch_size)

    def loss(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the answers' ids, in nats; all ids of all pieces and ranks weigh alike."""
        return speech_loss(model, tensors)

    def metrics(self, model: SpeechModel, held_out: HeldOutSpeech, device: torch.device) -> dict[str, dict[str, float]]:
        """Loss, error rates and accuracies of each domain."""
        return {label: row for label, (row, _) in measure(model, held_out, device).items()}

    def statistics(self, model: SpeechModel, examples: SpeechExamples, device: torch.device) -> RouterStatistics:
        """What gates see at each site of the sample, frame by frame."""
        return gather_sums(model, self._tensors(examples), device).frames

    def save_counts(self, config: Config, examples: Any, vocab_size: int, special: Collection[int], path: Path) -> None:
        """Nothing: no router of speech reads ids."""

    def _tensors(self, examples: SpeechExamples) -> Iterator[Mapping[str, Tensor]]:
        return (batch.tensors for batch in examples.sample())


SPEECH = SpeechTask()


def measure(
    model: SpeechModel, held_out: HeldOutSpeech, device: torch.device, usage: dict[str, GateReader] | None = None
) -> dict[str, tuple[dict[str, float], list[Pair]]]:
    """Metrics of each domain, and what was written of each utterance; `usage` gets what gates did on each domain."""
    model.to(device).eval()
    found = {}
    for label, indices in held_out.domains.items():
        with reading(model) as reader:
            found[label] = _measured(model, held_out, indices)
        if usage is not None and reader is not None:
            usage[label] = reader
    return found


def _measured(model: SpeechModel, held_out: HeldOutSpeech, indices: Indices) -> tuple[dict[str, float], list[Pair]]:
    loss, right, count, pairs = 0.0, 0, 0, list[Pair]()
    corpus, records = held_out.corpus, held_out.file.records
    with torch.inference_mode():
        for start in range(0, len(indices), held_out.batch_size):
            chosen = indices[start : start + held_out.batch_size]
            features, frames, prompt, answer = arguments(batch_of(held_out.file, chosen, 0).tensors, model.device)
            logits_NV, target_N = model(features, frames, prompt, answer)
            loss += float(nn.functional.cross_entropy(logits_NV.float(), target_N, reduction="sum"))
            right += int((logits_NV.argmax(dim=-1) == target_N).sum())
            count += len(target_N)
            written = model.transcribe(features, frames, prompt, corpus.end_token, held_out.max_tokens)
            for index, ids in zip(chosen, written, strict=True):
                record = records[int(index)]
                text = corpus.tokenizer.decode(ids)
                pairs.append(Pair(record["text"], text, record["audio"], record["seconds"]))
    size = sum(len(pair.reference.encode()) for pair in pairs)
    mean = loss / max(1, count)
    row = {"loss": mean, "perplexity": perplexity(mean), "bits_per_byte": loss / max(1, size) / float(np.log(2))}
    return {**row, **pooled(pairs), "token_accuracy": right / max(1, count), "tokens": count, "bytes": size}, pairs


def gates_of(model: SpeechModel, held_out: HeldOutSpeech, usage: Mapping[str, GateReader]) -> dict[str, Any]:
    """All that is known of a steered model's gates: in the mean, by domain, and over the first test utterance."""
    assert model.steering is not None
    first = int(next(iter(held_out.domains.values()))[0])
    features_FM, record = torch.from_numpy(held_out.file.features(first)), held_out.file.records[first]
    utterance = frame_facts(model, features_FM, record)["utterance"]
    return {**weight_facts(model.steering), **usage_facts(usage), "utterance": utterance}


def listing(measured: Mapping[str, tuple[Mapping[str, float], list[Pair]]], most: int) -> dict[str, Any]:
    """The worst utterances of each domain."""
    return {label: worst(pairs, most) for label, (_, pairs) in measured.items()}


def held_out_speech(config: Config, corpus: Corpus, split: str = "test") -> HeldOutSpeech:
    """The test utterances of a run, or those of another split."""
    file, settings = speech_file(config, corpus.artifact, split), config.speech.decoding
    domains = {label: indices[: settings.max_utterances] for label, indices in by_domain(file, corpus).items()}
    return HeldOutSpeech(file, domains, corpus, settings.batch_size, settings.max_tokens, settings.listed)


def held_out_test(config: Config, corpus: Corpus, name: str, file: SpeechFile) -> HeldOutSpeech:
    """A test set beside the domains, as one domain of its own."""
    settings, everything = config.speech.decoding, {name: np.arange(file.count)}
    return HeldOutSpeech(file, everything, corpus, settings.batch_size, settings.max_tokens, settings.listed)


def by_domain(file: SpeechFile, corpus: Corpus) -> dict[str, Indices]:
    """Utterances of each domain that has some."""
    found = {label: np.flatnonzero(file.tokens.labels == index) for index, label in enumerate(corpus.labels)}
    return {label: indices for label, indices in found.items() if len(indices)}


def speech_file(config: Config, corpus: Artifact, split: str) -> SpeechFile:
    """The files of a split; from an object store the small ones are fetched first, and features as they are needed."""
    settings = config.speech.data
    names, content = file_names(split, settings.keeps), content_name(split, settings.keeps)
    names += [STATISTICS_NAME] if STATISTICS_NAME in corpus.manifest.files else []
    if paths.is_local(corpus.url):
        (folder,) = {corpus.local_file(name).parent for name in (*names, content)}
        return open_speech_file(folder, split, settings)
    read = partial(paths.read_bytes, corpus.file_url(content))
    remote = Remote(read, corpus.entry(content).size)
    return open_speech_file(corpus.local_folder(names=names), split, settings, remote)


def batch_of(file: SpeechFile, indices: Indices, position: Any, rank: int = 0, ranks: int = 1) -> Batch:
    """This rank's share of utterances as padded tensors: features [B, F, M] with zeros, prompts [B, P] and answers
    [B, A] with -1 behind; and in each row of `whole` how many ids and utterances all ranks have together.
    """
    ids = int((file.tokens.offsets[indices + 1] - file.tokens.offsets[indices]).sum())
    share, whole = len(indices) // ranks, (ids, len(indices))
    indices = indices[rank * share : (rank + 1) * share]
    features = [torch.from_numpy(np.array(found_FM)) for found_FM in file.features_of(indices.tolist())]
    frames_B = torch.tensor([len(frames_FM) for frames_FM in features])
    padded_BFM = nn.utils.rnn.pad_sequence(features, batch_first=True)
    prompt_BP, answer_BA = (
        _ids([own.document(int(index)) for index in indices]) for own in (file.prompts, file.tokens)
    )
    tensors = {"features": padded_BFM, "frames": frames_B, "prompt": prompt_BP, "answer": answer_BA}
    tensors["whole"] = torch.tensor([whole] * share)
    return Batch(tensors, position, float(frames_B.sum()) / 100)


def _ids(rows: list[Any]) -> Tensor:
    tensors = [torch.from_numpy(row.astype(np.int64)) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=NO_TOKEN)


def arguments(tensors: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch as the model takes it."""
    features, frames, prompt, answer = (tensors[name].to(device) for name in ("features", "frames", "prompt", "answer"))
    return features, frames, prompt, answer
