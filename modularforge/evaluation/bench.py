"""The text of one split, cut into windows once, on which any number of models are measured, one in memory at a time.

A run's evaluation and a study are measured here, and so alike: the evaluation is the study of one run.
"""

# R rows (windows)  T tokens of a window

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from modularforge.config import Config, ModelConfig
from modularforge.data.token_files import Stream
from modularforge.errors import DataError
from modularforge.evaluation.extras import Chat, Extras, prepare_chat, token_streams
from modularforge.evaluation.generation import Sampling, continue_each, open_prompt
from modularforge.evaluation.harness import Harness
from modularforge.evaluation.paired import differences
from modularforge.evaluation.probes import CHAT, GENERAL, SPREAD, TEXT, Probe, domain_probes, text_probe
from modularforge.evaluation.replies import prepare_tasks
from modularforge.evaluation.scoring import (
    RoutingCount,
    Row,
    full_row,
    oracle,
    routing_summary,
    score,
    summarise,
)
from modularforge.log import logger
from modularforge.model.backbone import Decoder, perplexity
from modularforge.model.moe import moe_layers, shape_without_channels
from modularforge.model.sizes import Sizes, lora_sizes, model_sizes, with_own_rows
from modularforge.pipeline import JobName
from modularforge.stage_outputs import Corpus
from modularforge.training.distributed import default_device
from modularforge.training.meter import peak_memory_bytes
from modularforge.training.precision import measuring

Loader = Callable[[], Decoder]
Results = dict[str, Any]
Scores = dict[str, Tensor]
Visits = dict[str, RoutingCount]
# Of the tokens of a domain as many are predicted behind a switch, and as many in mixed documents: the former read as
# many before it, so that 3/8 more tokens are read. A study, which has less text on validation, takes twice as many.
PROBE_SHARE = 8


@dataclass(frozen=True)
class Bench:
    """Streams by domain, of which `config.evaluation` says how models read them; `limit` tokens of each count.

    Of each domain `probe_limit` targets are predicted behind a switch, and as many in mixed documents.
    """

    config: Config
    corpus: Corpus
    domains: Mapping[str, Stream]
    limit: int
    probe_limit: int
    extras: Extras = field(default_factory=Extras)
    cut: dict[int, dict[str, Probe]] = field(default_factory=dict)

    @cached_property
    def chat(self) -> Chat | None:
        """The questions as tokens."""
        return prepare_chat(self.extras.questions, self.corpus) if self.extras.questions else None

    def probes(self, model: Decoder | None = None) -> dict[str, Probe]:
        """What is to be predicted, by name, in windows that a model can read; without one, in those of the run."""
        positions = self.config.model.context_length
        positions = positions if model is None else min(positions, model.config.positions)
        if positions not in self.cut:
            self.cut[positions] = self._cut(positions)
        return self.cut[positions]

    def score(self, model: Decoder, only: Collection[str] = (), visits: Visits | None = None) -> Scores:
        """What a model gives every target of the probes, or of those in `only`, [R, T] by name.

        `visits` gets the routing counts on the text of each domain.
        """
        model.to(default_device())
        wanted = {name: probe for name, probe in self.probes(model).items() if not only or name in only}
        batch_size = self.config.evaluation.batch_size
        with measuring(self.config.training, default_device()):
            return {
                name: score(model, probe, batch_size, visits if name == TEXT else None)
                for name, probe in wanted.items()
            }

    def carried(self, model: Decoder) -> Tensor:
        """The same on the text, with a text router that goes on from window to window of a document."""
        with measuring(self.config.training, default_device()):
            return score(model, self.probes(model)[TEXT], self.config.evaluation.batch_size, carries=True)

    def summarise(self, scores: Scores, model: Decoder | None = None) -> Row:
        """Losses from the log-probabilities of the targets of the probes for a model."""
        return full_row(self.probes(model), scores, self.corpus.byte_lengths)

    def _cut(self, positions: int) -> dict[str, Probe]:
        end = self.corpus.end_token
        found = domain_probes(self.domains, positions, end, self.limit, self.probe_limit)
        if self.extras.texts:
            general = token_streams(self.extras.texts, self.corpus, self.limit)
            found[GENERAL] = text_probe(GENERAL, general, positions, end, self.limit)
        if self.chat:
            found[CHAT] = self._chat_probe(self.chat, positions)
        return found

    def _chat_probe(self, chat: Chat, positions: int) -> Probe:
        probe = chat.probe()
        if (tokens := probe.inputs_RT.shape[1]) > positions:
            raise DataError(
                f"prompts with their answers in evaluation.chat must have at most {positions} tokens, but one has "
                f"{tokens}; shorten it"
            )
        return probe


