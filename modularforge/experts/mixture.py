"""How feed-forward blocks become one mixture of experts: which bytes become which tensors, which routers are solved.

Works on committed artifacts of any store and needs no torch. Kinds whose experts are feed-forward blocks, or can be
made such, share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from checkpoints import Artifact
from checkpoints.hashing import describe_file
from checkpoints.safetensors import WEIGHTS_NAME, TensorSpan, read_spans
from modularforge.assembly import parts
from modularforge.assembly.plan import LowRank, OutputTensor, output_tensors, spans_of
from modularforge.assembly.shared import SHARED_NAME, is_row, shared_tensors, write_means, write_own_rows
from modularforge.config import Config, ModelConfig
from modularforge.errors import ConfigError, MismatchError
from modularforge.log import logger
from modularforge.model import names
from modularforge.model.hub_config import CONFIG_NAME, OWN_ROWS_NAME, TABLES_NAME, model_config_of, moe_config
from modularforge.model.sizes import model_sizes, with_own_rows
from modularforge.routing import evidence
from modularforge.routing.solvers import all_statistics, router_rows, widening_of
from modularforge.routing.text_counts import token_occurrences
from modularforge.routing.text_evidence import Texts, texts_of, write_tables

SAFETENSORS_NAME = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "same": None}
HUB_NAME = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


OWN_ROWS = (
    f" Each expert has embeddings and a head of its own (`{OWN_ROWS_NAME}`), which ModularForge reads; other programs "
    "use the backbone's, with which experts are worse."
)


def check_active(config: Config, experts: int) -> None:
    """Raise ConfigError when each token is to visit more experts than there are."""
    count, active = experts + int(config.has_public_expert), config.assembly.experts_per_token
    if active > count and config.assembly.router != "uniform":
        raise ConfigError(f"assembly.experts_per_token must be at most {count}, but is {active}; lower it")


def part_of(name: str) -> str:
    """A file for the backbone, one for each expert, one for the routers."""
    position = names.expert_position(name)
    if position:
        return f"expert-{position[1]:03d}.safetensors"
    return "router.safetensors" if names.is_gate(name) else "backbone.safetensors"


@dataclass(frozen=True)
class Mixture:
    """A backbone and experts that become one model as the settings say.

    `spans` are each expert's feed-forward matrices, whatever slot their names are of; `added` are matrices of low rank
    that are added to an expert's, by its place among the experts, layer and part.
    """

    config: Config
    backbone: Artifact
    experts: list[Artifact]
    spans: list[dict[str, TensorSpan]]
    added: Mapping[tuple[int, int, str], LowRank] = field(default_factory=dict)

    def merged(self, scratch: Path, sources: Mapping[str, parts.Source]) -> parts.Merged:
        """All that the assembler needs; `sources` are committed files that are parts already."""
        check_active(self.config, len(self.experts))
        tensors = self._tensors(scratch)
        dtype = HUB_NAME.get(next(iter(tensors.values())).dtype, self.values.get("dtype"))
        written = moe_config(self.shape, self.vocab_size, self.count, self.active, {**self.values, "dtype": dtype})
        facts = self._facts(written)
        return parts.Merged(tensors, part_of, sources, written, facts, _summary(facts, len(self.experts)), self._write)

    @cached_property
    def values(self) -> dict[str, Any]:
        """The backbone's config.json."""
        values: dict[str, Any] = self.backbone.read_json(CONFIG_NAME)
        return values

    @cached_property
    def dense(self) -> ModelConfig:
        """The backbone's shape."""
        return model_config_of(self.values)

    @cached_property
    def texts(self) -> Texts | None:
        """What the evidence router is solved from; None for the other routers."""
        if self.config.assembly.router != "evidence":
            return None
        return texts_of(self.backbone, self.experts, self.config.learns_responses)

    @property
    def shape(self) -> ModelConfig:
        """The mixture's shape, which the evidence router widens."""
        return widening_of(self.config, self.dense, len(self.experts)).widened if self.texts else self.dense

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary."""
        return int(self.values["vocab_size"])

    @property
    def count(self) -> int:
        """Experts per layer."""
        return len(self.experts) + int(self.config.has_public_expert)

    @property
    def active(self) -> int:
        """Experts per token; equal rows mean something only when every expert is visited."""
        settings = self.config.assembly
        return self.count if settings.router == "uniform" else settings.experts_per_token

    def _tensors(self, scratch: Path) -> dict[str, OutputTensor]:
        """All tensors of the assembled model; new values are written to files in `scratch`."""
        public_slot = 0 if self.config.has_public_expert else None
        backbone = spans_of(self.backbone, WEIGHTS_NAME)
        weighting = self.config.assembly.shared
        shared = write_means(scratch / SHARED_NAME, backbone, self.experts, weighting, token_occurrences)
        slots = {index + (public_slot == 0): own for index, own in enumerate(self.spans)}
        spans = merged_spans({**backbone, **shared}, slots, self.dense.layers, public_slot, self.dense.family)
        kept = output_tensors(spans, SAFETENSORS_NAME[self.config.assembly.dtype])
        for (index, layer, part), matrix in self.added.items():
            name = names.expert_ffn(layer, index + (public_slot == 0), part, self.dense.family)
            kept[name] = replace(kept[name], added=matrix)
        statistics = all_statistics(self.experts, products=False) if self.texts else None
        if self.texts and statistics is not None:
            widening = widening_of(self.config, self.dense, len(self.experts))
            kept = evidence.widen(kept, widening, statistics, self.texts.token_VE, scratch)
        router_file = scratch / "router.safetensors"
        save_file(router_rows(self.config, self.experts, self.dense, self.texts, statistics), router_file)
        routers = read_spans(str(router_file), describe_file(router_file).tensors)
        return {**kept, **output_tensors(routers, next(iter(kept.values())).dtype)}

    def _facts(self, written: Mapping[str, Any]) -> dict[str, Any]:
        sizes = model_sizes(self.shape, self.vocab_size, self.count, self.active, self.dense)
        rows = rows_each(self.config, self.backbone, self.experts)
        if rows:
            matrix = self.vocab_size * self.dense.width
            sizes = with_own_rows(sizes, rows, self.dense.tied_head, matrix, len(self.experts), self.active)
        trained = shared_means(self.config, self.experts)
        return {
            "architecture": written["architectures"][0],
            "experts": self.count,
            "experts_per_token": self.active,
            "public_expert": self.config.has_public_expert,
            "router": self.config.assembly.recorded_router,
            "parameters": sizes.parameters,
            "active_parameters": sizes.active_parameters,
            "routing_parameters": sizes.routing_parameters,
            **({"shared_means": trained} if trained else {}),
            **({"own_rows": rows} if rows else {}),
        }

    def _write(self, folder: Path) -> dict[str, Any]:
        """Write what only ModularForge reads: tables, and rows of the experts' own; says how many pairs are known."""
        if self.config.assembly.shared == "own":
            write_own_rows(folder / OWN_ROWS_NAME, self.backbone, self.experts)
        return self._write_tables(folder)

    def _write_tables(self, folder: Path) -> dict[str, Any]:
        """Write what ModularForge routes by, where pairs are known and wanted; says how many are known."""
        most = self.config.assembly.token_pairs
        if self.texts is None or not most:
            return {} if self.texts is None else {"token_pairs": 0}
        if not self.texts.has_pairs:
            logger.info("the experts' jobs counted no pairs of tokens, so routing is by tokens alone")
            return {"token_pairs": 0}
        return {"token_pairs": write_tables(folder / TABLES_NAME, self.texts, self.config.has_public_expert, most)}


