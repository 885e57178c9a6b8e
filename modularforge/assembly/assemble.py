"""Put the parts of a merge together: check that they belong together, solve the router, plan, stream, describe.

Works on committed artifacts of any store and needs no torch.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from checkpoints import Artifact
from modularforge.assembly.card import CARD_NAME, model_card
from modularforge.assembly.plan import MergePlan, TensorSpan, merged_spans, plan_merge, read_header
from modularforge.assembly.routing import Array, centred_means, kaiming, ridge, uniform, with_public
from modularforge.assembly.statistics import EXPERT_NAME, ROUTER_NAME, STATISTICS_NAME, load_statistics
from modularforge.assembly.stream import execute
from modularforge.config import Config
from modularforge.errors import ConfigError, MismatchError
from modularforge.model import names
from modularforge.model.hub_config import (
    CONFIG_NAME,
    GENERATION_NAME,
    INDEX_NAME,
    TOKENIZER_FILES,
    WEIGHTS_NAME,
    model_config_of,
    moe_config,
    read_config,
    write_json,
)
from modularforge.model.sizes import model_sizes

Rows = NDArray[np.float32]


def assemble(config: Config, backbone: Artifact, experts: list[Artifact], folder: Path) -> dict[str, Any]:
    """Write the model folder; returns facts for the manifest. Raises MismatchError when an expert does not belong."""
    check_same_backbone(backbone, experts)
    values = backbone.read_json(CONFIG_NAME)
    layers, family = int(values["num_hidden_layers"]), names.family_of(values["model_type"])
    with tempfile.TemporaryDirectory() as scratch:
        router_file = Path(scratch) / "router.safetensors"
        save_file(router_rows(config, experts, layers, family), router_file)
        plan = _plan(config, backbone, experts, router_file, layers, family)
        execute(plan, folder)
    if plan.index:
        write_json(folder / INDEX_NAME, plan.index)
    return _write_small_files(config, backbone, experts, folder)


def check_same_backbone(backbone: Artifact, experts: list[Artifact]) -> None:
    """Every expert must have been trained on the very tensors that this backbone shares."""
    hashes = backbone.manifest.files[WEIGHTS_NAME].tensors
    shared = {name: digest for name, digest in hashes.items() if names.is_shared(name)}
    for expert in experts:
        recorded = expert.manifest.facts["shared_tensors"]
        different = sorted(name for name in {*shared, *recorded} if shared.get(name) != recorded.get(name))
        if different:
            raise MismatchError(
                f"{expert.url} must have been trained on the backbone {backbone.url}, but {len(different)} shared "
                f"tensors differ (first {different[0]}); train it again on this backbone"
            )


def router_rows(
    config: Config, experts: list[Artifact], layers: int, family: names.Family = "llama"
) -> dict[str, Rows]:
    """The router matrix of every layer, by name, float32 [R, D]."""
    settings, kept = config.assembly, config.has_public_expert
    if settings.router == "learned":
        return {(name := names.gate(layer, family)): _learned(experts, name, kept) for layer in range(layers)}
    statistics = [load_statistics(expert.local_file(STATISTICS_NAME)) for expert in experts]
    rows: dict[str, Rows] = {}
    for layer in range(layers):
        of_layer = [item[layer] for item in statistics]
        width, count = len(of_layer[0].sum_D), len(experts) + int(kept)
        solved: Array
        if settings.router == "data_stats":
            solved = with_public(ridge(of_layer, settings.ridge_penalty, settings.router_temperature), kept)
        elif settings.router == "centred_means":
            solved = with_public(centred_means(of_layer, settings.router_temperature), kept)
        elif settings.router == "kaiming":
            solved = kaiming(count, width, config.seed * 1000 + layer)
        else:
            solved = uniform(count, width)
        # safetensors writes an array's memory as it lies: a transposed one would be saved scrambled.
        rows[names.gate(layer, family)] = np.ascontiguousarray(solved, dtype=np.float32)
    return rows


def _learned(experts: list[Artifact], name: str, public_expert: bool) -> Rows:
    rows = [load_file(expert.local_file(ROUTER_NAME))[name] for expert in experts]
    return np.ascontiguousarray(with_public(np.concatenate(rows), public_expert), dtype=np.float32)


def _plan(
    config: Config, backbone: Artifact, experts: list[Artifact], router_file: Path, layers: int, family: names.Family
) -> MergePlan:
    public_slot = 0 if config.has_public_expert else None
    spans = merged_spans(
        _spans(backbone, WEIGHTS_NAME),
        {index + (public_slot == 0): _spans(expert, EXPERT_NAME) for index, expert in enumerate(experts)},
        read_header(str(router_file)),
        layers,
        public_slot,
        family,
    )
    return plan_merge(spans, config.assembly.max_shard_bytes)


def _spans(artifact: Artifact, name: str) -> dict[str, TensorSpan]:
    return read_header(artifact.file_url(name), artifact.manifest.files[name].tensors)


def _write_small_files(config: Config, backbone: Artifact, experts: list[Artifact], folder: Path) -> dict[str, Any]:
    source, count = backbone.local_folder(), len(experts) + int(config.has_public_expert)
    values = read_config(source)
    model, vocab_size = model_config_of(values), int(values["vocab_size"])
    # Equal rows mean something only when every expert is visited.
    active = count if config.assembly.router == "uniform" else config.assembly.experts_per_token
    if active > count:
        raise ConfigError(f"assembly.experts_per_token must be at most {count}, but is {active}; lower it")
    written = moe_config(model, vocab_size, count, active, values)
    write_json(folder / CONFIG_NAME, written)
    for name in (GENERATION_NAME, *TOKENIZER_FILES):
        if name in backbone.manifest.files:
            shutil.copyfile(source / name, folder / name)
    sizes = model_sizes(model, vocab_size, count, active)
    facts = {
        "architecture": written["architectures"][0],
        "experts": count,
        "experts_per_token": active,
        "public_expert": config.has_public_expert,
        "router": config.assembly.router,
        "parameters": sizes.parameters,
        "active_parameters": sizes.active_parameters,
    }
    (folder / CARD_NAME).write_text(model_card(config, backbone, experts, facts), encoding="utf-8")
    return facts
