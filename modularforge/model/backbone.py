"""The dense decoder: pre-norm, RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases.

Plain single-device modules whose parameter names and shapes are those of Hugging Face's Llama and Qwen3 (which
normalises queries and keys as well); the mixture-of-experts
model is the same decoder with another feed-forward block (see moe.py). Parallelism and compilation come from outside.
"""

# B batch  T tokens  S past and present tokens  D width  N query heads  K key heads
# H head width  F FFN width  V vocabulary

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modularforge.config import ModelConfig, RopeScalingConfig
from modularforge.model.head import Reduction, head_loss
from modularforge.model.own_rows import OwnRows
from modularforge.model.sizes import AdapterCounts
from modularforge.model.text_router import TextRouter, TextState

INITIAL_STD = 0.02  # GPT-2's, section 2.3


class RMSNorm(nn.Module):
    """Divide by the root mean square and scale by a gain (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalise over the last axis; the mean square is taken in float32 whatever the input's type."""
        return F.rms_norm(x_BTD, self.weight.shape, self.weight.to(x_BTD.dtype), self.epsilon)


class Cache(Protocol):
    """What attention asks of keys and values that are kept."""

    def extend(self, layer: int, key_BKTH: Tensor, value_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values of a layer, and return all that is to be seen."""


class KeyValueCache:
    """Keys and values of the tokens already read, for generation: one entry per layer, with room for those to come."""

    def __init__(self, text: TextState | None = None, room: int = 0) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # of which only the first tokens are read
        self.lengths: dict[int, int] = {}
        self.room = room  # tokens that will be read, where that is known
        self.examples_BS: Tensor | None = None  # of which example each token is, where that was told
        self.text = text  # what a text router knows of the tokens before, those that left the context included

    @property
    def length(self) -> int:
        """Tokens already read."""
        return self.lengths.get(0, 0)

    def extend(self, layer: int, key_BKTH: Tensor, value_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values of a layer and return all of them, as views that later calls do not change."""
        start = self.lengths.get(layer, 0)
        end = start + key_BKTH.shape[2]
        old = self.layers.get(layer)
        if old is None or end > old[0].shape[2]:
            held = [part[:, :, :start] for part in old] if old else [None, None]
            room = max(end, self.room, 2 * start)
            key, value = (_with_room(*pair, room) for pair in zip((key_BKTH, value_BKTH), held, strict=True))
            self.layers[layer] = key, value
        stored = self.layers[layer]
        for store, new in zip(stored, (key_BKTH, value_BKTH), strict=True):
            store[:, :, start:end] = new
        self.lengths[layer] = end
        return stored[0][:, :, :end], stored[1][:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Forget all rows of the batch but these."""
        self.layers = {layer: (key[rows], value[rows]) for layer, (key, value) in self.layers.items()}
        self.examples_BS = None if self.examples_BS is None else self.examples_BS[rows]
        self.text = None if self.text is None else self.text.only(rows)


class FixedCache:
    """A full room of keys and values whose every step has the same shapes and places, as a CUDA graph needs: one token
    of each row is written where tensors say, and sees what a mask over all of the room lets it see.

    Its length is a tensor and its rows stay as they are: it is no `KeyValueCache`, whose room grows and forgets rows.
    """

    def __init__(self, filled: KeyValueCache) -> None:
        """Take the room of a cache that has read the prompts, with their examples told, and can hold all to come."""
        assert filled.examples_BS is not None
        assert filled.text is None  # a text router would go on with it
        self.layers, self.room = filled.layers, filled.room
        is_text_BS = filled.examples_BS >= 0
        for store in itertools.chain(*self.layers.values()):
            store[:, :, filled.length :] = 0  # read behind a mask, where 0 times what memory holds may be NaN
        self.place_1 = torch.tensor([filled.length], device=is_text_BS.device)
        self.position_B1 = is_text_BS.sum(dim=1, keepdim=True)
        self.seen_BS = F.pad(is_text_BS, (0, filled.room - filled.length))
        self.seen_BS.index_fill_(1, self.place_1, True)

    def extend(self, layer: int, key_BKTH: Tensor, value_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Write a token of each row; again with the same one, nothing changes. Returns all of the room."""
        stored = self.layers[layer]
        for store, new in zip(stored, (key_BKTH, value_BKTH), strict=True):
            store.index_copy_(2, self.place_1, new)
        return stored

    def advance(self) -> None:
        """Go on to the next token, in place."""
        self.place_1 += 1
        self.position_B1 += 1
        self.seen_BS.index_fill_(1, self.place_1.clamp(max=self.room - 1), True)


def _with_room(like_BKTH: Tensor, held_BKTH: Tensor | None, room: int) -> Tensor:
    """An array for so many tokens that begins with those that are held."""
    B, K, _, H = like_BKTH.shape
    store = like_BKTH.new_empty(B, K, room, H)
    if held_BKTH is not None:
        store[:, :, : held_BKTH.shape[2]] = held_BKTH
    return store


def rotate(x_BNTH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Turn each pair (i, i + H/2) of a head by its position's angle."""
    left, right = x_BNTH.chunk(2, dim=-1)
    turned = torch.cat([-right, left], dim=-1)
    return (x_BNTH * cos_TH + turned * sin_TH).to(x_BNTH.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, model: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.layer = model.heads, model.kv_heads, layer
        self.head_width = model.width_per_head
        self.q_proj = nn.Linear(model.width, model.heads * self.head_width, bias=False)
        self.k_proj = nn.Linear(model.width, model.kv_heads * self.head_width, bias=False)
        self.v_proj = nn.Linear(model.width, model.kv_heads * self.head_width, bias=False)
        self.o_proj = nn.Linear(model.heads * self.head_width, model.width, bias=False)
        normalises = model.family == "qwen3"
        self.q_norm = RMSNorm(self.head_width, model.norm_epsilon) if normalises else nn.Identity()
        self.k_norm = RMSNorm(self.head_width, model.norm_epsilon) if normalises else nn.Identity()

    def forward(
        self, x_BTD: Tensor, cos_TH: Tensor, sin_TH: Tensor, cache: Cache | None, mask: Tensor | None = None
    ) -> Tensor:
        """Mix each position with those before it; `cos`/`sin` are of the T new positions.

        `mask` [B, 1, T, S] says what each sees where that is not all that came before.
        """
        B, T, _ = x_BTD.shape
        query = self.q_norm(self.q_proj(x_BTD).view(B, T, self.heads, self.head_width)).transpose(1, 2)
        key = self.k_norm(self.k_proj(x_BTD).view(B, T, self.kv_heads, self.head_width)).transpose(1, 2)
        value = self.v_proj(x_BTD).view(B, T, self.kv_heads, self.head_width).transpose(1, 2)
        query, key = rotate(query, cos_TH, sin_TH), rotate(key, cos_TH, sin_TH)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
            # None where no mask is needed, with which a GPU has faster kernels.
            if mask is None and 1 < T < key.shape[2]:
                mask = _causal(T, key.shape[2], key.device)
        mixed_BNTH = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None and T > 1, enable_gqa=self.heads != self.kv_heads
        )
        output_BTD: Tensor = self.o_proj(mixed_BNTH.transpose(1, 2).reshape(B, T, self.heads * self.head_width))
        return output_BTD


class FeedForward(nn.Module):
    """SwiGLU block of the backbone: the public FFN (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, ffn_width, bias=False)
        self.up_proj = nn.Linear(width, ffn_width, bias=False)
        self.down_proj = nn.Linear(ffn_width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map each position on its own."""
        output_BTD: Tensor = self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return output_BTD


class Block(nn.Module):
    """One transformer layer; the feed-forward block sits under the name its kind has in Hugging Face."""

    def __init__(self, model: ModelConfig, layer: int, ffn_name: str, ffn: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(model.width, model.norm_epsilon)
        self.self_attn = Attention(model, layer)
        self.post_attention_layernorm = RMSNorm(model.width, model.norm_epsilon)
        self.add_module(ffn_name, ffn)
        self.ffn_name = ffn_name

    @property
    def ffn(self) -> nn.Module:
        """The feed-forward block, whatever its name."""
        return self.get_submodule(self.ffn_name)

    def route_by(self, logits_BTE: Tensor | None) -> None:
        """Where the block has experts, let it route by these logits; None gives it its own rows back."""
        if hasattr(self.ffn, "given_NE"):
            given: Any = None if logits_BTE is None else logits_BTE.flatten(0, 1).float()
            self.ffn.given_NE = given

    def forward(
        self, x_BTD: Tensor, cos_TH: Tensor, sin_TH: Tensor, cache: Cache | None, mask: Tensor | None = None
    ) -> Tensor:
        """Residual stream in, residual stream out."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TH, sin_TH, cache, mask)
        mixed: Tensor = x_BTD + self.ffn(self.post_attention_layernorm(x_BTD))
        return mixed


class Trunk(nn.Module):
    """Embeddings, layers and the final norm: what Hugging Face calls ``model``."""

    def __init__(self, model: ModelConfig, vocab_size: int, ffn_name: str, make_ffn: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, model.width)
        self.layers = nn.ModuleList(Block(model, layer, ffn_name, make_ffn()) for layer in range(model.layers))
        self.norm = RMSNorm(model.width, model.norm_epsilon)


@dataclass(frozen=True)
class Layout:
    """Which tokens of a row see each other, and where each stands in its own example."""

    positions_BT: Tensor
    mask_B1TS: Tensor

    @staticmethod
    def of(examples_BT: Tensor, cache: KeyValueCache | None = None) -> Layout:
        """From the example's number of every token, behind those that a cache holds; neighbours with one number are
        one example.
        """
        if cache is None or cache.examples_BS is None:
            examples_BS = examples_BT
        else:
            examples_BS = torch.cat([cache.examples_BS, examples_BT], dim=1)
        if cache is not None:
            cache.examples_BS = examples_BS
        T, S = examples_BT.shape[1], examples_BS.shape[1]
        places_S = torch.arange(S, device=examples_BS.device)
        is_first_BS = F.pad(examples_BS[:, 1:] != examples_BS[:, :-1], (1, 0), value=True)
        first_BS = (places_S * is_first_BS).cummax(dim=1).values
        same_BTS = first_BS[:, S - T :, None] == first_BS[:, None, :]
        return Layout((places_S - first_BS)[:, S - T :], (same_BTS & _causal(T, S, places_S.device))[:, None])


def _causal(new: int, all_tokens: int, device: torch.device) -> Tensor:
    """Which of all tokens [T, S] the newest ones may see."""
    return torch.ones(new, all_tokens, dtype=torch.bool, device=device).tril(all_tokens - new)


class Decoder(nn.Module):
    """A language model: token ids in, logits out. Build it with `build_backbone` or moe.py's `build_moe`."""

    def __init__(self, config: ModelConfig, vocab_size: int, ffn_name: str, make_ffn: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.model = Trunk(config, vocab_size, ffn_name, make_ffn)
        self.lm_head = nn.Linear(config.width, vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.text_router: TextRouter | None = None
        self.own_rows: OwnRows | None = None  # of experts that have embeddings and a head of their own
        self.adapters: AdapterCounts | None = None  # where there are some beside its matrices
        self.holds_choice = False  # whether a text router chooses among them once for a sequence
        self.has_half_blocks = False  # their weights are there in bf16 alone, as pieces can be gathered
        self.has_float_stream = False  # the residual stream is float32, whatever the embedding is stored in
        self.recomputes = False  # blocks keep only their inputs for the backward pass, and are computed again there
        self.restore_positions()

    def restore_positions(self) -> None:
        """Compute the rotary frequencies anew: they are not saved, and a model built on the meta device lacks them."""
        frequencies_H2, self.angle_scale = rotary_frequencies(self.config)
        self.register_buffer("frequencies", frequencies_H2.to(self.lm_head.weight.device), persistent=False)

    @property
    def blocks(self) -> list[Block]:
        """The layers, in order."""
        return [layer for layer in self.model.layers if isinstance(layer, Block)]

    def forward(
        self,
        tokens_BT: Tensor,
        cache: KeyValueCache | None = None,
        routing_BTE: Tensor | None = None,
        examples_BT: Tensor | None = None,
        targets_BT: Tensor | None = None,
        reduction: Reduction = "mean",
        headless: bool = False,
    ) -> Tensor:
        """Logits [B, T, V] of the next token at every position; with a cache, T new tokens after those it holds.

        With `targets_BT` the loss of these instead, as `head_loss` has it, which needs no memory for all logits; and
        `headless` what the head reads, [B, T, D].
        """
        with self._in_half():
            x_BTD = self.hidden(tokens_BT, cache, routing_BTE, examples_BT)
            if headless:
                return x_BTD
            if self.own_rows is not None and targets_BT is not None:
                return self.own_rows.loss(x_BTD, self.lm_head.weight, targets_BT, reduction)
            if self.own_rows is not None:
                return self.own_rows.logits(x_BTD, self.lm_head.weight)
            if targets_BT is not None:
                return head_loss(x_BTD, self.lm_head.weight, targets_BT, reduction)
            logits_BTV: Tensor = self.lm_head(x_BTD)
            return logits_BTV

    def next_logits(self, tokens_BT: Tensor, cache: KeyValueCache, examples_BT: Tensor | None = None) -> Tensor:
        """Logits [B, V] of the token behind the last one alone, for generation."""
        x_B1D = self.hidden(tokens_BT, cache, examples_BT=examples_BT)[:, -1:]
        if self.own_rows is not None:
            return self.own_rows.logits(x_B1D, self.lm_head.weight)[:, -1]
        logits_BV: Tensor = self.lm_head(x_B1D)[:, -1]
        return logits_BV

    @property
    def goes_one_way(self) -> bool:
        """Whether every token passes the same matrices: there are no experts, and nothing routes."""
        is_plain = all(isinstance(block.ffn, FeedForward) for block in self.blocks)
        return is_plain and self.text_router is None and self.own_rows is None

    def fixed_logits(self, token_B1: Tensor, cache: FixedCache) -> Tensor:
        """Logits [B, V] behind one more token of each row, without a branch or a shape that follows from a tensor.

        Only of a model that `goes_one_way`: tokens of a mixture visit experts in groups of any size.
        """
        cos, sin = rotary_angles(self.get_buffer("frequencies"), cache.position_B1, self.angle_scale)
        x_B1D = self.model.embed_tokens(token_B1)
        x_B1D = x_B1D.float() if self.has_float_stream else x_B1D
        for block in self.blocks:
            x_B1D = block(x_B1D, cos, sin, cache, cache.seen_BS[:, None, None])
        logits_BV: Tensor = self.lm_head(self.model.norm(x_B1D))[:, -1]
        return logits_BV

    def _in_half(self) -> AbstractContextManager[object]:
        """Autocast where blocks need it and nobody has asked for it, as where a model is measured on a CPU."""
        device = self.lm_head.weight.device.type
        if self.has_half_blocks and not torch.is_autocast_enabled(device):
            return torch.autocast(device, torch.bfloat16)
        return nullcontext()

    def hidden(
        self,
        tokens_BT: Tensor,
        cache: KeyValueCache | None = None,
        routing_BTE: Tensor | None = None,
        examples_BT: Tensor | None = None,
    ) -> Tensor:
        """What the head reads, [B, T, D].

        Layers with experts route by `routing_BTE`, else by what the text router makes of the ids, else by their rows.
        `examples_BT` numbers the examples of a row: each is read as if it stood alone.
        """
        layout = None if examples_BT is None else Layout.of(examples_BT, cache)
        if routing_BTE is None and self.text_router is not None:
            starts_BT = None if layout is None else layout.positions_BT == 0
            routing_BTE, text = self.text_router(tokens_BT, cache.text if cache is not None else None, starts_BT)
            if cache is not None:
                cache.text = text
        start = cache.length if cache is not None else 0
        positions = range(start, start + tokens_BT.shape[1]) if layout is None else layout.positions_BT
        mask = None if layout is None else layout.mask_B1TS
        cos_TH, sin_TH = rotary_angles(self.get_buffer("frequencies"), positions, self.angle_scale)
        x_BTD = self.model.embed_tokens(tokens_BT)
        x_BTD = x_BTD.float() if self.has_float_stream else x_BTD
        if self.own_rows is not None:
            assert routing_BTE is not None
            weights_of: Callable[[Tensor], Tensor] = self.blocks[0].ffn.weights_of  # type: ignore[assignment]
            x_BTD = self.own_rows.embedded(x_BTD, tokens_BT, weights_of(routing_BTE.flatten(0, 1).float()))
        again = self.recomputes and torch.is_grad_enabled() and cache is None
        for block in self.blocks:
            inputs = block, x_BTD, cos_TH, sin_TH, cache, mask, routing_BTE
            x_BTD = checkpoint(_routed, *inputs, use_reentrant=False) if again else _routed(*inputs)
        normed_BTD: Tensor = self.model.norm(x_BTD)
        return normed_BTD


def _routed(
    block: Block,
    x_BTD: Tensor,
    cos_TH: Tensor,
    sin_TH: Tensor,
    cache: KeyValueCache | None,
    mask: Tensor | None,
    routing_BTE: Tensor | None,
) -> Tensor:
    """A block's output, routed by these logits of its tokens, which it forgets at once."""
    block.route_by(routing_BTE)
    output_BTD: Tensor = block(x_BTD, cos_TH, sin_TH, cache, mask)
    block.route_by(None)
    return output_BTD


def build_backbone(config: ModelConfig, vocab_size: int) -> Decoder:
    """A backbone with random weights drawn from torch's global generator (seed it first)."""
    decoder = shaped_backbone(config, vocab_size)
    initialise(decoder, config.layers)
    return decoder


def shaped_backbone(config: ModelConfig, vocab_size: int) -> Decoder:
    """The same as torch makes it, before its weights are drawn."""
    return Decoder(config, vocab_size, "mlp", lambda: FeedForward(config.width, config.ffn_width))


def initialise(module: nn.Module, layers: int) -> None:
    """Normal weights; projections into the residual stream are scaled by 1/sqrt(2 layers) (GPT-2, section 2.3)."""
    for name, weight in module.named_parameters():
        draw(weight, name, layers)


def draw(weight: Tensor, name: str, layers: int) -> Tensor:
    """Draw one weight by its name in the model, in place; gains of norms are left as they are."""
    if weight.dim() == 2:
        into_stream = name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight"))
        nn.init.normal_(weight, std=INITIAL_STD / math.sqrt(2 * layers) if into_stream else INITIAL_STD)
    return weight


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean loss in nats over the targets that are not -100, in float32."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=-100)


def perplexity(loss: float) -> float:
    """exp(loss), inf where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def rotary_frequencies(model: ModelConfig) -> tuple[Tensor, float]:
    """Angle per position [H/2] in float32 (arXiv 2104.09864), and the factor of cosines and sines (1 but for YaRN)."""
    width, scaling = model.width_per_head, model.rope_scaling
    # Written as transformers does: at position 100,000 the last bit of a frequency is a hundredth of a turn.
    plain = 1.0 / model.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
    if scaling is None:
        return plain, 1.0
    original = scaling.original_max_position_embeddings or model.positions
    if scaling.rope_type == "linear":
        return plain / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(plain, scaling, original), 1.0
    return _yarn(plain, scaling, original, model.rope_theta), _yarn_attention_factor(scaling)


def rotary_angles(frequencies: Tensor, positions: range | Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions, in Llama's half-split layout, times `scale`.

    [T, H] of consecutive ones, or [B, 1, T, H] of those in a tensor [B, T].
    """
    if isinstance(positions, Tensor):
        angles = positions[:, None, :, None].float() * frequencies
        angles_B1TH = torch.cat([angles, angles], dim=-1)
        return angles_B1TH.cos() * scale, angles_B1TH.sin() * scale
    steps_T = torch.arange(positions.start, positions.stop, dtype=torch.float32, device=frequencies.device)
    angles = torch.outer(steps_T, frequencies)
    angles_TH = torch.cat([angles, angles], dim=-1)
    return angles_TH.cos() * scale, angles_TH.sin() * scale


def _llama3(plain: Tensor, scaling: RopeScalingConfig, original: int) -> Tensor:
    """Long waves stretched, short ones kept, those in between blended (Llama 3.1)."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert low is not None
    assert high is not None
    waves = 2 * math.pi / plain
    kept = (original / waves - low) / (high - low)
    blended = (1 - kept) * plain / scaling.factor + kept * plain
    return torch.where(
        waves > original / low, plain / scaling.factor, torch.where(waves < original / high, plain, blended)
    )


def _yarn(plain: Tensor, scaling: RopeScalingConfig, original: int, theta: float) -> Tensor:
    """Fast frequencies kept, slow ones stretched, with a linear ramp between (YaRN, arXiv 2309.00071, section 3.2)."""
    width = 2 * len(plain)

    def dimension(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast or 32), dimension(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low or 0.001  # as transformers does, against a division by zero
    stretched = ((torch.arange(len(plain), dtype=torch.float32, device="cpu") - low) / span).clamp(0, 1)
    return plain / scaling.factor * stretched + plain * (1 - stretched)


def _yarn_attention_factor(scaling: RopeScalingConfig) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1.0 if scaling.factor <= 1 else 0.1 * math.log(scaling.factor) + 1.0
