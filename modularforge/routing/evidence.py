"""The evidence router: which partition the text so far comes from, carried inside an ordinary mixture-of-experts model.

The evidence of a token for an expert is log p(token | its partition) less the same of the background, from token counts
alone (naive Bayes over unigrams; text_evidence.py). A router that sees one token's evidence is poor; one that sees a
mean over the text so far follows the text, if recent tokens weigh more (docs/method.md). The model needs no new code:

- the residual stream gets a few more channels, one per expert and two constant ones, which every matrix of the backbone
  and of the experts leaves alone (zeros);
- the embedding puts each token's evidence, and a constant, into them, so small that no norm notices;
- the first layer gets more attention heads, whose values are the evidence. One has zero queries: its weights are
  uniform, so it gives the mean over the whole text. One has constant queries and keys on rotary pairs, so that a token
  D back weighs exp(A cos(angle D)): the mean over the last few dozen. Both are written into the channels, much larger;
- the rows of every layer's router read those channels. The public expert's reads a constant: it is chosen where nobody
  has evidence.

Widening changes the norms' mean square by the factor D / (D + C); gains and epsilon make up for it.
"""

# V vocabulary  E experts  D width  C channels  H head width

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from checkpoints.hashing import describe_file
from checkpoints.safetensors import TensorSpan, read_spans
from modularforge.assembly.plan import OutputTensor
from modularforge.assembly.values import rms_of_rows, values_of
from modularforge.config import ModelConfig
from modularforge.model import names
from modularforge.routing.kernel import HeadNorms, kernel_head
from modularforge.routing.statistics import Array, RouterStatistics
from modularforge.routing.text_evidence import TIE

