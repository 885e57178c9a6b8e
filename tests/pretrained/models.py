"""Tiny random models as transformers itself saves them: Llama with scaled positions, Qwen3 with a tied head."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from modularforge.config import DataConfig
from modularforge.config_files import sample_sources
from modularforge.data.corpus import read_documents

CONTEXT, POSITIONS, VOCABULARY = 48, 96, 400
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 24}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}


def sample_texts(count: int = 30) -> list[str]:
    """Texts of the corpus in the package."""
    data = DataConfig.model_validate({"sources": sample_sources()[:3]})
    return [
        document.text[:4000]
        for source in data.sources
        for document in itertools.islice(read_documents(source, "train", data), count // 3)
    ]


def save_tokenizer(folder: Path, begin: str | None, end: str) -> None:
    """A small byte-level tokenizer with other special tokens, at other ids, than ours."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        sample_texts(), trainers.BpeTrainer(vocab_size=VOCABULARY - 12, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([token for token in (begin, end) if token])
    tokenizer.add_tokens(["<think>"])
    if begin:
        pair = [(begin, tokenizer.token_to_id(begin))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=pair)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, model_max_length=POSITIONS
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


def save_model(model: transformers.PreTrainedModel, folder: Path, dtype: torch.dtype, shard_size: str) -> Path:
    """Save a model whose norms are not all ones, in the type and in files of the size asked for."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.normal_(1.0, 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def llama(folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "1GB", **changes: Any) -> Path:
    """Llama 3's kind: scaled positions, grouped queries, a head of its own, a padded vocabulary."""
    torch.manual_seed(1)
    save_tokenizer(folder, "<|begin|>", "<|end|>")
    values = {**SHAPE, "vocab_size": VOCABULARY, "rope_parameters": dict(LLAMA3), "tie_word_embeddings": False}
    values |= {"bos_token_id": VOCABULARY - 12, "eos_token_id": VOCABULARY - 11, **changes}
    return save_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)), folder, dtype, shard_size)


def qwen3(folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "1GB", **changes: Any) -> Path:
    """Qwen3's kind: normalised queries and keys, heads wider than width / heads, a tied head, no token at the start."""
    torch.manual_seed(2)
    save_tokenizer(folder, None, "<|endoftext|>")
    values = {**SHAPE, "vocab_size": VOCABULARY, "head_dim": 16, "tie_word_embeddings": True}
    values |= {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "eos_token_id": VOCABULARY - 12,
        **changes,
    }
    return save_model(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**values)), folder, dtype, shard_size)


def mistral(folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "1GB", **changes: Any) -> Path:
    """Mistral without its window, which is a Llama by another name."""
    torch.manual_seed(3)
    save_tokenizer(folder, "<s>", "</s>")
    values = {**SHAPE, "vocab_size": VOCABULARY, "sliding_window": None, "head_dim": 8, **changes}
    return save_model(transformers.MistralForCausalLM(transformers.MistralConfig(**values)), folder, dtype, shard_size)
