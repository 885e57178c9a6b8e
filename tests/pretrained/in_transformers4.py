"""Runs in the environment of transformers 4: reads our models, or writes models for us to read; prints JSON.

python in_transformers4.py read TEXT FOLDER…     class, logits (saved beside the weights), ids of TEXT, end of text
python in_transformers4.py write FOLDER          tiny models by name, with the logits that they should give
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
SHAPE: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.1,
}


def tokens() -> torch.Tensor:
    """The same ids in both environments."""
    return (torch.arange(2 * 96).reshape(2, 96) * 37) % 400


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits.contiguous()


def read(text: str, folders: list[str]) -> dict[str, Any]:
    found = {}
    for folder in folders:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        save_file({"logits": logits(model)}, Path(folder).with_suffix(".logits"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        generation = transformers.GenerationConfig.from_pretrained(folder)
        ids = tokenizer(text)["input_ids"]
        found[folder] = [type(model).__name__, ids, tokenizer.eos_token_id, generation.eos_token_id]
    return found


def write(root: Path) -> None:
    llama, qwen3 = transformers.LlamaConfig, transformers.Qwen3Config
    original = {"original_max_position_embeddings": 24}
    configs = {
        "llama3": llama(**SHAPE, rope_theta=5000.0, rope_scaling={**LLAMA3, **original}),
        "yarn": llama(**SHAPE, rope_scaling={**YARN, **original}, tie_word_embeddings=True, head_dim=16),
        "linear": llama(**SHAPE, rope_scaling={"type": "linear", "factor": 2.0}),
        "qwen3": qwen3(**SHAPE, head_dim=16, rope_theta=1e6, tie_word_embeddings=True),
        "qwen3-yarn": qwen3(**SHAPE, head_dim=8, rope_scaling={**YARN, **original}),
    }
    for name, config in configs.items():
        torch.manual_seed(6)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(root / name)
        save_file({"logits": logits(model)}, root / f"{name}.logits")


if __name__ == "__main__":
    assert transformers.__version__.startswith("4."), transformers.__version__
    if sys.argv[1] == "read":
        print(json.dumps(read(sys.argv[2], sys.argv[3:])))
    else:
        write(Path(sys.argv[2]))
