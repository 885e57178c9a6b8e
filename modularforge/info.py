"""What a configuration amounts to before anything runs: parameters, FLOPs, tokens, and what they cost here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from modularforge.advice import advice
from modularforge.config import MLP_MODULES, Config, ModelConfig, PhaseConfig
from modularforge.cost import describe_cost, this_machine, with_rows
from modularforge.memory import memory_table
from modularforge.model.hub_config import moe_config
from modularforge.model.serving import DEGREES, SERVERS, degrees, describe_serving
from modularforge.model.sizes import (
    AdapterCounts,
    Sizes,
    adapter_parameters,
    lora_sizes,
    model_sizes,
    shared_parameters,
)
from modularforge.routing.evidence import Widening
from modularforge.routing.solvers import widening_of


def describe(config: Config, gpus: Sequence[int] = ()) -> str:
    """Exact counts as lines of text. The vocabulary is the wished one; a small corpus may fill less.

    Memory on so many GPUs is an estimate (`memory.py`).
    """
    model, vocab_size = config.model, config.data.vocab_size
    shape = (
        f"model:      width {model.width}, {model.layers} layers, {model.heads} heads, FFN {model.ffn_width}, "
        f"context {model.context_length}, vocabulary {vocab_size}"
    )
    sizes = _of_speech(config) if config.task == "speech" else _of_text(config)
    return "\n".join([shape, *sizes, *_cost(config), *memory_table(config, gpus)])


def _cost(config: Config) -> Iterator[str]:
    found = describe_cost(config, this_machine(config)).splitlines()
    names = ("time:", "", "space:") if len(found) > 2 else ("time:", "space:")
    yield from (f"{name:<11} {line}" for name, line in zip(names, found, strict=False))
    yield from (f"advice:     {sentence}" for sentence in advice(config))


def _of_text(config: Config) -> Iterator[str]:
    yield f"backbone:   {_sizes(model_sizes(config.model, config.data.vocab_size))}"
    yield from _adapters(config)
    yield f"assembled:  {_assembled(config)}"
    yield from _servers(config)
    yield from _shared(config)
    yield (
        f"training:   backbone {_tokens(config, config.backbone)}; each of {config.experts.count} experts "
        f"{_tokens(config, config.experts)}"
    )


def _of_speech(config: Config) -> Iterator[str]:
    """Of the encoder, and so of vectors in it, nothing is known before it is read."""
    if config.model.pretrained is None:
        yield f"language:   {model_sizes(config.model, config.data.vocab_size).parameters:,} parameters, frozen"
    else:  # its vocabulary is not that of the settings
        yield f"language:   {config.model.pretrained}, frozen"
    yield f"encoder:    {config.speech.model.encoder or 'a random one'}, frozen"
    yield (
        f"training:   projector {_utterances(config.backbone)}; each of {config.experts.count} experts "
        f"{_utterances(config.experts)}"
    )


def _adapters(config: Config) -> Iterator[str]:
    lora = config.experts.lora
    if config.experts.kind == "lora":
        own = adapter_parameters(config.model, lora.modules, lora.rank)
        yield f"adapters:   {own:,} parameters each, of rank {lora.rank} beside {', '.join(lora.modules)}"


def _shared(config: Config) -> Iterator[str]:
    """What experts train of the backbone, and what each merge between their rounds moves."""
    experts = config.experts
    if experts.unfreeze:
        own = shared_parameters(config.model, config.data.vocab_size, experts.unfreeze)
        merges = experts.rounds - 1
        moved = f"; each of {merges} merges reads {4 * own * experts.count:,} bytes and writes {4 * own:,}"
        kept = [part for part in experts.unfreeze if part in ("embeddings", "head")]
        fate = "the model has the mean of"
        if config.assembly.shared == "own":
            rest = f", but for the rest, which {fate}" if len(kept) < len(experts.unfreeze) else ""
            fate = f"keeps for itself{rest}"
        yield (
            f"shared:     {own:,} parameters ({', '.join(experts.unfreeze)}) that each expert trains too and {fate}, "
            f"in {experts.rounds} round(s){moved if merges else ''}"
        )


def _assembled(config: Config) -> str:
    model, vocab_size = config.model, config.data.vocab_size
    if config.experts.kind == "lora" and config.assembly.lora != "fold":
        return _sizes(with_rows(config, _with_adapters(config), config.assembly.experts_per_token))
    active = config.assembled_experts if config.assembly.router == "uniform" else config.assembly.experts_per_token
    shape = widening_of(config, model, config.experts.count).widened if config.assembly.router == "evidence" else model
    assembled = model_sizes(shape, vocab_size, config.assembled_experts, active, model)
    public = ", the public one included" if config.has_public_expert else ""
    assembled = with_rows(config, assembled, active)
    return f"{_sizes(assembled)}; {config.assembled_experts} experts{public}, {active} per token"


def _servers(config: Config) -> Iterator[str]:
    """Which servers take the mixture, and by which settings more would."""
    if config.experts.kind == "lora" and config.assembly.lora != "fold":
        return
    found = describe_serving(_mixture(config, config.assembly.width_multiple, config.assembly.head_multiple))
    yield f"servers:    {found}{_served(config)}"


def _served(config: Config) -> str:
    """The multiples by which servers take all usual degrees, and their cost; empty where none is needed or helps."""
    settings, every = config.assembly, [*DEGREES]
    own = _mixture(config, settings.width_multiple, settings.head_multiple)
    heads = max(DEGREES)
    shape = _mixture(config, settings.width_multiple, heads)
    width = shape["num_attention_heads"] * shape["head_dim"]
    if settings.router != "evidence" or all(degrees(own, server) == every for server in SERVERS):
        return ""
    if any(degrees(_mixture(config, width, heads), server) != every for server in SERVERS):
        return ""  # the FFN's width or the number of experts is in the way, which the sentence before says
    before = _active(config, settings.width_multiple, settings.head_multiple)
    costs = [_active(config, multiple, heads) / before - 1 for multiple in (settings.width_multiple, width)]
    return (
        f"; for all of {', '.join(map(str, DEGREES))}: assembly.head_multiple: {heads} in vLLM ({costs[0]:.0%} more "
        f"active parameters), with assembly.width_multiple: {width} in SGLang too ({costs[1]:.0%})"
    )


def _mixture(config: Config, width_multiple: int, head_multiple: int) -> dict[str, Any]:
    """config.json of the assembled model."""
    experts, shape = config.assembled_experts, _shape(config, width_multiple, head_multiple)
    return moe_config(shape, config.data.vocab_size, experts, min(config.assembly.experts_per_token, experts))


def _active(config: Config, width_multiple: int, head_multiple: int) -> int:
    shape, vocab_size = _shape(config, width_multiple, head_multiple), config.data.vocab_size
    visited = config.assembly.experts_per_token
    return model_sizes(shape, vocab_size, config.assembled_experts, visited, config.model).active_parameters


def _shape(config: Config, width_multiple: int, head_multiple: int) -> ModelConfig:
    if config.assembly.router != "evidence":
        return config.model
    return Widening(config.model, config.experts.count, width_multiple, head_multiple).widened


def _with_adapters(config: Config) -> Sizes:
    """Sizes of the backbone with all adapters beside it, or with their mean."""
    lora, count, assembly = config.experts.lora, config.experts.count, config.assembly
    own = adapter_parameters(config.model, lora.modules, lora.rank)
    counts = AdapterCounts((own * count,), 1, 1)
    if assembly.lora == "adapters":
        active = config.assembled_experts if assembly.router == "uniform" else assembly.experts_per_token
        has_mlp = any(name in MLP_MODULES for name in lora.modules)
        counts = AdapterCounts((own,) * count, min(active, count), active if has_mlp else 1)
    return lora_sizes(config.model, config.data.vocab_size, counts)


def _sizes(sizes: Sizes) -> str:
    routing = f" (of which {sizes.routing_parameters:,} only route)" if sizes.routing_parameters else ""
    return (
        f"{sizes.parameters:,} parameters, {sizes.active_parameters:,} active per token{routing}, "
        f"{sizes.flops_per_token:,} FLOPs per token forward, {sizes.training_flops_per_token:,} to train"
    )


def _tokens(config: Config, phase: PhaseConfig) -> str:
    tokens = phase.steps * phase.batch_size * config.model.context_length
    return f"{phase.steps:,} steps of {phase.batch_size} x {config.model.context_length} = {tokens:,} tokens"


def _utterances(phase: PhaseConfig) -> str:
    return f"{phase.steps:,} steps of {phase.batch_size} utterances"