def shared_means(config: Config, experts: Sequence[Artifact]) -> list[str]:
    """The parts of the backbone that are, in a model, the mean of what these experts made of them."""
    trained = {name for expert in experts for name in shared_tensors(expert)}
    has_own = config.assembly.shared == "own"
    return sorted({names.shared_part(name) for name in trained if not (has_own and is_row(name))})


def rows_each(config: Config, backbone: Artifact, experts: Sequence[Artifact]) -> int:
    """How many values of embeddings and head each expert has for itself in a model; none where they are shared."""
    if config.assembly.shared != "own":
        return 0
    spans = spans_of(backbone, WEIGHTS_NAME)
    own = {name for expert in experts for name in shared_tensors(expert) if is_row(name)}
    return sum(prod(spans[name].shape) for name in own)


def merged_spans(
    backbone: Mapping[str, TensorSpan],
    experts: Mapping[int, Mapping[str, TensorSpan]],
    layers: int,
    public_slot: int | None,
    family: names.Family = "llama",
) -> dict[str, TensorSpan]:
    """Tensors of the assembled model by name, all but the routers.

    `experts` maps a slot of the assembled model to that expert's spans, whatever slot its file names. The backbone's
    own feed-forward blocks become the expert in `public_slot`, or are left out. Raises MismatchError when a layer or
    part is missing, or a shape or type differs from the backbone's.
    """
    merged = {name: span for name, span in backbone.items() if names.is_shared(name)}
    if public_slot is not None:
        merged.update(
            {names.dense_to_expert(n, public_slot, family): s for n, s in backbone.items() if names.is_dense_ffn(n)}
        )
    for slot, spans in experts.items():
        by_place = {(p[0], p[2]): span for name, span in spans.items() if (p := names.expert_position(name))}
        for layer in range(layers):
            for part in names.PARTS:
                span = by_place.get((layer, part))
                _check_fits(
                    span, backbone[names.dense_ffn(layer, part)], f"expert in slot {slot}, layer {layer}, {part}"
                )
                assert span is not None
                merged[names.expert_ffn(layer, slot, part, family)] = span
    return merged


def _check_fits(span: TensorSpan | None, like: TensorSpan, what: str) -> None:
    if span is None:
        raise MismatchError(f"{what} must be in its weight file, but is missing; train that expert again")
    if (span.shape, span.dtype) != (like.shape, like.dtype):
        raise MismatchError(
            f"{what} must be {like.dtype} {like.shape} as in the backbone, but is {span.dtype} {span.shape} in "
            f"{span.url}; "
            "use experts of this backbone"
        )


def _summary(facts: Mapping[str, Any], experts: int) -> str:
    """What the model is, for its card."""
    public = "the backbone's own feed-forward block and " if facts["public_expert"] else ""
    only = facts.get("routing_parameters")
    routing = f" (of which {only:,} only choose experts)" if only else ""
    means = facts.get("shared_means")
    shared = f" Its {', '.join(means)} are the mean of what each expert made of them." if means else ""
    shared += OWN_ROWS if facts.get("own_rows") else ""
    return (
        f"A mixture-of-experts language model of {facts['parameters']:,} parameters, {facts['active_parameters']:,} of "
        f"them active per token{routing}: {public}{experts} experts per layer, of which each token visits "
        f"{facts['experts_per_token']}.{shared}"
    )
