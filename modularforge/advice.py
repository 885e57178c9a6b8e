"""What is known of settings that work (docs/method.md), as sentences for a run that breaks it; none is an error.

Each says which setting, why, and what to write instead. Numbers of tokens count windows as full.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from modularforge.config import Config
from modularforge.model.sizes import model_sizes

USUAL_TOKENS = 20  # for each parameter (Chinchilla, arXiv 2203.15556)
FEW_TOKENS = 12  # of these it is worth a word: the quickstart has 16, which docs/method.md shows to be enough
MOST_OF_EXPERTS = 0.5  # tokens of all experts beside the backbone's: 0.25 in docs/method.md
MANY_CALIBRATIONS = 300


def advice(config: Config) -> list[str]:
    """One sentence for each piece of what is known that these settings break."""
    if config.task == "speech":
        return []
    return [*_of_lengths(config), *_of_experts(config), *_of_comparison(config)]


def backbone_tokens(config: Config) -> int:
    """Tokens that the backbone trains on."""
    return config.backbone.steps * config.backbone.batch_size * config.model.context_length


def wanted_steps(config: Config) -> int:
    """Steps of the backbone that give each of its parameters `USUAL_TOKENS`."""
    parameters = model_sizes(config.model, config.data.vocab_size).parameters
    return math.ceil(USUAL_TOKENS * parameters / (config.backbone.batch_size * config.model.context_length))


def _of_lengths(config: Config) -> Iterator[str]:
    if config.model.pretrained is not None:
        return
    parameters, tokens = model_sizes(config.model, config.data.vocab_size).parameters, backbone_tokens(config)
    if tokens < FEW_TOKENS * parameters:
        yield (
            f"backbone.steps gives each of the backbone's {parameters:,} parameters {tokens / parameters:.1f} tokens, "
            f"where {USUAL_TOKENS} are usual; raise it to {wanted_steps(config):,}, or make the model smaller"
        )
    experts = config.experts
    own = experts.steps * experts.batch_size * config.model.context_length
    if experts.count * own > MOST_OF_EXPERTS * tokens:
        steps = int(0.25 * tokens / max(1, experts.count * experts.batch_size * config.model.context_length))
        yield (
            f"experts.steps gives all experts together {experts.count * own:,} tokens beside the backbone's "
            f"{tokens:,}; short trainings behind a long one are best (docs/method.md: a quarter of its tokens): lower "
            f"it to {max(1, steps):,}, or raise backbone.steps"
        )


def _of_experts(config: Config) -> Iterator[str]:
    if config.experts.count == 1:
        yield "experts.count is 1, so that there is nothing to choose among; take two parts or more"
    elif config.partition.method == "random":
        yield (
            "partition.method random is the baseline: random parts teach experts nothing different; take domain or "
            "clustered"
        )
    if config.experts.anchored and config.experts.kind == "ffn":
        yield "experts.anchored true was worse than plain experts in our runs (docs/method.md); leave it out"
    if config.assembly.router == "evidence" and 0 in (config.experts.counted_pairs, config.assembly.token_pairs):
        yield (
            "experts.counted_pairs and assembly.token_pairs let the router know pairs of tokens, which are worth seven "
            "points of what is kept of the experts' gain (docs/method.md), but one of them is 0; leave it out"
        )
    if config.assembly.public_expert is False and config.assembly.router == "evidence":
        yield (
            "assembly.public_expert false leaves text of no domain to the experts, 0.15 nats worse than with it "
            "(docs/method.md); leave it out unless all text is of these domains"
        )
    if config.calibration.steps > MANY_CALIBRATIONS:
        yield (
            f"calibration.steps is {config.calibration.steps:,}; long calibrations were better on validation and not "
            "on test (docs/method.md): take 100"
        )


def _of_comparison(config: Config) -> Iterator[str]:
    if not {"dense", "dense_wide", "joint_lora", "joint_lora_wide"} & {*config.evaluation.baselines}:
        yield (
            "evaluation.baselines has no model without experts on the same tokens, so that nothing will say whether "
            "it was worth it; add dense"
        )
