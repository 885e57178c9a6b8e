"""The evidence router: which partition the text so far comes from, carried inside an ordinary mixture-of-experts model.

The evidence of a token for an expert is log p(token | its partition) less the mean over the experts, from token counts
alone (naive Bayes over unigrams). A router that sees one token's evidence is poor; one that sees the mean over the
whole text so far is the best we know (docs/method.md). The model needs no new code for it:

- the residual stream gets a few more channels, one per expert, which every matrix of the backbone and of the experts
  leaves alone (zeros);
- the embedding puts each token's evidence into them, at a scale so small that no norm notices;
- the first layer gets one more group of attention heads with zero queries and keys. Its weights are uniform, so its
  output is the mean of the evidence over the text so far, and it is written into the same channels, much larger;
- the rows of every layer's router read those channels.

Widening changes the norms' mean square by the factor D / (D + C); gains and epsilon make up for it.
"""

# V vocabulary  E experts  D width  C channels  H head width

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from checkpoints.hashing import describe_file
from modularforge.assembly.plan import OutputTensor, TensorSpan, read_header
from modularforge.assembly.routing import Array, RouterStatistics
from modularforge.assembly.tensor_values import rms_of_rows, values_of
from modularforge.config import ModelConfig
from modularforge.model import names

CHANNEL_STEP = 16  # channels come in such groups, so that an expert can join without widening the others
SMOOTHING_TOKENS = 1000.0  # each partition's counts are mixed with so many tokens of the mean of all
AMPLITUDE = 2.0**-7  # of the averaged evidence, relative to the root mean square of the residual stream
TOKEN_SHARE = 2.0**-6  # of that, what a single token's evidence has

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Widening:
    """How much a model grows: `channels` of the residual stream and `groups` of attention heads (one kv head each)."""

    model: ModelConfig
    experts: int

    @property
    def channels(self) -> int:
        """Channels C, a multiple of CHANNEL_STEP."""
        return -(-self.experts // CHANNEL_STEP) * CHANNEL_STEP

    @property
    def groups(self) -> int:
        """Further key-value heads: each carries as many experts as a head is wide."""
        return -(-self.experts // self.model.width_per_head)

    @property
    def scale(self) -> float:
        """What the gains are multiplied by, because the mean square is taken over C more channels that hold nothing."""
        return math.sqrt(self.model.width / (self.model.width + self.channels))

    @property
    def widened(self) -> ModelConfig:
        """Shape of the model that results."""
        per_group = self.model.heads // self.model.kv_heads
        return self.model.model_copy(
            update={
                "width": self.model.width + self.channels,
                "heads": self.model.heads + self.groups * per_group,
                "kv_heads": self.model.kv_heads + self.groups,
                "head_width": self.model.width_per_head,
                "norm_epsilon": self.model.norm_epsilon * self.scale**2,
            }
        )


def token_evidence(counts: Iterable[Array]) -> Array:
    """Evidence [V, E] from how often each token occurs in each partition: log p(token | partition) less the mean."""
    counts_EV = np.stack(list(counts))
    mixture_V = counts_EV.sum(axis=0) + 1.0
    mixture_V /= mixture_V.sum()
    counts_EV += SMOOTHING_TOKENS * mixture_V
    counts_EV /= counts_EV.sum(axis=1, keepdims=True)
    evidence_EV: Array = np.log(counts_EV, out=counts_EV)
    evidence_EV -= evidence_EV.mean(axis=0)
    evidence_VE: Array = evidence_EV.T
    return evidence_VE


def amplitude(statistics: Sequence[RouterStatistics]) -> float:
    """Size of a unit of averaged evidence in the residual stream: AMPLITUDE of its rms where that is smallest."""
    return AMPLITUDE / float(_inverse_rms(statistics).max())


def router_rows(widening: Widening, statistics: Sequence[RouterStatistics], temperature: float, public: bool) -> Array:
    """Rows [L, R, D + C] that read the evidence and divide it by the temperature; the public expert's row is zero."""
    inverse_L, width = _inverse_rms(statistics), widening.model.width
    rows_LRW = np.zeros((len(inverse_L), widening.experts + int(public), width + widening.channels))
    for layer, inverse in enumerate(inverse_L):
        for expert in range(widening.experts):
            unit = amplitude(statistics) * inverse  # of evidence, behind the norm before the router
            rows_LRW[layer, expert + int(public), width + expert] = 1.0 / (temperature * unit)
    return rows_LRW


def widen(
    tensors: Mapping[str, OutputTensor],
    widening: Widening,
    statistics: Sequence[RouterStatistics],
    scratch: Path,
) -> dict[str, OutputTensor]:
    """The model's tensors (all but the routers) widened; the few new values are written to a file in `scratch`."""
    model, channels, unit = widening.model, widening.channels, amplitude(statistics)
    evidence_VE = token_evidence(item.tokens_V for item in statistics)
    new = {
        names.EMBEDDING: _embedding_columns(tensors[names.EMBEDDING].span, evidence_VE, channels, model, unit),
        names.value_projection(0): _value_rows(widening),
        names.output_projection(0): _output_rows(widening),
    }
    for name, tensor in tensors.items():
        if names.is_stream_norm(name):
            new[name] = _gains(values_of(tensor.span), widening, is_final=name == names.FINAL_NORM)
    path = scratch / "evidence.safetensors"
    save_file({name: np.ascontiguousarray(values, dtype=np.float32) for name, values in new.items()}, path)
    spans = read_header(str(path), describe_file(path).tensors)
    return {name: _grown(name, tensor, widening, spans) for name, tensor in tensors.items()}


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


def _embedding_columns(span: TensorSpan, evidence_VE: Array, channels: int, model: ModelConfig, unit: float) -> Values:
    """Columns [V, C] that the first norm turns into each token's evidence, whatever the length of its embedding.

    A vocabulary may be padded with entries that no token has; they get no evidence.
    """
    columns_VC = np.zeros((span.shape[0], channels), np.float32)
    rms_V = rms_of_rows(span, model.norm_epsilon)
    tokens, experts = evidence_VE.shape
    columns_VC[:tokens, :experts] = unit * TOKEN_SHARE * evidence_VE * rms_V[:tokens, None]
    return columns_VC


def _value_rows(widening: Widening) -> Values:
    """Rows [groups * H, D + C] of the first layer's value projection: expert e's evidence is value e."""
    model = widening.model
    rows = np.zeros((widening.groups * model.width_per_head, model.width + widening.channels), np.float32)
    for expert in range(widening.experts):
        rows[expert, model.width + expert] = 1.0
    return rows


def _output_rows(widening: Widening) -> Values:
    """Rows [C, heads * H] of the first layer's output projection: the averaged evidence, much larger, to its channel.

    A group has several query heads with the same output; the first one is read.
    """
    model, after = widening.model, widening.widened
    per_group, width = model.heads // model.kv_heads, model.width_per_head
    rows = np.zeros((widening.channels, after.heads * width), np.float32)
    for expert in range(widening.experts):
        group, place = divmod(expert, width)
        rows[expert, (model.heads + group * per_group) * width + place] = 1.0 / TOKEN_SHARE
    return rows


def _gains(gains_D: Values, widening: Widening, is_final: bool) -> Values:
    """Gains [D + C]; the last norm hides the channels from the head."""
    new = np.full(widening.channels, 0.0 if is_final else widening.scale)
    return np.concatenate([gains_D * widening.scale, new]).astype(np.float32)


def _inverse_rms(statistics: Sequence[RouterStatistics]) -> Array:
    """Mean of one over the rms of the residual stream before each layer's router, [L]."""
    inverse_L: Array = np.mean([item.inverse_rms_L for item in statistics], axis=0)
    return inverse_L
