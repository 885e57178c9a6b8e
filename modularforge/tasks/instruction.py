"""Responses to prompts: examples of which the response alone is learned, packed into rows without seeing each other.

Documents of text that are read one by one are such examples too, of which all is learned (`data.packing`).
"""

# B batch  T tokens

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints import Artifact
from modularforge.config import Config, PhaseConfig
from modularforge.data.mixing import Mixture, mixture_of, order_facts
from modularforge.data.packing import PADDING, Rows, example_batches, mixed_example_batches, ordered_batches
from modularforge.data.token_files import ExampleTokens, Stream, Tokens
from modularforge.errors import MismatchError
from modularforge.evaluation.scoring import summed_loss
from modularforge.log import logger
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
from modularforge.tasks.text import TEXT, HeldOutText, own_text


@dataclass(frozen=True)
class InstructionExamples:
    """Shuffled rows of examples; `sample` takes others of them, for what routers are solved from.

    `own` is what tells these examples from others, where that is not all of them.
    """

    stream: ExampleTokens
    context_length: int
    batch_size: int
    seed: int
    name: str = "the training data"
    packs: bool = True
    sample_seed: int = 0
    sample_rows: int = 0
    moments: bool = True
    mixture: Mixture | None = None
    steps: int = 0
    own: Tokens | None = None

    @cached_property
    def rows(self) -> Rows:
        """The examples in rows."""
        return Rows(self.stream, self.context_length, self.seed, self.packs, self.mixture)

    def batches(self, position: Any = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Endless batches; positions count rows over all ranks. Raises TrainingError where one is not filled."""
        _tell_of_cuts(self.rows, self.name)
        stream = example_batches(self.rows, self.batch_size, self.seed, int(position), rank, ranks, self.name)
        return (_batch(tensors, place) for tensors, place in stream)

    def facts(self) -> dict[str, Any]:
        """How many examples there are, and how many did not fit in the context as they are."""
        if self.stream.is_text:
            drawn = order_facts(self.rows.order(self.seed), self.steps * self.batch_size)
            return {"documents": self.rows.text_facts, **drawn}
        prompts, responses = len(self.rows.long_examples), self.rows.cut_responses
        return {"examples": {"count": self.stream.num_examples, "cut_prompts": prompts, "cut_responses": responses}}

    def sample(self) -> Iterator[dict[str, Tensor]]:
        """Tensors of about `sample_rows` rows."""
        rows = example_batches(self.rows, 1, self.sample_seed)
        for tensors, _ in itertools.islice(rows, max(1, self.sample_rows)):
            yield tensors


@dataclass(frozen=True)
class MixedInstructions:
    """The very rows that jobs on several parts take, each once, in one shuffled order."""

    parts: list[InstructionExamples]
    rows_each: int
    batch_size: int
    seed: int
    first_row: int = 0

    def batches(self, position: Any = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Batches until all rows were taken; positions count rows over all ranks."""
        rows, seeds = [part.rows for part in self.parts], [part.seed for part in self.parts]
        sizes = self.rows_each, self.batch_size, self.seed
        place = int(position), rank, ranks, self.first_row
        return (_batch(tensors, behind) for tensors, behind in mixed_example_batches(rows, seeds, *sizes, *place))


@dataclass(frozen=True)
class InstructionValidation:
    """Held-out examples, in rows."""

    stream: ExampleTokens
    context_length: int
    batch_size: int

    def summed_loss(self, model: Decoder, rank: int = 0, ranks: int = 1) -> tuple[float, float]:
        """Summed loss in nats of this rank's batches, and their learned tokens."""
        found = ordered_batches(Rows(self.stream, self.context_length), self.batch_size)
        mine = itertools.islice(found, rank, None, ranks)
        batches = ((batch["inputs"], batch["targets"], batch["examples"]) for batch in mine)
        return summed_loss(model, batches, model.lm_head.weight.device)


class InstructionTask:
    """The task `instruction`; `task.py` says what each method answers."""

    name, unit = "instruction", "tokens"
    table: tuple[Metric, ...] = TEXT_METRICS

    def everything(self, config: Config, corpus: Corpus) -> InstructionExamples:
        """All training examples."""
        seed, sample_seed = example_seeds(config.seed, "backbone")
        name, file = "the training data", corpus.tokens("train")
        found = _examples(config, file.whole, config.backbone.batch_size, seed, name, sample_seed)
        return replace(found, mixture=mixture_of(config, file, corpus.labels, name), steps=config.backbone.steps)

    def part(self, config: Config, partitions: Artifact, index: int) -> InstructionExamples:
        """The examples of one partition; their order follows from the seed and the index alone."""
        seed, sample_seed = example_seeds(config.seed, "expert", index)
        name, file = f"partition {index}", partition_tokens(partitions, index, config.reads_documents)
        found = _examples(config, file.whole, config.experts.batch_size, seed, name, sample_seed)
        labels = partition_labels(config, partitions, index)
        found = replace(found, mixture=mixture_of(config, file, labels, name), own=own_text(config, file, labels))
        return replace(found, steps=config.experts.steps)

    def mixture(
        self, config: Config, partitions: Artifact, name: str, phase: PhaseConfig, skipped_windows: int = 0
    ) -> Examples:
        """All partitions mixed: of each as many rows, the very ones that its expert takes."""
        return MixedInstructions(
            [self.part(config, partitions, index) for index in range(config.experts.count)],
            -(-phase.steps * phase.batch_size // config.experts.count),
            phase.batch_size,
            derived_seed(config.seed, f"{name} order"),
            skipped_windows,
        )

    def of_stream(
        self, config: Config, stream: Stream, context_length: int, batch_size: int, seed: int, name: str
    ) -> InstructionExamples:
        """The examples of a stream."""
        return InstructionExamples(_checked(stream), context_length, batch_size, seed, name, config.training.packing)

    def validation(self, config: Config, corpus: Corpus, labels: Collection[str] = ()) -> InstructionValidation:
        """As many examples of each domain, about `training.validation_tokens` together."""
        domains = corpus.domains("validation")
        own = {label: domains[label] for label in labels if label in domains}
        stream = even_streams(own or domains, config.training.validation_tokens)
        return InstructionValidation(_checked(stream), config.model.context_length, config.evaluation.batch_size)

    def loss(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the batch's learned tokens, in nats; all tokens of all pieces and ranks weigh alike."""
        inputs_BT, examples_BT, targets_BT = (tensors[name] for name in ("inputs", "examples", "targets"))
        total: Tensor = model(inputs_BT, examples_BT=examples_BT, targets_BT=targets_BT, reduction="sum")
        return total / tensors["row_targets"].sum()

    def metrics(self, model: Decoder, held_out: HeldOutText, device: torch.device) -> dict[str, dict[str, float]]:
        """Loss, perplexity and bits per byte of the learned tokens of each domain."""
        return TEXT.metrics(model, held_out, device)

    def statistics(self, model: Decoder, examples: InstructionExamples, device: torch.device) -> RouterStatistics:
        """What the routers see of the sample, prompts and responses, and how often it has each token."""
        batches = ((tensors["inputs"], tensors["examples"]) for tensors in examples.sample())
        return gather_statistics(model, batches, device, examples.moments)

    def save_counts(
        self, config: Config, examples: InstructionExamples, vocab_size: int, special: Collection[int], path: Path
    ) -> None:
        """Write how often each token, and each pair of tokens, occurs in prompts and responses."""
        own = examples.stream.tokens if examples.own is None else examples.own
        save_counts(path, counts_of(config, own, vocab_size, special))


INSTRUCTION = InstructionTask()


def _batch(tensors: Mapping[str, Tensor], position: int) -> Batch:
    return Batch(tensors, position, float((tensors["examples"] != PADDING).sum()))


def _examples(
    config: Config, stream: Stream, batch_size: int, seed: int, name: str, sample_seed: int
) -> InstructionExamples:
    context, packs = config.model.context_length, config.training.packing
    rows = config.gathered_tokens // context
    sample = sample_seed, rows, config.gathers_moments
    return InstructionExamples(_checked(stream), context, batch_size, seed, name, packs, *sample)


def _checked(stream: Stream) -> ExampleTokens:
    if not isinstance(stream, ExampleTokens):
        raise MismatchError(
            "data of task instruction must say what is learned, but was prepared as plain text; run prepare-data in "
            "another place"
        )
    return stream


def _tell_of_cuts(rows: Rows, name: str) -> None:
    if rows.stream.is_text:
        logger.info(
            "%(count)d documents of %(name)s are in %(rows)d sequences, %(filled).1f %% of them filled; %(cut)d are "
            "longer than a sequence and cut, into %(pieces)d pieces",
            {**rows.text_facts, "name": name, "filled": 100 * rows.text_facts["filled"]},
        )
    elif count := len(rows.long_examples):
        logger.warning(
            "%d of %d examples of %s are longer than %d tokens: their prompts lose the beginning%s",
            count,
            rows.stream.num_examples,
            name,
            rows.context_length,
            f", and {rows.cut_responses} responses their end" if rows.cut_responses else "",
        )
