"""Plain text: windows of a stream of tokens, each token predicted from those before it."""

# B batch  T tokens  V vocabulary

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints import Artifact
from modularforge.config import Config, PhaseConfig
from modularforge.data.loader import batches, evaluation_batches, mixed_batches, order_of
from modularforge.data.mixing import Mixture, mixture_of, order_facts
from modularforge.data.token_files import ExampleTokens, Stream, TokenFile, Tokens
from modularforge.evaluation.scoring import measure, summed_loss
from modularforge.model.backbone import Decoder
from modularforge.routing.gathering import gather_statistics
from modularforge.routing.statistics import RouterStatistics
from modularforge.routing.text_counts import counts_of, save_counts
from modularforge.stage_outputs import (
    Corpus,
    derived_seed,
    even_streams,
    example_seeds,
    partition_labels,
)
from modularforge.stored_tokens import partition_tokens
from modularforge.tasks.task import TEXT_METRICS, Batch, Examples, Metric


@dataclass(frozen=True)
class TextExamples:
    """Shuffled windows of a stream of ids; `sample` takes others of them, for what routers are solved from.

    `own` is the text that tells this stream from others, where that is not all of it.
    """

    tokens: Tokens
    context_length: int
    batch_size: int
    seed: int
    name: str = "the training data"
    sample_seed: int = 0
    sample_windows: int = 0
    sample_batch: int = 1
    moments: bool = True
    mixture: Mixture | None = None
    steps: int = 0
    own: Tokens | None = None

    def batches(self, position: Any = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Endless batches; positions count windows over all ranks. Raises TrainingError where one is not filled."""
        place = int(position), rank, ranks, self.name, self.mixture
        return text_batches(batches(self.tokens, self.context_length, self.batch_size, self.seed, *place))

    def facts(self) -> dict[str, Any]:
        """What is drawn of each source of a mixture."""
        windows = max(len(self.tokens) - 1, 0) // self.context_length
        order = order_of(windows, self.context_length, self.seed, self.mixture)
        return order_facts(order, self.steps * self.batch_size)

    def sample(self) -> Iterator[Tensor]:
        """Inputs [B, T] of about `sample_windows` windows."""
        stream = batches(self.tokens, self.context_length, 1, self.sample_seed)
        for _ in range(max(1, self.sample_windows // self.sample_batch)):
            yield torch.cat([inputs_1T for inputs_1T, _, _ in itertools.islice(stream, self.sample_batch)])


@dataclass(frozen=True)
class MixedText:
    """The very windows that jobs on several streams take, each once, in one shuffled order."""

    streams: list[Tokens]
    seeds: list[int]
    windows_each: int
    context_length: int
    batch_size: int
    seed: int
    first_window: int = 0
    mixtures: Sequence[Mixture | None] = ()

    def batches(self, position: Any = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Batches until all windows were taken; positions count windows over all ranks."""
        sizes = self.windows_each, self.context_length, self.batch_size, self.seed
        place = int(position), rank, ranks, self.first_window
        return text_batches(mixed_batches(self.streams, self.seeds, *sizes, *place, mixtures=self.mixtures))


@dataclass(frozen=True)
class TextValidation:
    """A stream of held-out ids in windows."""

    tokens: Tokens
    context_length: int
    batch_size: int

    def summed_loss(self, model: Decoder, rank: int = 0, ranks: int = 1) -> tuple[float, float]:
        """Summed loss in nats of this rank's batches, and their tokens."""
        found = evaluation_batches(self.tokens, self.context_length, self.batch_size)
        return summed_loss(model, itertools.islice(found, rank, None, ranks), model.lm_head.weight.device)


@dataclass(frozen=True)
class HeldOutText:
    """Streams of domains that nothing was trained on, and how they are measured; `byte_lengths` is [V]."""

    domains: Mapping[str, Stream]
    byte_lengths: Tensor
    context_length: int
    batch_size: int
    tokens_per_domain: int


class TextTask:
    """The task `text`; `task.py` says what each method answers."""

    name, unit = "text", "tokens"
    table: tuple[Metric, ...] = TEXT_METRICS

    def everything(self, config: Config, corpus: Corpus) -> TextExamples:
        """All training text."""
        seed, sample_seed = example_seeds(config.seed, "backbone")
        name, file = "the training data", corpus.tokens("train")
        found = _examples(config, file.tokens, config.backbone.batch_size, seed, name, sample_seed)
        return _mixed(config, found, file, corpus.labels, config.backbone.steps)

    def part(self, config: Config, partitions: Artifact, index: int) -> TextExamples:
        """The text of one partition."""
        file = partition_tokens(partitions, index)
        found, labels = self.part_of(config, file.tokens, index), partition_labels(config, partitions, index)
        found = replace(found, own=own_text(config, file, labels))
        return _mixed(config, found, file, labels, config.experts.steps)

    def part_of(self, config: Config, tokens: Tokens, index: int) -> TextExamples:
        """The same of a stream that lies in no partition; its order follows from the seed and the index alone."""
        seed, sample_seed = example_seeds(config.seed, "expert", index)
        return _examples(config, tokens, config.experts.batch_size, seed, f"partition {index}", sample_seed)

    def mixture(
        self, config: Config, partitions: Artifact, name: str, phase: PhaseConfig, skipped_windows: int = 0
    ) -> Examples:
        """All partitions mixed: of each as many windows, in the order in which its expert takes them.

        With a phase of `Config.baseline_phase` they are what all experts see together, no token more or less. Those
        that come after the first `skipped_windows` of each partition are as many as the phase needs.
        """
        parts = [self.part(config, partitions, index) for index in range(config.experts.count)]
        return MixedText(
            [part.tokens for part in parts],
            [part.seed for part in parts],
            -(-phase.steps * phase.batch_size // config.experts.count),
            config.model.context_length,
            phase.batch_size,
            derived_seed(config.seed, f"{name} order"),
            skipped_windows,
            [part.mixture for part in parts],
        )

    def of_stream(
        self, config: Config, stream: Tokens, context_length: int, batch_size: int, seed: int, name: str
    ) -> TextExamples:
        """The windows of a stream."""
        return TextExamples(stream, context_length, batch_size, seed, name)

    def validation(self, config: Config, corpus: Corpus, labels: Collection[str] = ()) -> TextValidation:
        """As much text of each domain, `training.validation_tokens` of it."""
        domains = corpus.domains("validation")
        own = {label: domains[label] for label in labels if label in domains}
        tokens = even_streams(own or domains, config.training.validation_tokens)
        assert not isinstance(tokens, ExampleTokens)
        return TextValidation(tokens, config.model.context_length, config.evaluation.batch_size)

    def loss(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the next token, in nats."""
        loss: Tensor = model(tensors["inputs"], targets_BT=tensors["targets"])
        return loss

    def metrics(self, model: Decoder, held_out: HeldOutText, device: torch.device) -> dict[str, dict[str, float]]:
        """Loss, perplexity and bits per byte of each domain."""
        limits = held_out.batch_size, held_out.tokens_per_domain, held_out.context_length
        found = measure(model.to(device), held_out.domains, held_out.byte_lengths, *limits).domains
        return {
            label: {metric.name: getattr(item, metric.name) for metric in self.table} for label, item in found.items()
        }

    def statistics(self, model: Decoder, examples: TextExamples, device: torch.device) -> RouterStatistics:
        """What the routers see of the sample, and how often it has each token."""
        return gather_statistics(model, examples.sample(), device, examples.moments)

    def save_counts(
        self, config: Config, examples: TextExamples, vocab_size: int, special: Collection[int], path: Path
    ) -> None:
        """Write how often each token, and each pair of tokens, occurs."""
        own = examples.tokens if examples.own is None else examples.own
        save_counts(path, counts_of(config, own, vocab_size, special))


TEXT = TextTask()


def text_batches(stream: Iterable[tuple[Tensor, Tensor, int]]) -> Iterator[Batch]:
    """Inputs [B, T], targets [B, T] and position as batches with names."""
    for inputs_BT, targets_BT, position in stream:
        yield Batch({"inputs": inputs_BT, "targets": targets_BT}, position, inputs_BT.numel())


def _examples(config: Config, tokens: Tokens, batch_size: int, seed: int, name: str, sample_seed: int) -> TextExamples:
    context = config.model.context_length
    sample = sample_seed, config.gathered_tokens // context, config.evaluation.batch_size
    return TextExamples(tokens, context, batch_size, seed, name, *sample, config.gathers_moments)


def own_text(config: Config, file: TokenFile, labels: Sequence[str]) -> Tokens | None:
    """About as much of a partition's own text as is counted, whole documents from all over it; None where it is all.

    What every partition has would tell none from another, and the public expert from none of them.
    """
    if not config.partition.everywhere:
        return None
    general = [label for label, name in enumerate(labels) if name in config.partition.everywhere]
    documents = np.flatnonzero(~np.isin(file.labels, general))
    step = max(1, int(file.lengths[documents].sum()) // config.experts.counted_tokens)
    return np.concatenate([file.document(int(index)) for index in documents[::step]])


def _mixed(config: Config, found: TextExamples, file: TokenFile, labels: list[str], steps: int) -> TextExamples:
    return replace(found, mixture=mixture_of(config, file, labels, found.name), steps=steps)
