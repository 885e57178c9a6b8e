"""What a task answers: which examples there are, what is minimised, how well a model does, what routers may know.

A task knows no kind of expert and nothing of the loop. It is found by name in a table that a Python entry point of the
group `modularforge.tasks` can extend.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from modularforge.plugins import find

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from checkpoints import Artifact
    from modularforge.config import Config, PhaseConfig
    from modularforge.model.backbone import Decoder
    from modularforge.routing.statistics import RouterStatistics
    from modularforge.stage_outputs import Corpus

GROUP = "modularforge.tasks"
OWN = {
    "text": "modularforge.tasks.text:TEXT",
    "instruction": "modularforge.tasks.instruction:INSTRUCTION",
    "speech": "modularforge.tasks.speech:SPEECH",
}

LEARN_RESPONSES = ("instruction",)
"""Tasks whose data are examples, of which responses alone are learned; here, where settings need no torch."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a batch, as named tensors [B, …].

    `position` (a JSON value) restarts the stream behind this batch, and 0 at its beginning; `units` is how many of the
    task's units (tokens, seconds) the share holds.
    """

    tensors: Mapping[str, Tensor]
    position: Any
    units: float


class Examples(Protocol):
    """A source of examples."""

    def batches(self, position: Any = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """This rank's share of each batch from a position on; n ranks together take the batches that one would.

        Raises TrainingError when there are too few for a batch.
        """


def examples_facts(examples: Examples) -> dict[str, Any]:
    """What a job's manifest says of its examples, such as how many were cut; a source that has nothing to say needs no
    method `facts`.
    """
    facts = getattr(examples, "facts", None)
    return dict(facts()) if facts else {}


def examples_taken(examples: Examples, steps: int) -> dict[str, Any]:
    """What a job's manifest says of the examples that so many steps took; a source that has nothing to say needs no
    method `taken`.
    """
    taken = getattr(examples, "taken", None)
    return dict(taken(steps)) if taken else {}


class Validation(Protocol):
    """Held-out examples that a training is validated on."""

    def summed_loss(self, model: Any, rank: int = 0, ranks: int = 1) -> tuple[float, float]:
        """Summed loss of this rank's share, and the number of targets that it was taken over."""


@dataclass(frozen=True)
class Metric:
    """A column of results: its unit, which direction is better, and whether it decides between models (one does).

    `in_table`: a terminal has room for few; files and the page show all. Tables have so many `digits`, and show each
    domain by the one that is `by_domain`. `factor` makes what is stored what is shown, in its unit.
    """

    name: str
    unit: str
    better: Literal["lower", "higher"]
    decides: bool = False
    title: str = ""
    digits: int = 4
    in_table: bool = True
    factor: float = 1.0
    by_domain: bool = False


TEXT_METRICS = (
    Metric("loss", "nats per token", "lower", decides=True, title="mean loss"),
    Metric("perplexity", "", "lower", title="perplexity", digits=2, by_domain=True),
    Metric("bits_per_byte", "bits", "lower", title="bits/byte", in_table=False),
)
"""What `text` measures; here, where whoever shows results needs no torch."""


SPEECH_METRICS = (
    Metric("wer", "%", "lower", decides=True, title="WER", digits=1, factor=100, by_domain=True),
    Metric("cer", "%", "lower", title="CER", digits=1, factor=100),
    Metric("string_accuracy", "%", "higher", title="string accuracy", digits=1, factor=100, in_table=False),
    Metric("token_accuracy", "%", "higher", title="token accuracy", digits=1, factor=100, in_table=False),
    Metric("loss", "nats per token", "lower", title="mean loss"),
)
"""What `speech` measures: error rates are pooled over a domain's utterances."""


class Task(Protocol):
    """One kind of task; all methods with a `Config` read their sections of it alone."""

    name: str
    unit: str
    table: tuple[Metric, ...]

    def everything(self, config: Config, corpus: Corpus) -> Examples:
        """All training examples, as the backbone takes them."""

    def part(self, config: Config, partitions: Artifact, index: int) -> Examples:
        """The examples of one partition, as its expert takes them."""

    def mixture(
        self, config: Config, partitions: Artifact, name: str, phase: PhaseConfig, skipped_windows: int = 0
    ) -> Examples:
        """Those of all partitions mixed, the very ones that the experts take, for the baseline called `name`."""

    def of_stream(
        self, config: Config, stream: Any, context_length: int, batch_size: int, seed: int, name: str
    ) -> Examples:
        """The examples of a stream that lies in no partition, which a calibration fits to.

        A task of which no model is calibrated needs no such method.
        """

    def validation(self, config: Config, corpus: Corpus, labels: Collection[str] = ()) -> Validation:
        """What a job is validated on: held-out examples of these domains, or of all where there are none of them."""

    def loss(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        """Mean loss of a batch over the targets that its mask leaves; pieces of a batch, and ranks, weigh alike."""

    def metrics(self, model: Decoder, held_out: Any, device: torch.device) -> dict[str, dict[str, float]]:
        """What `table` lists, for each domain of this task's held-out examples."""

    def statistics(self, model: Decoder, examples: Any, device: torch.device) -> RouterStatistics:
        """What a model's routers see of a sample of a job's own examples: sums only."""

    def save_counts(self, config: Config, examples: Any, vocab_size: int, special: Collection[int], path: Path) -> None:
        """Write what the examples look like to a router that reads them itself: sums only, `special` tokens left out.

        A task whose examples no such router reads writes nothing.
        """


def find_task(name: str) -> Task:
    """The task of this name; raises ConfigError with the names that there are."""
    task: Task = find(GROUP, OWN, name, "a task")
    return task


def task_of(config: Config) -> Task:
    """The task of a run, `task`; documents of text that are read one by one are examples of which all is learned."""
    return find_task("instruction" if config.reads_documents else config.task)