def measure_models(
    config: Config,
    corpus: Corpus,
    loaders: Mapping[str, Loader],
    with_samples: Collection[str],
    extras: Extras | None = None,
    ends: Collection[int] = (),
) -> Results:
    """Results by model name on the test split, in the order of `loaders`.

    Texts are sampled from the models in `with_samples`; all answer the prompts of `evaluation.tasks`, where a reply
    also ends at one of `ends`, and do the tasks of `evaluation.harness`. Schema: docs/observing.md. Losses are means
    over test tokens, domains weigh alike.
    """
    device, limit = default_device(), config.evaluation.tokens_per_domain
    streams = corpus.domains("test", limit * SPREAD)
    bench = Bench(config, corpus, streams, limit, limit // PROBE_SHARE, extras or Extras())
    results: Results = {"name": config.name, "domains": list(streams), "models": {}, "routing": {}, "samples": {}}
    replies: dict[str, list[str]] = {}
    tasks, harness = prepare_tasks(config, corpus), Harness(config, corpus.tokenizer, corpus.end_token)
    for number, (name, load) in enumerate(loaders.items(), 1):
        model = load().to(device)
        visits: Visits = {}
        row = _row(bench, model, visits if name in with_samples else None)
        sizes = sizes_of(model, config.model.context_length)
        results["models"][name] = {**row, **sizes, "training_tokens": training_tokens(config, name)}
        logger.info("%s: mean test loss %.4f (%d of %d)", name, row["mean_loss"], number, len(loaders))
        if visits:
            results["routing"][name] = routing_summary(visits)
        with measuring(config.training, device):
            if name in with_samples:
                results["samples"][name] = sample_texts(config, corpus, model)
            for task in tasks:
                task.ask(name, model, {corpus.end_token, *ends})
            harness.measure(name, model)
            if bench.chat and name in with_samples:
                replies[name] = bench.chat.replies(model, config.evaluation.sample_tokens)
        del model  # before the next is loaded: two may not fit
    if bench.chat:
        results["chat"] = {"questions": [item.model_dump() for item in bench.chat.questions], "replies": replies}
    if tasks:
        results["tasks"] = {task.settings.source: task.results() for task in tasks}
    if harness.names:
        results["harness"] = harness.results()
    results["peak_memory_bytes"] = peak_memory_bytes(device)
    return results


def _row(bench: Bench, model: Decoder, visits: Visits | None) -> Row:
    """Losses of one model on every probe."""
    row = _with_perplexity(bench.summarise(bench.score(model, visits=visits), model))
    if model.text_router is not None and bench.probes(model)[TEXT].examples_RT is None:
        probe, lengths = bench.probes(model)[TEXT], bench.corpus.byte_lengths
        row["carried_loss"] = summarise(probe, bench.carried(model), lengths)["mean_loss"]
    return row


def sample_texts(config: Config, corpus: Corpus, model: Decoder) -> list[dict[str, str]]:
    """Greedy and sampled continuations of the prompts."""
    settings = config.evaluation
    sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, config.seed)
    ends = (corpus.end_token,)
    asked = [open_prompt(corpus.tokenizer, prompt, ends) for prompt in settings.prompts]

    def continued(sampling: Sampling) -> list[str]:
        seeds = [sampling.seed] * len(asked)  # what a prompt gets does not depend on the others
        replies = continue_each(model, asked, settings.sample_tokens, sampling, ends, seeds)
        texts: list[str] = corpus.tokenizer.decode_batch(replies)
        return texts

    both = zip(settings.prompts, continued(Sampling(temperature=0)), continued(sampling), strict=True)
    return [{"prompt": prompt, "greedy": greedy, "sampled": sampled} for prompt, greedy, sampled in both]


