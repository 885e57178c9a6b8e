"""Measure several models on the same text, one in memory at a time: losses, routing, samples and facts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from modularforge.artifacts import Corpus
from modularforge.config import Config
from modularforge.data.token_files import Tokens
from modularforge.errors import DataError
from modularforge.evaluation.chat import Chat, Question, prepare_chat, read_questions
from modularforge.evaluation.general import Texts, read_texts, texts_identity, token_streams
from modularforge.evaluation.generation import Sampling, generate
from modularforge.evaluation.losses import RoutingCount, routing_summary
from modularforge.evaluation.paired import differences
from modularforge.evaluation.probes import CHAT, GENERAL, SPREAD, TEXT, Probe, domain_probes, text_probe
from modularforge.evaluation.scoring import full_row, oracle, score, summarise
from modularforge.log import logger
from modularforge.model.backbone import Decoder, perplexity
from modularforge.model.moe import moe_layers, shape_without_channels
from modularforge.model.sizes import model_sizes
from modularforge.training.distributed import default_device
from modularforge.training.meter import peak_memory_bytes

Loader = Callable[[], Decoder]
Results = dict[str, Any]
# Of the tokens of a domain as many are predicted behind a switch, and as many in mixed documents: the former read as
# many before it, so that 3/8 more tokens are read.
PROBE_SHARE = 8


def measure_models(
    config: Config,
    corpus: Corpus,
    loaders: Mapping[str, Loader],
    training_tokens: Mapping[str, int | None],
    with_samples: Collection[str],
    extras: Extras | None = None,
) -> Results:
    """Results by model name, in the order of `loaders`; texts are sampled from the models in `with_samples`.

    Schema of the result: docs/observing.md. Losses are means over test tokens, domains weigh alike.
    """
    device, limit = default_device(), config.evaluation.tokens_per_domain
    bench = _Bench(config, corpus, corpus.domains("test", limit * SPREAD), extras or Extras())
    results: Results = {"name": config.name, "domains": list(bench.domains), "models": {}, "routing": {}, "samples": {}}
    replies: dict[str, list[str]] = {}
    for name, load in loaders.items():
        model = load().to(device)
        routing: dict[str, RoutingCount] = {}
        found = bench.measure(model, routing if name in with_samples else None)
        results["models"][name] = {**found, **sizes_of(model), "training_tokens": training_tokens.get(name)}
        logger.info("%s: mean test loss %.4f", name, found["mean_loss"])
        if routing:
            results["routing"][name] = routing_summary(routing)
        if name in with_samples:
            results["samples"][name] = sample_texts(config, corpus, model)
        if bench.chat and name in with_samples:
            replies[name] = bench.chat.replies(model, config.evaluation.sample_tokens)
    if bench.chat:
        results["chat"] = {"questions": [item.model_dump() for item in bench.chat.questions], "replies": replies}
    results["peak_memory_bytes"] = peak_memory_bytes(device)
    return results


@dataclass(frozen=True)
class Extras:
    """What is measured besides the domains: text of no domain, by name, and prompts with known answers."""

    texts: Texts = field(default_factory=dict)
    questions: Sequence[Question] = ()

    @property
    def identities(self) -> dict[str, str]:
        """What they are, for the fingerprint of an evaluation; nothing where there are none."""
        found = {"general": texts_identity(self.texts)} if self.texts else {}
        asked = {"chat": [text for question in self.questions for text in (question.prompt, question.answer)]}
        return found | ({"chat": texts_identity(asked)} if self.questions else {})


def read_extras(config: Config) -> Extras:
    """What the settings name; raises DataError where it cannot be read."""
    chat = config.evaluation.chat
    return Extras(read_texts(config.evaluation.general or []), read_questions(chat) if chat else ())


@dataclass(frozen=True)
class _Bench:
    """The text of one evaluation, cut into windows once for each window length."""

    config: Config
    corpus: Corpus
    domains: dict[str, Tokens]
    extras: Extras
    cut: dict[int, dict[str, Probe]] = field(default_factory=dict)

    @cached_property
    def chat(self) -> Chat | None:
        """The questions as tokens."""
        return prepare_chat(self.extras.questions, self.corpus) if self.extras.questions else None

    def measure(self, model: Decoder, routing: dict[str, RoutingCount] | None) -> Results:
        """Losses of one model on every probe; `routing` gets its visits by domain."""
        probes = self._probes(min(self.config.model.context_length, model.config.positions))
        batch_size = self.config.evaluation.batch_size
        scores = {
            name: score(model, probe, batch_size, routing if name == TEXT else None) for name, probe in probes.items()
        }
        row = with_perplexity(full_row(probes, scores, self.corpus.byte_lengths))
        if model.text_router is not None:
            carried_RT = score(model, probes[TEXT], batch_size, carries=True)
            row["carried_loss"] = summarise(probes[TEXT], carried_RT, self.corpus.byte_lengths)["mean_loss"]
        return row

    def _probes(self, context_length: int) -> dict[str, Probe]:
        if context_length not in self.cut:
            limit, end = self.config.evaluation.tokens_per_domain, self.corpus.end_token
            found = domain_probes(self.domains, context_length, end, limit, limit // PROBE_SHARE)
            if self.extras.texts:
                general = token_streams(self.extras.texts, self.corpus, limit)
                found[GENERAL] = text_probe(GENERAL, general, context_length, end, limit)
            if self.chat:
                found[CHAT] = self._chat_probe(self.chat, context_length)
            self.cut[context_length] = found
        return self.cut[context_length]

    def _chat_probe(self, chat: Chat, positions: int) -> Probe:
        probe = chat.probe()
        if (tokens := probe.inputs_RT.shape[1]) > positions:
            raise DataError(
                f"prompts with their answers in evaluation.chat must have at most {positions} tokens, but one has "
                f"{tokens}; shorten it"
            )
        return probe


def sample_texts(config: Config, corpus: Corpus, model: Decoder) -> list[dict[str, str]]:
    """Greedy and sampled continuations of the prompts."""
    settings = config.evaluation
    sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, config.seed)
    greedy, ends = Sampling(temperature=0), (corpus.end_token,)
    return [
        {
            "prompt": prompt,
            "greedy": generate(model, corpus.tokenizer, prompt, settings.sample_tokens, greedy, ends),
            "sampled": generate(model, corpus.tokenizer, prompt, settings.sample_tokens, sampling, ends),
        }
        for prompt in settings.prompts
    ]


def add_oracle(results: Results) -> None:
    """Add the best single expert of every domain, chosen on the test split itself: a bound, not a model."""
    experts = {name: model for name, model in results["models"].items() if name.startswith("expert-")}
    if not experts:
        return
    bound = {
        **with_perplexity(oracle(experts)),
        "parameters": None,
        "active_parameters": next(iter(experts.values()))["active_parameters"],
        "flops_per_token": next(iter(experts.values()))["flops_per_token"],
        "training_tokens": None,
    }
    items = list(results["models"].items())
    place = 1 + max(index for index, (name, _) in enumerate(items) if name in experts)
    results["models"] = dict([*items[:place], ("oracle", bound), *items[place:]])


def with_perplexity(row: Results) -> Results:
    """The row with exp of its losses too."""
    domains = {label: {**item, "perplexity": perplexity(item["loss"])} for label, item in row["domains"].items()}
    return {**row, "perplexity": perplexity(row["mean_loss"]), "domains": domains}


def compare(results: Results) -> Results:
    """The chosen model beside each other one, document by document: `differences` on every probe, with errors.

    Takes the sums over documents out of the models and returns them, by model.
    """
    documents = {name: model.pop("documents") for name, model in results["models"].items()}
    mine = documents.get(results["chosen"] or "")
    others = {name: sums for name, sums in documents.items() if name != results["chosen"] and not _is_expert(name)}
    results["differences"] = {name: differences(mine, sums) for name, sums in others.items()} if mine else {}
    return documents


def _is_expert(name: str) -> bool:
    return name.startswith("expert-")


def sizes_of(model: Decoder) -> Results:
    """Sizes as the model runs: an anchored expert's own model is a mixture of two."""
    layers = moe_layers(model)
    experts, active = (len(layers[0].experts), layers[0].experts_per_token) if layers else (1, 1)
    sizes = model_sizes(model.config, model.vocab_size, experts, active, shape_without_channels(model))
    return {
        "parameters": sizes.parameters,
        "active_parameters": sizes.active_parameters,
        "routing_parameters": sizes.routing_parameters,
        "flops_per_token": sizes.flops_per_token,
    }
