"""Backbones and experts of any size with random bytes for weights, written block by block."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints import Artifact, ArtifactWriter, FileEntry, write_artifact
from checkpoints.safetensors import ITEM_BYTES, TensorSpan
from modularforge.assembly.plan import OutputTensor, header_bytes, in_file_order
from modularforge.config import ModelConfig
from modularforge.experts.ffn import EXPERT_NAME
from modularforge.model import names
from modularforge.model.hub_config import CONFIG_NAME, GENERATION_NAME, backbone_config, generation_config
from modularforge.model.sizes import dense_shapes
from modularforge.routing.statistics import STATISTICS_NAME, LayerStatistics, RouterStatistics, save_statistics

BLOCK = os.urandom(1 << 20)


def write_parts(
    root: Path | str, model: ModelConfig, vocab_size: int, experts: int, dtype: str = "BF16"
) -> tuple[Artifact, list[Artifact]]:
    """A committed backbone and its plain experts, all in `dtype`."""
    with write_artifact(f"{root}/backbone", "backbone", "synthetic") as writer:
        backbone = writer.commit(fill_backbone(writer, model, vocab_size, dtype))
    members = []
    for index in range(experts):
        with write_artifact(f"{root}/experts/expert-{index}", "expert", f"synthetic-{index}") as writer:
            members.append(writer.commit(fill_expert(writer, backbone, model, vocab_size, index, dtype)))
    return backbone, members


def fill_backbone(writer: ArtifactWriter, model: ModelConfig, vocab_size: int, dtype: str = "BF16") -> dict[str, Any]:
    """Write what the assembler reads of a backbone; returns the facts for its manifest."""
    _write(writer, "model.safetensors", dense_shapes(model, vocab_size), dtype, 0)
    carried = {"dtype": {"BF16": "bfloat16", "F32": "float32"}[dtype]}
    writer.write_json(CONFIG_NAME, backbone_config(model, vocab_size, carried))
    writer.write_json(GENERATION_NAME, generation_config())
    return {"data": {}}


def fill_expert(
    writer: ArtifactWriter, backbone: Artifact, model: ModelConfig, vocab_size: int, index: int, dtype: str = "BF16"
) -> dict[str, Any]:
    """Write what the assembler reads of a plain expert; returns the facts for its manifest."""
    shapes = dense_shapes(model, vocab_size)
    own = {names.dense_to_expert(n, index): s for n, s in shapes.items() if names.is_dense_ffn(n)}
    _write(writer, EXPERT_NAME, own, dtype, index + 1)
    save_statistics(writer.folder / STATISTICS_NAME, _statistics(model, vocab_size, index))
    hashes = backbone.manifest.files["model.safetensors"].tensors
    shared = {name: digest for name, digest in hashes.items() if names.is_shared(name)}
    return {"index": index, "anchored": False, "shared_tensors": shared}


def write_sparse_experts(root: Path, backbone: Artifact, model: ModelConfig, experts: int) -> list[Artifact]:
    """Plain experts that are all zeros and take no room on the disk, for what depends on sizes but reads no bytes.

    The hash of a whole file is that of its header: nobody reads these files, and 64 GB need not be hashed.
    """
    recorded = backbone.manifest.files["model.safetensors"].tensors
    shared = {name: digest for name, digest in recorded.items() if names.is_shared(name)}
    shapes = {name: shape for name, shape in dense_shapes(model, 1).items() if names.is_dense_ffn(name)}
    members = []
    for index in range(experts):
        spans = {
            names.dense_to_expert(name, index): OutputTensor(TensorSpan("", "BF16", shape, 0, 2 * prod(shape)), "BF16")
            for name, shape in shapes.items()
        }
        header = header_bytes(in_file_order(spans.items()))
        size = len(header) + sum(tensor.length for tensor in spans.values())
        with write_artifact(f"{root}/experts/expert-{index}", "expert", f"sparse-{index}") as writer:
            path = writer.folder / EXPERT_NAME
            path.write_bytes(header)
            os.truncate(path, size)
            tensors = {name: _hash_of_zeros(tensor.length) for name, tensor in spans.items()}
            writer.adopt(EXPERT_NAME, FileEntry(size, hashlib.sha256(header).hexdigest(), tensors))
            members.append(writer.commit({"index": index, "anchored": False, "shared_tensors": shared}))
    return members


@lru_cache
def _hash_of_zeros(size: int) -> str:
    return hashlib.sha256(bytes(size)).hexdigest()


def _write(writer: ArtifactWriter, name: str, shapes: dict[str, tuple[int, ...]], dtype: str, seed: int) -> None:
    tensors = {
        key: OutputTensor(TensorSpan("", dtype, shape, 0, prod(shape) * ITEM_BYTES[dtype]), dtype)
        for key, shape in shapes.items()
    }
    ordered = in_file_order(tensors.items())

    def chunks() -> Iterator[bytes]:
        yield header_bytes(ordered)
        for number, (_, tensor) in enumerate(ordered):
            start = (seed * 1009 + number * 131) % len(BLOCK)
            block, left = BLOCK[start:] + BLOCK[:start], tensor.length
            while left:
                yield block[: min(left, len(block))]
                left -= min(left, len(block))

    writer.write_chunks(name, chunks())


def _statistics(model: ModelConfig, vocab_size: int, seed: int) -> RouterStatistics:
    random = np.random.default_rng(seed)
    second: Any = np.eye(model.width, dtype=np.float32)
    layers = [LayerStatistics(1000.0, random.normal(size=model.width), 1000 * second) for _ in range(model.layers)]
    return RouterStatistics(layers, random.poisson(3.0, vocab_size).astype(float), np.ones(model.layers))


def describe(folder: Path, backbone: Artifact, experts: list[Artifact]) -> None:
    """Note the parts in `parts.json`, for a process of its own to open."""
    urls = {"backbone": backbone.url, "experts": [item.url for item in experts]}
    (folder / "parts.json").write_text(json.dumps(urls))
