"""A model folder as one GGUF file for llama.cpp: a Llama or Qwen3, dense, or the mixture that was assembled on it.

Written through the package `gguf` (extra `gguf`), a tensor at a time, under another name until it is whole. A mixture
routes there by the rows in its weights, as in transformers: the tables that ModularForge reads beside them have no
place in the format. What would be computed in another way is refused.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from checkpoints.parsing import parse_object
from checkpoints.safetensors import TensorSpan, read_spans, weight_files
from modularforge.config import ModelConfig, RopeScalingConfig
from modularforge.data.chat_template import TEMPLATE_FILES
from modularforge.data.tokenizer import SETTINGS_NAME
from modularforge.errors import ConfigError, DataError
from modularforge.log import logger
from modularforge.model import names
from modularforge.model.adapter_config import ADAPTERS_NAME
from modularforge.model.backbone import rotary_frequencies
from modularforge.model.hub_config import OWN_ROWS_NAME, TABLES_NAME, experts_of, is_moe, model_config_of, read_config
from modularforge.pretrained.gguf_file import INNER, OUTER
from modularforge.pretrained.gguf_tokenizer import tokenizer_keys

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
KINDS = ("F32", "F16", "BF16", "Q8_0")
"""Types of values that can be written; llama.cpp's own `llama-quantize` makes smaller ones of these."""
TO_GGUF = {hub: ours for ours, hub in (OUTER | INNER).items()} | {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
EXPERT = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}
GATE, FREQUENCIES = "ffn_gate_inp", "rope_freqs.weight"
PLAIN_YARN = {"rope_type", "factor", "original_max_position_embeddings"}
Array = npt.NDArray[np.float32]


def write_gguf(folder: Path, path: Path, kind: str | None = None) -> None:
    """Write the model in `folder` to `path`, its matrices as `kind` (None: as they are stored), the rest in float32.

    Raises ConfigError where the package is not installed, DataError for what the format cannot say.
    """
    values = read_config(folder)
    if (folder / ADAPTERS_NAME).is_file():
        raise DataError(
            f"{folder} must be a model without adapters to be written as GGUF, but chooses among some; assemble it "
            "with assembly.lora: mixture, which makes feed-forward blocks of them"
        )
    if path.exists() or not path.parent.is_dir():
        raise DataError(f"{path} must be a new file in a folder that is there, but is not; name another")
    model, spans = model_config_of(values), _spans(folder)
    keys = _shape_keys(model, values, str(folder)) | tokenizer_keys(folder / "tokenizer.json", values, str(folder))
    keys |= {"tokenizer.chat_template": found} if (found := _chat_template(folder)) else {}
    with _writer(path, ARCHITECTURES[values["model_type"]]) as writer:
        for key, value in keys.items():
            _add(writer, key, value)
        _write_tensors(writer, model, spans, kind)
    if (folder / TABLES_NAME).is_file():
        logger.warning("%s routes by the rows in its weights: GGUF has no place for %s", path, TABLES_NAME)
    if (folder / OWN_ROWS_NAME).is_file():
        logger.warning("%s has the backbone's embeddings and head: GGUF has no place for %s", path, OWN_ROWS_NAME)


@contextmanager
def _writer(path: Path, architecture: str) -> Iterator[Any]:
    """A writer whose file gets its name when the block is done, and is deleted where it fails."""
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise ConfigError(
            "a GGUF file must be written with the package gguf, but it is not installed; run "
            "`pip install 'modularforge[gguf]'`"
        ) from error
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    writer = GGUFWriter(scratch, architecture)
    try:
        yield writer
        writer.close()
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _spans(folder: Path) -> dict[str, TensorSpan]:
    return {name: span for file in weight_files(folder) for name, span in read_spans(str(file)).items()}


def _chat_template(folder: Path) -> str | None:
    own, settings = (folder / name for name in TEMPLATE_FILES)
    if own.is_file():
        return own.read_text(encoding="utf-8")
    assert settings.name == SETTINGS_NAME
    found = parse_object(settings.read_bytes()).get("chat_template") if settings.is_file() else None
    return found if isinstance(found, str) else None


def _shape_keys(model: ModelConfig, values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "block_count": model.layers,
        "context_length": model.positions,
        "embedding_length": model.width,
        "feed_forward_length": int(values["intermediate_size"]),
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.kv_heads,
        "attention.key_length": model.width_per_head,
        "attention.value_length": model.width_per_head,
        "attention.layer_norm_rms_epsilon": float(model.norm_epsilon),
        "rope.freq_base": float(model.rope_theta),
        "rope.dimension_count": model.width_per_head,
        "vocab_size": int(values["vocab_size"]),
        **_stretched(model.rope_scaling, model.positions, origin),
    }
    if is_moe(values):
        found |= {"expert_count": experts_of(values), "expert_used_count": int(values["num_experts_per_tok"])}
    if values["model_type"] == "qwen3_moe":
        found["expert_feed_forward_length"] = model.ffn_width
    prefix = ARCHITECTURES[values["model_type"]]
    name = Path(origin).resolve().name
    return {"general.name": name, **{f"{prefix}.{key}": value for key, value in found.items()}}


