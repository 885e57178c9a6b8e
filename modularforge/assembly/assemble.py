"""Put the parts of a model together: check that they belong together, solve the router, plan, move bytes, describe.

Works on committed artifacts of any store and needs no torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from checkpoints import Artifact, ArtifactWriter
from checkpoints.hashing import describe_file
from checkpoints.safetensors import INDEX_NAME, WEIGHTS_NAME, TensorSpan, read_spans
from modularforge.assembly import evidence, parts
from modularforge.assembly.card import CARD_NAME, model_card
from modularforge.assembly.checks import check_parts
from modularforge.assembly.plan import MergePlan, OutputTensor, merged_spans, output_tensors, plan_merge, plan_parts
from modularforge.assembly.routers import all_statistics, router_rows, widening_of
from modularforge.assembly.small_files import copy_text_files
from modularforge.assembly.statistics import EXPERT_NAME
from modularforge.assembly.stream import execute
from modularforge.assembly.text_tables import Texts, texts_of, write_tables
from modularforge.config import Config, ModelConfig
from modularforge.facts import fact
from modularforge.log import logger
from modularforge.model.hub_config import CONFIG_NAME, TABLES_NAME, model_config_of, moe_config, write_json
from modularforge.model.sizes import model_sizes

SAFETENSORS_NAME = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "same": None}
HUB_NAME = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def assemble(
    config: Config, backbone: Artifact, experts: list[Artifact], writer: ArtifactWriter, old: Artifact | None = None
) -> dict[str, Any]:
    """Write the model's files; returns facts for the manifest.

    `old` is an assembled model whose parts are taken over where they are the same. Raises MismatchError when an expert
    does not belong, and CorruptArtifactError for a damaged file.
    """
    check_parts(config, backbone, experts)
    values = backbone.read_json(CONFIG_NAME)
    model = model_config_of(values)
    spans = [_spans(expert, EXPERT_NAME) for expert in experts]
    texts = texts_of(backbone, experts) if config.assembly.router == "evidence" else None
    with tempfile.TemporaryDirectory() as scratch:
        tensors = _tensors(config, backbone, experts, spans, model, texts, Path(scratch))
        sources = parts.parts_of(old) if old else {}
        for expert, own in zip(experts, spans, strict=True):
            sources |= parts.whole_file(expert, EXPERT_NAME, own)
        plan, facts = _write_weights(config, sources, tensors, writer)
    if plan.index:
        write_json(writer.folder / INDEX_NAME, plan.index)
    kind = next(tensor.dtype for tensor in tensors.values())
    if texts:
        model = widening_of(config, model, len(experts)).widened
        facts["token_pairs"] = _write_tables(config, texts, writer.folder)
    carried = {**values, "dtype": HUB_NAME.get(kind, values.get("dtype"))}
    return {**facts, **_write_small_files(config, backbone, experts, model, carried, writer.folder)}


def _tensors(
    config: Config,
    backbone: Artifact,
    experts: list[Artifact],
    expert_spans: list[dict[str, TensorSpan]],
    model: ModelConfig,
    texts: Texts | None,
    scratch: Path,
) -> dict[str, OutputTensor]:
    """All tensors of the assembled model; new values are written to files in `scratch`."""
    public_slot = 0 if config.has_public_expert else None
    spans = merged_spans(
        _spans(backbone, WEIGHTS_NAME),
        {index + (public_slot == 0): own for index, own in enumerate(expert_spans)},
        model.layers,
        public_slot,
        model.family,
    )
    kept = output_tensors(spans, SAFETENSORS_NAME[config.assembly.dtype])
    if texts:
        widening = widening_of(config, model, len(experts))
        kept = evidence.widen(kept, widening, all_statistics(experts), texts.token_VE, scratch)
    router_file = scratch / "router.safetensors"
    save_file(router_rows(config, experts, model, texts), router_file)
    routers = read_spans(str(router_file), describe_file(router_file).tensors)
    kind = next(iter(kept.values())).dtype
    return {**kept, **output_tensors(routers, kind)}


def _write_tables(config: Config, texts: Texts, folder: Path) -> int:
    """Write what ModularForge routes by, where pairs are known and wanted; returns how many are known."""
    most = config.assembly.token_pairs
    if not most:
        return 0
    if not texts.has_pairs:
        logger.info("the experts' jobs counted no pairs of tokens, so routing is by tokens alone")
        return 0
    return write_tables(folder / TABLES_NAME, texts, config.has_public_expert, most)


def _spans(artifact: Artifact, name: str) -> dict[str, TensorSpan]:
    return read_spans(artifact.file_url(name), artifact.entry(name).tensors)


def _write_weights(
    config: Config, sources: dict[str, parts.Source], tensors: dict[str, OutputTensor], writer: ArtifactWriter
) -> tuple[MergePlan, dict[str, Any]]:
    settings = config.assembly
    if settings.mode == "merge":
        plan = plan_merge(tensors, settings.max_shard_bytes)
        execute(plan, writer)
        return plan, {"bytes_written": plan.size, "bytes_linked": 0}
    plan, keys, written = parts.write_parts(
        plan_parts(parts.group(tensors)), writer, sources, settings.mode == "link", settings.max_shard_bytes
    )
    return plan, {"bytes_written": written, "bytes_linked": plan.size - written, parts.KEYS_FACT: keys}


def _write_small_files(
    config: Config,
    backbone: Artifact,
    experts: list[Artifact],
    model: ModelConfig,
    carried: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """All files but the weights; `carried` is the backbone's config.json with the new type."""
    count, vocab_size = len(experts) + int(config.has_public_expert), int(carried["vocab_size"])
    # Equal rows mean something only when every expert is visited.
    active = count if config.assembly.router == "uniform" else config.assembly.experts_per_token
    written = moe_config(model, vocab_size, count, active, carried)
    write_json(folder / CONFIG_NAME, written)
    copy_text_files(backbone, folder)
    sizes = model_sizes(model, vocab_size, count, active, model_config_of(backbone.read_json(CONFIG_NAME)))
    facts = {
        "architecture": written["architectures"][0],
        "experts": count,
        "members": [
            {"index": fact(item, "index"), "url": item.url, "fingerprint": item.manifest.fingerprint}
            for item in experts
        ],
        "backbone": {"url": backbone.url, "fingerprint": backbone.manifest.fingerprint},
        "experts_per_token": active,
        "public_expert": config.has_public_expert,
        "router": config.assembly.router,
        "parameters": sizes.parameters,
        "active_parameters": sizes.active_parameters,
        "routing_parameters": sizes.routing_parameters,
    }
    (folder / CARD_NAME).write_text(model_card(config, backbone, experts, facts), encoding="utf-8")
    return facts
