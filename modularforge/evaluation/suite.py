"""Measure several models on the same text, one in memory at a time: losses, routing, samples and facts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from modularforge.artifacts import Corpus
from modularforge.config import Config
from modularforge.evaluation.generation import Sampling, generate
from modularforge.evaluation.losses import Measurement, measure, routing_summary
from modularforge.log import logger
from modularforge.model.backbone import Decoder, perplexity
from modularforge.model.channels import shape_without_channels
from modularforge.model.moe import moe_layers
from modularforge.model.sizes import model_sizes
from modularforge.training.distributed import default_device
from modularforge.training.meter import peak_memory_bytes

Loader = Callable[[], Decoder]
Results = dict[str, Any]


def measure_models(
    config: Config,
    corpus: Corpus,
    loaders: Mapping[str, Loader],
    training_tokens: Mapping[str, int | None],
    with_samples: Collection[str],
) -> Results:
    """Results by model name, in the order of `loaders`; texts are sampled from the models in `with_samples`.

    Schema of the result: docs/artifacts.md. Losses are means over test tokens, domains weigh alike.
    """
    device, limit = default_device(), config.evaluation.tokens_per_domain
    domains = corpus.domains("test", limit)
    results: Results = {"name": config.name, "domains": list(domains), "models": {}, "routing": {}, "samples": {}}
    for name, load in loaders.items():
        model = load().to(device)
        context, batch_size = config.model.context_length, config.evaluation.batch_size
        found = measure(model, domains, corpus.byte_lengths, batch_size, limit, device, context)
        results["models"][name] = {
            **_losses(found),
            **sizes_of(model),
            "training_tokens": training_tokens.get(name),
        }
        logger.info("%s: mean test loss %.4f", name, found.mean_loss)
        if found.routing and name in with_samples:
            results["routing"][name] = routing_summary(found.routing)
        if name in with_samples:
            results["samples"][name] = sample_texts(config, corpus, model)
    results["peak_memory_bytes"] = peak_memory_bytes(device)
    return results


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
    domains = {
        label: min((model["domains"][label] for model in experts.values()), key=lambda item: float(item["loss"]))
        for label in results["domains"]
    }
    mean = sum(item["loss"] for item in domains.values()) / len(domains)
    oracle = {
        "mean_loss": mean,
        "perplexity": perplexity(mean),
        "bits_per_byte": sum(item["bits_per_byte"] for item in domains.values()) / len(domains),
        "domains": domains,
        "parameters": None,
        "active_parameters": next(iter(experts.values()))["active_parameters"],
        "flops_per_token": next(iter(experts.values()))["flops_per_token"],
        "training_tokens": None,
    }
    items = list(results["models"].items())
    place = 1 + max(index for index, (name, _) in enumerate(items) if name in experts)
    results["models"] = dict([*items[:place], ("oracle", oracle), *items[place:]])


def _losses(found: Measurement) -> Results:
    domains = {
        label: {
            "loss": item.loss,
            "perplexity": item.perplexity,
            "bits_per_byte": item.bits_per_byte,
            "tokens": item.tokens,
            "bytes": item.bytes,
        }
        for label, item in found.domains.items()
    }
    return {
        "mean_loss": found.mean_loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.mean_bits_per_byte,
        "domains": domains,
    }


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