def oracle_row(config: Config, experts: Mapping[str, Row]) -> Row:
    """The best single expert of every domain, chosen on the text that is measured itself: a bound, not a model.

    It costs what one expert costs to run, and what all of them cost to train; nothing holds its parameters.
    """
    first = next(iter(experts.values()))
    costs = {name: first[name] for name in ("active_parameters", "routing_parameters", "flops_per_token")}
    return {**oracle(experts), "parameters": None, **costs, "training_tokens": training_tokens(config, "oracle")}


def add_oracle(config: Config, results: Results) -> None:
    """Add the oracle of a run behind its experts, where there are some."""
    items = list(results["models"].items())
    experts = {name: row for name, row in items if is_expert(name)}
    if experts:
        place = 1 + max(index for index, (name, _) in enumerate(items) if name in experts)
        bound = "oracle", _with_perplexity(oracle_row(config, experts))
        results["models"] = dict([*items[:place], bound, *items[place:]])


def _with_perplexity(row: Row) -> Row:
    """The row with exp of its losses too."""
    domains = {label: {**item, "perplexity": perplexity(item["loss"])} for label, item in row["domains"].items()}
    return {**row, "perplexity": perplexity(row["mean_loss"]), "domains": domains}


def compare(results: Results) -> Results:
    """The chosen model beside each other one, document by document: `differences` on every probe, with errors.

    Takes the sums over documents out of the models and returns them, by model.
    """
    documents = {name: model.pop("documents") for name, model in results["models"].items()}
    mine = documents.get(results["chosen"] or "")
    others = {name: sums for name, sums in documents.items() if name != results["chosen"] and not is_expert(name)}
    results["differences"] = {name: differences(mine, sums) for name, sums in others.items()} if mine else {}
    return documents


def is_expert(name: str) -> bool:
    """Whether a model is one of the experts alone."""
    return JobName.parse(name).stage == "expert"


def sizes_of(model: Decoder, window: int) -> dict[str, int]:
    """Sizes as the model runs on windows of so many tokens: an anchored expert's own model is a mixture of two.

    What the model itself says of its context is how far it can read, which a run seldom does.
    """
    return _as_row(_with_rows(model, _sizes(model, window)))


def _with_rows(model: Decoder, sizes: Sizes) -> Sizes:
    """With the rows that its experts have for themselves."""
    if model.own_rows is None:
        return sizes
    rows, visited = model.own_rows, moe_layers(model)[0].experts_per_token
    return with_own_rows(sizes, rows.parameters_each, rows.is_tied, rows.matrix, rows.experts, visited)


def _sizes(model: Decoder, window: int) -> Sizes:
    layers, shape = moe_layers(model), _reading(model.config, window)
    if model.adapters:
        return lora_sizes(shape, model.vocab_size, model.adapters)
    experts, active = (len(layers[0].experts), layers[0].experts_per_token) if layers else (1, 1)
    plain = _reading(shape_without_channels(model), window)
    return model_sizes(shape, model.vocab_size, experts, active, plain)


def _reading(shape: ModelConfig, window: int) -> ModelConfig:
    return shape.model_copy(update={"context_length": min(window, shape.positions)})


def _as_row(sizes: Sizes) -> dict[str, int]:
    return {
        "parameters": sizes.parameters,
        "active_parameters": sizes.active_parameters,
        "routing_parameters": sizes.routing_parameters,
        "flops_per_token": sizes.flops_per_token,
    }


def training_tokens(config: Config, name: str, is_calibrated: bool = False) -> int:
    """Tokens that went into a model (`backbone`, `expert-3`, `btx_trained` …), those of its backbone included.

    What is made of the experts, or trained as they all are, got the tokens of all.
    """
    experts = {"backbone": 0, "expert": 1}.get(name.split("-")[0], config.experts.count)
    windows = config.backbone.steps * config.backbone.batch_size
    windows += experts * config.experts.steps * config.experts.batch_size
    if name == "btx_trained":
        windows += config.btx_phase.steps * config.btx_phase.batch_size
    if is_calibrated or name == "calibrated":
        windows += config.calibration.steps * config.calibration.batch_size
    return windows * config.model.context_length