def _stretched(scaling: RopeScalingConfig | None, positions: int, origin: str) -> dict[str, Any]:
    """How positions are stretched; Llama 3's way is a tensor (`rope_freqs`) instead."""
    if scaling is None or scaling.rope_type == "llama3":
        return {}
    if extra := sorted({*scaling.model_dump(exclude_none=True)} - PLAIN_YARN):
        raise DataError(
            f"{origin} must stretch positions by {scaling.rope_type} with its usual constants to be written as GGUF, "
            f"but sets {', '.join(extra)}; serve the folder with transformers or vLLM"
        )
    original = scaling.original_max_position_embeddings or positions
    found = {"rope.scaling.type": scaling.rope_type, "rope.scaling.factor": float(scaling.factor)}
    return found | ({"rope.scaling.original_context_length": original} if scaling.rope_type == "yarn" else {})


def _add(writer: Any, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)


def _write_tensors(writer: Any, model: ModelConfig, spans: Mapping[str, TensorSpan], kind: str | None) -> None:
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import quantize

    tensors = _planned(name for name in spans if not names.is_redundant(name, model.tied_head))
    types = {name: _type_of(name, [spans[part] for part in parts], kind) for name, parts in tensors.items()}
    shapes = {name: _shape_of(name, [spans[part] for part in parts]) for name, parts in tensors.items()}
    factors = _factors(model)
    if factors is not None:
        writer.add_tensor_info(FREQUENCIES, factors.shape, factors.dtype, factors.nbytes)
    for name, shape in shapes.items():
        block, size = GGML_QUANT_SIZES[types[name]]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), prod(shape) // block * size, types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name, parts in tensors.items():
        found = [_paired(part, _read(spans[part], part), model) for part in parts]
        stacked = np.stack(found) if name.endswith("_exps.weight") else found[0]
        writer.write_tensor_data(quantize(np.ascontiguousarray(stacked), types[name]))


def _factors(model: ModelConfig) -> Array | None:
    """By what llama.cpp divides the angles of Llama 3's positions, [H/2]."""
    if model.rope_scaling is None or model.rope_scaling.rope_type != "llama3":
        return None
    plain, _ = rotary_frequencies(model.model_copy(update={"rope_scaling": None}))
    found: Array = (plain / rotary_frequencies(model)[0]).numpy()
    return found


def _planned(tensors: Iterable[str]) -> dict[str, list[str]]:
    """Names in the file, and the tensors that each is made of: one, or those of all experts in the order of slots."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(tensors, key=lambda name: ((names.expert_position(name) or (0, 0))[1], name)):
        found[_renamed(name)].append(name)
    return dict(sorted(found.items()))


def _renamed(name: str) -> str:
    if name in TO_GGUF:
        return f"{TO_GGUF[name]}.weight"
    if (position := names.expert_position(name)) is not None:
        return f"blk.{position[0]}.{EXPERT[position[2]]}.weight"
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{GATE if names.is_gate(name) else TO_GGUF[part]}.weight"


def _shape_of(name: str, parts: list[TensorSpan]) -> tuple[int, ...]:
    return (len(parts), *parts[0].shape) if name.endswith("_exps.weight") else parts[0].shape


def _type_of(name: str, parts: list[TensorSpan], kind: str | None) -> Any:
    """float32 for gains and routers, which llama.cpp wants so; F16 where rows are no whole blocks of Q8_0."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(parts[0].shape) == 1 or GATE in name:
        return GGMLQuantizationType.F32
    found = GGMLQuantizationType[kind or parts[0].dtype]
    return GGMLQuantizationType.F16 if parts[0].shape[-1] % GGML_QUANT_SIZES[found][0] else found


def _read(span: TensorSpan, name: str) -> Array:
    with safe_open(span.url, framework="pt") as file:
        found: Array = file.get_tensor(name).to(torch.float32).numpy()
    return found


def _paired(name: str, values: Array, model: ModelConfig) -> Array:
    """Rows of a Llama's queries and keys go from halves of a head to llama.cpp's rotary pairs side by side."""
    part = names.attention_part(name)
    if model.family != "llama" or part not in ("q_proj", "k_proj"):
        return values
    heads = model.heads if part == "q_proj" else model.kv_heads
    rows, columns = values.shape
    pairs: Array = values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return pairs
