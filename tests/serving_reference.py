"""A plain tensor-parallel Mixtral and Qwen3-MoE, split as vLLM and SGLang split them.

Query heads; key-value heads (each process its own, or several processes one); columns of every expert's FFN. Sums over
processes come behind attention and FFN.

It reads a folder's config.json and weights by Hugging Face's names, as the servers do, and knows nothing of ours.
"""

# T tokens  D width  H head width  F FFN width of a process

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu


class Served:
    """A model folder on so many processes of a server."""

    def __init__(self, folder: Path, server: str, processes: int) -> None:
        self.values: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights = {
            name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()
        }
        self.processes, self.is_qwen = processes, self.values["model_type"] == "qwen3_moe"
        self.heads, self.kv_heads = self.values["num_attention_heads"], self.values["num_key_value_heads"]
        # SGLang's Mixtral does not read head_dim.
        takes_width = server == "SGLang" and not self.is_qwen
        self.head_width = self.values["hidden_size"] // self.heads if takes_width else self.values["head_dim"]
        assert self.heads % processes == 0
        assert self.kv_heads % processes == 0 or processes % self.kv_heads == 0
        assert self.values["moe_intermediate_size" if self.is_qwen else "intermediate_size"] % processes == 0
        assert not self.is_qwen or processes <= self.values["num_experts"]
        assert self.weight("model.layers.0.self_attn.q_proj").shape[0] == self.heads * self.head_width

    def weight(self, name: str) -> Tensor:
        return self.weights[f"{name}.weight"].float()

    def norm(self, hidden: Tensor, name: str) -> Tensor:
        return rms_norm(hidden, hidden.shape[-1:], self.weight(name), self.values["rms_norm_eps"])

    def logits(self, tokens_T: Tensor) -> Tensor:
        """[T, V]."""
        hidden_TD = self.weight("model.embed_tokens")[tokens_T]
        for layer in range(self.values["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            normed_TD = self.norm(hidden_TD, f"{name}.input_layernorm")
            hidden_TD = hidden_TD + sum(self.attention(normed_TD, name, rank) for rank in range(self.processes))
            normed_TD = self.norm(hidden_TD, f"{name}.post_attention_layernorm")
            hidden_TD = hidden_TD + sum(self.experts(normed_TD, name, rank) for rank in range(self.processes))
        head = "model.embed_tokens" if self.values["tie_word_embeddings"] else "lm_head"
        return self.norm(hidden_TD, "model.norm") @ self.weight(head).T

    def attention(self, hidden_TD: Tensor, name: str, rank: int) -> Tensor:
        own = self.heads // self.processes
        queries = slice(rank * own * self.head_width, (rank + 1) * own * self.head_width)
        own_kv = max(1, self.kv_heads // self.processes)
        first = rank * own_kv if self.kv_heads >= self.processes else rank * self.kv_heads // self.processes
        keys = slice(first * self.head_width, (first + own_kv) * self.head_width)
        parts = {"q": queries, "k": keys, "v": keys}
        split = {
            part: (hidden_TD @ self.weight(f"{name}.self_attn.{part}_proj")[rows].T).unflatten(
                -1, (-1, self.head_width)
            )
            for part, rows in parts.items()
        }
        for part in ("q", "k"):
            split[part] = self.norm(split[part], f"{name}.self_attn.{part}_norm") if self.is_qwen else split[part]
            split[part] = self.rotated(split[part])
        query, key, value = (split[part].transpose(0, 1) for part in ("q", "k", "v"))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return mixed.transpose(0, 1).flatten(1) @ self.weight(f"{name}.self_attn.o_proj")[:, queries].T

    def rotated(self, heads_TNH: Tensor) -> Tensor:
        half = self.head_width // 2
        rate = self.values["rope_theta"] ** (-torch.arange(half, dtype=torch.float32) / half)
        angle = (torch.arange(len(heads_TNH)).float()[:, None] * rate)[:, None]
        left, right = heads_TNH[..., :half], heads_TNH[..., half:]
        return torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], dim=-1)

    def experts(self, hidden_TD: Tensor, name: str, rank: int) -> Tensor:
        block = f"{name}.mlp" if self.is_qwen else f"{name}.block_sparse_moe"
        gate, up, down = ("gate_proj", "up_proj", "down_proj") if self.is_qwen else ("w1", "w3", "w2")
        share = (hidden_TD @ self.weight(f"{block}.gate").T).softmax(dim=-1)
        weight, chosen = share.topk(self.values["num_experts_per_tok"], dim=-1)
        weight = weight / weight.sum(dim=-1, keepdim=True)
        found = torch.zeros_like(hidden_TD)
        for expert in range(share.shape[-1]):
            place = f"{block}.experts.{expert}"
            columns_F = self.weight(f"{place}.{gate}").chunk(self.processes)[rank]
            up_F, down_F = self.weight(f"{place}.{up}").chunk(self.processes)[rank], self.weight(f"{place}.{down}")
            inner_TF = silu(hidden_TD @ columns_F.T) * (hidden_TD @ up_F.T)
            own = (weight * (chosen == expert)).sum(dim=-1, keepdim=True)
            found += own * (inner_TF @ down_F.chunk(self.processes, dim=1)[rank].T)
        return found

    def generate(self, tokens_T: Tensor, count: int) -> list[int]:
        """The likeliest tokens behind a text."""
        for _ in range(count):
            tokens_T = torch.cat([tokens_T, self.logits(tokens_T)[-1:].argmax(dim=-1)])
        return tokens_T[-count:].tolist()
