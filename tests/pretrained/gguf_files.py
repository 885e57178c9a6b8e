"""Small GGUF files, written as llama.cpp's converter does: rows of queries and keys in pairs, values in blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize

from tests.pretrained import models

NORMAL, CONTROL, UNUSED = 1, 3, 5
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
MIXED = {
    "token_embd": Type.Q8_0, "attn_q": Type.Q4_0, "attn_k": Type.Q4_1, "attn_v": Type.Q5_0, "attn_output": Type.Q5_1,
    "ffn_gate": Type.F16, "ffn_up": Type.BF16, "ffn_down": Type.Q8_0, "output": Type.Q8_0,
}  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        return outer[name.removesuffix(".weight")]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{NAMES[part]}"


def write(
    path: Path,
    folder: Path,
    types: Mapping[str, Type] = {},
    architecture: str = "llama",
    extra: Mapping[str, Any] = {},
    tensors: Mapping[str, np.ndarray[Any, Any]] = {},
) -> Path:
    """A GGUF file of the Llama in `folder`; `types` by part, float32 elsewhere; `extra` keys outrank its own."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    writer = gguf.GGUFWriter(path, architecture)
    keys = {**shape_keys(model.config), **tokenizer_keys(folder, model.config.vocab_size), **extra}
    for key, value in keys.items():
        add(writer, key, value)
    for name, weight in model.state_dict().items():
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            add_tensor(writer, model.config, gguf_name(name), weight.numpy(), types)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def add_tensor(
    writer: gguf.GGUFWriter, config: Any, name: str, values: np.ndarray[Any, Any], types: Mapping[str, Type]
) -> None:
    part = name.split(".")[-1]
    if part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        rows, columns = values.shape
        values = values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    kind = types.get(part, Type.F32)
    writer.add_tensor(f"{name}.weight", quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)


def shape_keys(config: Any) -> dict[str, Any]:
    return {
        "general.name": "small",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "llama.rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "llama.vocab_size": config.vocab_size,
    }


def tokenizer_keys(folder: Path, vocab_size: int) -> dict[str, Any]:
    values = json.loads((folder / "tokenizer.json").read_text())
    tokens, kinds = [f"[PAD{index}]" for index in range(vocab_size)], [UNUSED] * vocab_size
    for token, index in values["model"]["vocab"].items():
        tokens[index], kinds[index] = token, NORMAL
    for added in values["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else 4
    merges = values["model"]["merges"]
    own = {token: index for index, token in enumerate(tokens)}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": own["<|begin|>"],
        "tokenizer.ggml.eos_token_id": own["<|end|>"],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": TEMPLATE,
    }


def source(folder: Path, **changes: Any) -> Path:
    """The Llama that files are written of, as transformers saves it."""
    return models.llama(folder, **{**SHAPE, **PLAIN, **changes})