CHANNEL_STEP = 16  # channels come in such groups, so that an expert can join without widening the others
AMPLITUDE = 2.0**-7  # of the averaged evidence, relative to the root mean square of the residual stream
TOKEN_SHARE = 2.0**-6  # of that, what a single token's evidence has
CONSTANT = 2.0**-10  # of the embedding's rms: what queries and keys of the recent mean are made from
LONG_SHARE = 0.25  # of the mean over the whole text in what routers read; the rest is the mean over recent tokens

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Widening:
    """How much a model grows: `channels` of the residual stream and `groups` of attention heads (one kv head each).

    Width and number of key-value heads become multiples of `width_multiple` and `head_multiple`, as servers want them.
    """

    model: ModelConfig
    experts: int
    width_multiple: int = 1
    head_multiple: int = 1

    @property
    def channels(self) -> int:
        """Channels C: one per expert and two constant ones, in steps of CHANNEL_STEP, or more for the width."""
        least = -(-(self.experts + 2) // CHANNEL_STEP) * CHANNEL_STEP
        return least + -(self.model.width + least) % self.width_multiple

    @property
    def per_group(self) -> int:
        """Query heads of each key-value head."""
        return self.model.heads // self.model.kv_heads

    @property
    def heads_per_mean(self) -> int:
        """Key-value heads that one mean over all values takes: each carries as many as a head is wide."""
        return -(-(self.experts + 1) // self.model.width_per_head)

    @property
    def groups(self) -> int:
        """Further key-value heads; where a group has one query head, the two means cannot share it."""
        least = self.heads_per_mean * (2 if self.per_group == 1 else 1)
        return least + -(self.model.kv_heads + least) % self.head_multiple

    def head(self, value: int, is_long: bool) -> tuple[int, int]:
        """Where a value is: the query head, counted from the first new one, whose mean it is, and its place there."""
        head, place = divmod(value, self.model.width_per_head)
        if self.per_group == 1:
            return head + self.heads_per_mean * int(is_long), place
        return head * self.per_group + int(is_long), place

    @property
    def scale(self) -> float:
        """What the gains are multiplied by, because the mean square is taken over C more channels that hold nothing."""
        return math.sqrt(self.model.width / (self.model.width + self.channels))

    @property
    def widened(self) -> ModelConfig:
        """Shape of the model that results."""
        return self.model.model_copy(
            update={
                "width": self.model.width + self.channels,
                "heads": self.model.heads + self.groups * self.per_group,
                "kv_heads": self.model.kv_heads + self.groups,
                "head_width": self.model.width_per_head,
                "norm_epsilon": self.model.norm_epsilon * self.scale**2,
            }
        )


def amplitude(statistics: Sequence[RouterStatistics]) -> float:
    """Size of a unit of averaged evidence in the residual stream: AMPLITUDE of its rms where that is smallest."""
    return AMPLITUDE / float(_inverse_rms(statistics).max())


def router_rows(
    widening: Widening, statistics: Sequence[RouterStatistics], prior_E: Array, temperature: float, public: bool
) -> Array:
    """Rows [L, R, D + C] that read the evidence and divide it by the temperature; the public expert's reads a constant.

    Where nothing speaks for anyone, the public expert comes first and then the experts by their prior.
    """
    inverse_L, width, experts = _inverse_rms(statistics), widening.model.width, widening.experts
    rows_LRW = np.zeros((len(inverse_L), experts + int(public), width + widening.channels))
    for layer, inverse in enumerate(inverse_L):
        unit = amplitude(statistics) * inverse  # of evidence, behind the norm before the router
        for expert in range(experts):
            rows_LRW[layer, expert + int(public), width + expert] = 1.0 / (temperature * unit)
        ties_R = np.concatenate([[1.0] if public else [], prior_E])
        rows_LRW[layer, :, width + experts + 1] = TIE * ties_R / (temperature * unit)
    return rows_LRW


def widen(
    tensors: Mapping[str, OutputTensor],
    widening: Widening,
    statistics: Sequence[RouterStatistics],
    token_VE: Array,
    scratch: Path,
) -> dict[str, OutputTensor]:
    """The model's tensors (all but the routers) widened; the few new values are written to a file in `scratch`."""
    model, unit = widening.model, amplitude(statistics)
    norms = HeadNorms(*(_head_gains(tensors, part) for part in ("q_norm", "k_norm")))
    query_H, key_H = kernel_head(model, norms)
    new = {
        names.EMBEDDING: _embedding_columns(tensors[names.EMBEDDING].span, token_VE, widening, unit),
        names.attention(0, "q_proj"): _constant_rows(widening, query_H, is_query=True),
        names.attention(0, "k_proj"): _constant_rows(widening, key_H, is_query=False),
        names.attention(0, "v_proj"): _value_rows(widening),
        names.attention(0, "o_proj"): _output_rows(widening, unit),
    }
    for name, tensor in tensors.items():
        if names.is_stream_norm(name):
            new[name] = _gains(values_of(tensor.span), widening, is_final=name == names.FINAL_NORM)
    path = scratch / "evidence.safetensors"
    save_file({name: np.ascontiguousarray(values, dtype=np.float32) for name, values in new.items()}, path)
    spans = read_spans(str(path), describe_file(path).tensors)
    return {name: _grown(name, tensor, widening, spans) for name, tensor in tensors.items()}


def _head_gains(tensors: Mapping[str, OutputTensor], part: str) -> Values | None:
    """Gains of the norm over a head's queries or keys in the first layer, where the model has such norms."""
    name = names.attention(0, part)
    return values_of(tensors[name].span) if name in tensors else None


def _grown(name: str, tensor: OutputTensor, widening: Widening, spans: Mapping[str, TensorSpan]) -> OutputTensor:
    channels, model = widening.channels, widening.model
    keys = widening.groups * model.width_per_head
    queries = keys * (model.heads // model.kv_heads)
    part = names.attention_part(name)
    if names.is_stream_norm(name):
        return OutputTensor(spans[name], tensor.dtype)
    if name == names.EMBEDDING:
        return replace(tensor, columns=channels, beside=spans[name])
    if part in ("q_proj", "k_proj", "v_proj"):
        return replace(
            tensor, columns=channels, rows=queries if part == "q_proj" else keys, below=spans.get(name)
        )  # of all layers, only the first has values below
    if part == "o_proj":
        return replace(tensor, columns=queries, rows=channels, below=spans.get(name))
    position = names.expert_position(name)
    if position and position[2] == "w2":
        return replace(tensor, rows=channels)
    if position or name == names.HEAD:
        return replace(tensor, columns=channels)
    return tensor  # norms of queries and keys


def _embedding_columns(span: TensorSpan, token_VE: Array, widening: Widening, unit: float) -> Values:
    """Columns [V, C] that the first norm turns into each token's evidence, whatever the length of its embedding.

    A vocabulary may be padded with entries that no token has; they get no evidence.
    """
    columns_VC = np.zeros((span.shape[0], widening.channels), np.float32)
    rms_V = rms_of_rows(span, widening.model.norm_epsilon)
    tokens, experts = min(len(token_VE), span.shape[0]), widening.experts
    columns_VC[:tokens, :experts] = unit * TOKEN_SHARE * token_VE[:tokens] * rms_V[:tokens, None]
    columns_VC[:, experts] = CONSTANT * rms_V
    return columns_VC


def _constant_rows(widening: Widening, head_H: Values, is_query: bool) -> Values:
    """Rows [heads * H, D + C] of the first layer's queries or keys: `head_H` wherever the text is; zero for long means.

    Where a group has one query head, those of the long means are further heads, whose keys do not matter.
    """
    model = widening.model
    heads = widening.groups * (widening.per_group if is_query else 1)
    rows = np.zeros((heads * model.width_per_head, model.width + widening.channels), np.float32)
    for value in range(0, widening.experts + 1, model.width_per_head):
        head = widening.head(value, is_long=False)[0]
        start = (head if is_query else head // widening.per_group) * model.width_per_head
        rows[start : start + model.width_per_head, model.width + widening.experts] = head_H / CONSTANT
    return rows


def _value_rows(widening: Widening) -> Values:
    """Rows [groups * H, D + C] of the first layer's values: expert e's evidence is value e, a constant last."""
    model, width = widening.model, widening.model.width_per_head
    rows = np.zeros((widening.groups * width, model.width + widening.channels), np.float32)
    for value in range(widening.experts + 1):
        for is_long in (False, True):
            head, place = widening.head(value, is_long)
            rows[head // widening.per_group * width + place, model.width + value] = 1.0
    return rows


def _output_rows(widening: Widening, unit: float) -> Values:
    """Rows [C, heads * H] of the first layer's output projection: the averaged evidence, much larger, to its channel.

    The average of the constant goes to a channel of its own, since the embedding's differs from token to token.
    """
    model, after, width = widening.model, widening.widened, widening.model.width_per_head
    rows = np.zeros((widening.channels, after.heads * width), np.float32)
    for value in range(widening.experts + 1):
        is_constant = value == widening.experts
        for is_long, share in ((False, 1.0 - LONG_SHARE), (True, LONG_SHARE)):
            head, place = widening.head(value, is_long)
            scale = unit / CONSTANT if is_constant else 1.0 / TOKEN_SHARE
            rows[value + int(is_constant), (model.heads + head) * width + place] = share * scale
    return rows


def _gains(gains_D: Values, widening: Widening, is_final: bool) -> Values:
    """Gains [D + C]; the last norm hides the channels from the head."""
    new = np.full(widening.channels, 0.0 if is_final else widening.scale)
    return np.concatenate([gains_D * widening.scale, new]).astype(np.float32)


def _inverse_rms(statistics: Sequence[RouterStatistics]) -> Array:
    """Mean of one over the rms of the residual stream before each layer's router, [L]."""
    inverse_L: Array = np.mean([item.inverse_rms_L for item in statistics], axis=0)
    return inverse_L
