"""A GGUF file (llama.cpp) of a Llama as a Hugging Face model: its settings, its tokenizer, and its values in float32.

Read through the package `gguf` (extra `gguf`), which knows all block formats. What would silently be computed in
another way is refused: other architectures, positions that a table stretches, tensors that a plain Llama does not have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoints.redact import redact
from checkpoints.safetensors import header_bytes
from modularforge.errors import ConfigError, DataError, one_line
from modularforge.model import names
from modularforge.model.hub_config import CONFIG_NAME, GENERATION_NAME, parse_config
from modularforge.pretrained.gguf_tokenizer import build_tokenizer, special_ids, tokenizer_settings

Array = npt.NDArray[np.float32]
ARCHITECTURE = "llama"
OUTER = {"token_embd": names.EMBEDDING, "output_norm": names.FINAL_NORM, "output": names.HEAD}
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
STRETCHED = {"linear": "linear", "yarn": "yarn"}
"""Ways to stretch positions that config.json has a word for."""


ORIGIN = "name the folder or Hub name of the model that it was made from"


class GgufFile:
    """One file of this machine; tensors are read, and their blocks decoded, when they are asked for.

    `model` is what the file is called in messages. Raises DataError for what is no GGUF file of a Llama that we can
    compute, and ConfigError where the package `gguf` is not installed.
    """

    def __init__(self, path: Path, model: str) -> None:
        self.model = redact(model)
        self._reader = _open(path, self.model)
        found = self.key("general.architecture", "no architecture")
        wish = f"be of the architecture {ARCHITECTURE}, but is of {found!r:.60}; choose a Llama, or {ORIGIN}"
        self._require(found == ARCHITECTURE, wish)
        is_mixture = bool(self.key("llama.expert_count", 0))
        self._require(not is_mixture, "be a dense model, but is a mixture of experts; choose a dense one")
        self._names = {tensor.name: self._renamed(tensor.name) for tensor in self._reader.tensors}

    def key(self, name: str, default: Any = None) -> Any:
        """A value of the metadata; raises DataError where it is not there and has no default."""
        field = self._reader.get_field(name)
        if field is None:
            self._require(default is not None, f"have the key {name}, but has not; take another copy of the model")
            return default
        return field.contents()

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """All keys of the tokenizer with their values."""
        return {name: field.contents() for name, field in self._reader.fields.items() if name.startswith("tokenizer.")}

    def config(self) -> dict[str, Any]:
        """config.json; raises DataError for values that no model has."""
        try:
            values = self._values_of_config()
        except (TypeError, ValueError, ArithmeticError) as error:
            raise DataError(
                f"{self.model} must have one number for each size and id of a model, but has not ({one_line(error)}); "
                f"take another copy, or {ORIGIN}"
            ) from error
        return parse_config(json.dumps(values).encode(), self.model)

    def _values_of_config(self) -> dict[str, Any]:
        width, heads = self._shape("embedding_length"), self._shape("attention.head_count")
        head_width = self.key("llama.attention.key_length", width // heads)
        turned = self.key("llama.rope.dimension_count", head_width)
        wish = f"turn whole heads ({head_width}) for their positions, but turns {turned}; choose another model"
        self._require(turned == head_width, wish)
        epsilon = float(f"{self._shape('attention.layer_norm_rms_epsilon'):.6g}")  # it is stored in float32
        values = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self._rows("token_embd.weight"),
            "hidden_size": width,
            "intermediate_size": self._shape("feed_forward_length"),
            "num_hidden_layers": self._shape("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.key("llama.attention.head_count_kv", heads),
            "head_dim": head_width,
            "max_position_embeddings": self._shape("context_length"),
            "rms_norm_eps": epsilon,
            "rope_theta": float(f"{self.key('llama.rope.freq_base', 10_000.0):.6g}"),
            "tie_word_embeddings": names.HEAD not in self._names.values(),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            **special_ids(self._reader_key),
            "torch_dtype": "float32",
        }
        return values | self._stretched()

    def write(self, folder: Path) -> None:
        """Write settings and tokenizer; config.json comes last."""
        values = self.config()
        build_tokenizer(self.metadata, self.model).save(str(folder / "tokenizer.json"))
        positions = values["max_position_embeddings"]
        _write(folder / "tokenizer_config.json", tokenizer_settings(self.metadata, positions, self.model))
        _write(folder / GENERATION_NAME, special_ids(self._reader_key))
        _write(folder / CONFIG_NAME, values)

    def weights(self) -> Iterator[bytes]:
        """The bytes of a safetensors file with all tensors in float32, one after another."""
        tensors = {self._names[tensor.name]: tensor for tensor in self._reader.tensors}
        shapes = {name: tuple(int(size) for size in tensor.shape[::-1]) for name, tensor in tensors.items()}
        sizes = ((name, "F32", shapes[name], 4 * int(np.prod(shapes[name]))) for name in sorted(tensors))
        yield header_bytes(sizes, {"format": "pt"})
        for name in sorted(tensors):
            values = self._values(tensors[name]).reshape(shapes[name])
            yield self._unpaired(tensors[name].name, values).astype("<f4", copy=False).tobytes()

    def _values(self, tensor: Any) -> Array:
        """A tensor's values in float32, whatever blocks they are stored in."""
        from gguf.quants import dequantize

        try:
            found: Array = dequantize(tensor.data, tensor.tensor_type)
            return found
        except (NotImplementedError, ValueError) as error:
            raise DataError(
                f"{self.model} must have values of a type that the package gguf decodes, but {tensor.name} is of "
                f"{tensor.tensor_type.name}; choose another quantisation, such as Q8_0, or a newer gguf"
            ) from error

    def _unpaired(self, name: str, values: Array) -> Array:
        """Rows of queries and keys go back from llama.cpp's rotary pairs side by side to halves of a head."""
        part = name.split(".")[2] if name.startswith("blk.") else ""
        if part not in ("attn_q", "attn_k"):
            return values
        heads = self._shape("attention.head_count")
        heads = heads if part == "attn_q" else self.key("llama.attention.head_count_kv", heads)
        rows, columns = values.shape
        halves: Array = values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        return halves

    def _renamed(self, name: str) -> str:
        """Hugging Face's name of a tensor."""
        parts = name.split(".")
        if parts[-1] == "weight" and parts[0] in OUTER and len(parts) == 2:
            return OUTER[parts[0]]
        is_inner = parts[-1] == "weight" and len(parts) == 4 and parts[0] == "blk" and parts[2] in INNER
        why = " (positions that a table stretches, as Llama 3.1's are)" if name == "rope_freqs.weight" else ""
        wish = f"have the tensors of a plain Llama alone, but has {name}{why}; choose another, or {ORIGIN}"
        self._require(is_inner, wish)
        return f"model.layers.{parts[1]}.{INNER[parts[2]]}.weight"

    def _stretched(self) -> dict[str, Any]:
        """How positions are stretched, as config.json says it."""
        kind = self.key("llama.rope.scaling.type", "none")
        if kind == "none":
            return {}
        known = f"stretch positions by none, {' or '.join(STRETCHED)}, but does by {kind!r:.60}; choose another model"
        self._require(kind in STRETCHED, known)
        scaling = {"rope_type": STRETCHED[kind], "factor": float(self._shape("rope.scaling.factor"))}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self._shape("rope.scaling.original_context_length")
        return {"rope_scaling": scaling}

    def _reader_key(self, name: str) -> Any:
        field = self._reader.get_field(name)
        return None if field is None else field.contents()

    def _shape(self, name: str) -> Any:
        return self.key(f"llama.{name}")

    def _rows(self, name: str) -> int:
        found = [tensor for tensor in self._reader.tensors if tensor.name == name]
        self._require(bool(found), f"have the tensor {name}, but has not; take another copy of the model")
        return int(found[0].shape[-1])

    def _require(self, is_right: bool, wish: str) -> None:
        if not is_right:
            raise DataError(f"{self.model} must {wish}")


def _open(path: Path, model: str) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigError(
            f"model.pretrained must not be a GGUF file ({model}) without the package gguf, but it is not installed; "
            "run `pip install 'modularforge[gguf]'`, or name a folder with safetensors"
        ) from error
    try:
        return GGUFReader(path)
    except FileNotFoundError as error:
        raise DataError(f"{model} must be a GGUF file, but there is none; fix the path") from error
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except Exception as error:  # the package indexes into the bytes, and raises whatever that raises
        raise DataError(
            f"{model} must be a whole GGUF file, but cannot be read ({one_line(error)}); copy or download it again"
        ) from error


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
