"""What the project's training is measured beside: GPT in plain torch, and litgpt and the HF Trainer where installed."""

# B batch  T tokens  D width  H head width

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.timing import Shape, bare_steps, between, now

Seconds = Callable[[Shape, bool], list[float]]


class PlainBlock(nn.Module):
    """A block of nanoGPT: norm, causal attention, norm, FFN of four times the width (the FLOPs of 8/3 in SwiGLU)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attention, self.projection = (nn.Linear(width, n * width, bias=False) for n in (3, 1))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Residual stream in, residual stream out."""
        B, T, D = x_BTD.shape
        parts = self.attention(self.norm_1(x_BTD)).split(D, dim=2)
        query, key, value = (part.view(B, T, self.heads, D // self.heads).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_BTD = x_BTD + self.projection(mixed.transpose(1, 2).reshape(B, T, D))
        added: Tensor = self.down(F.gelu(self.up(self.norm_2(x_BTD))))
        return x_BTD + added


class PlainGPT(nn.Module):
    """nanoGPT's model: learned positions, a tied head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(PlainBlock(shape.width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits of all positions."""
        x_BTD = self.tokens(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return F.linear(self.norm(x_BTD), self.tokens.weight)


def logits_loss(model: nn.Module, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """As nanoGPT has it: from all logits at once."""
    return F.cross_entropy(model(inputs_BT).flatten(0, 1), targets_BT.flatten())


def plain_torch(shape: Shape, compiles: bool) -> list[float]:
    """nanoGPT's model in its loop."""
    return bare_steps(PlainGPT(shape), logits_loss, shape, compiles)


def litgpt(shape: Shape, compiles: bool) -> list[float]:
    """litgpt's model of the backbone's very shape, in the same loop."""
    package = importlib.import_module("litgpt.model")  # of which this project knows nothing else
    model = shape.model
    config = package.Config(
        block_size=shape.context, padded_vocab_size=shape.vocabulary, vocab_size=shape.vocabulary,
        n_layer=shape.layers, n_head=shape.heads, n_embd=shape.width, n_query_groups=model.kv_heads,
        rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP", intermediate_size=model.ffn_width,
    )  # fmt: skip
    return bare_steps(package.GPT(config), logits_loss, shape, compiles)


def hf_trainer(shape: Shape, compiles: bool) -> list[float]:
    """transformers' Llama of the same shape in its Trainer."""
    import transformers

    marks: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, arguments: Any, state: Any, control: Any, **_others: Any) -> None:
            if state.global_step % shape.every == 0:
                marks.append(now())

    steps, has_gpu = shape.every * (shape.times + 1), torch.cuda.is_available()
    row_T = shape.batch_BT()[:, :-1]
    data = [{"input_ids": row_T[index % shape.batch], "labels": row_T[index % shape.batch]}
            for index in range(shape.batch * steps)]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        settings = transformers.TrainingArguments(
            scratch, max_steps=steps, per_device_train_batch_size=shape.batch, bf16=has_gpu, use_cpu=not has_gpu,
            torch_compile=compiles, optim="adamw_torch_fused" if has_gpu else "adamw_torch", logging_strategy="no",
            save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(llama(shape))
        transformers.Trainer(model, settings, train_dataset=data, callbacks=[Clock()]).train()
    return between(marks, shape.every)


def llama(shape: Shape) -> Any:
    """transformers' settings of the backbone's shape."""
    import transformers

    model = shape.model
    return transformers.LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=model.width, num_hidden_layers=model.layers,
        num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, intermediate_size=model.ffn_width,
        max_position_embeddings=shape.context, tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip


def peers() -> dict[str, Seconds]:
    """What is here to compare with, by name."""
    optional = {"litgpt": ("litgpt", litgpt), "HF Trainer": ("transformers", hf_trainer)}
    found = {name: seconds for name, (package, seconds) in optional.items() if importlib.util.find_spec(package)}
    return {"plain torch (nanoGPT)": plain_torch, **found}
