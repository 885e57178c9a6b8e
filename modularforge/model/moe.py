"""Router and experts in place of the feed-forward block, with the names, shapes and arithmetic of Mixtral or Qwen3-MoE.

Two routers share one layer: `Router` holds a row per expert (the assembled model), `AnchoredRouter` one trained row
beside a public row fixed at zero (an expert's own training). Both give logits; the layer renormalises the top k.
"""

# N tokens  V visits, N · A  D width  F FFN width  E experts  A active experts  H head width

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modularforge.config import ModelConfig
from modularforge.model.backbone import Decoder, FeedForward, initialise
from modularforge.model.names import MOE_BLOCK


class ExpertFFN(nn.Module):
    """One expert's SwiGLU block under Mixtral's names: w1 gate, w3 up, w2 down."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, ffn_width, bias=False)
        self.w2 = nn.Linear(ffn_width, width, bias=False)
        self.w3 = nn.Linear(width, ffn_width, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Map each token on its own."""
        output_ND: Tensor = self.w2(F.silu(self.w1(x_ND)) * self.w3(x_ND))
        return output_ND


class Router(nn.Module):
    """A row per expert; no bias, since no Hugging Face class has a slot for one."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, width))

    def forward(self, x_ND: Tensor) -> Tensor:
        """Logits [N, E], in the rows' own type: beside bf16 experts the rows are float32."""
        return F.linear(x_ND.to(self.weight.dtype), self.weight)


class AnchoredRouter(nn.Module):
    """One trained row; the public expert's row is zero in every job, so rows of all jobs share one scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))

    def forward(self, x_ND: Tensor) -> Tensor:
        """Logits [N, 2]: zero for the public expert, the row's product for the new one."""
        return F.pad(F.linear(x_ND.to(self.weight.dtype), self.weight), (1, 0))


class SparseMoE(nn.Module):
    """Each token visits its `experts_per_token` likeliest experts, whose softmax weights are renormalised."""

    def __init__(self, config: ModelConfig, experts: int, experts_per_token: int, router: nn.Module) -> None:
        super().__init__()
        self.gate = router
        make_expert = ExpertFFN if config.family == "llama" else FeedForward
        self.experts = nn.ModuleList(make_expert(config.width, config.ffn_width) for _ in range(experts))
        self.experts_per_token = experts_per_token
        self.allowed: Sequence[int] | None = None
        self.observed_logits: Tensor | None = None
        self.observes = False
        self.given_NE: Tensor | None = None  # logits from a text router, which outrank the rows

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Weighted sum of the visited experts; routing is done in float32, as Mixtral does."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        logits_NE = self.gate(x_ND).float() if self.given_NE is None else self.given_NE
        if self.observes:
            self.observed_logits = logits_NE
        experts = len(self.experts)
        if self.experts_per_token >= experts and self.allowed is None:
            weight_NE = logits_NE.softmax(dim=-1).to(x_ND.dtype)
            mixed = sum(weight_NE[:, e, None] * expert(x_ND) for e, expert in enumerate(self.experts))
            return torch.as_tensor(mixed).view_as(x_BTD)
        weight_NA, expert_NA = self.choose(logits_NE)
        mixed_ND: Tensor = self._visit(x_ND, weight_NA.to(x_ND.dtype), expert_NA)
        return mixed_ND.view_as(x_BTD)

    def choose(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices [N, A] of the visited experts; `allowed` forces the choice to a few of them."""
        active = self.experts_per_token
        if self.allowed is not None:
            closed = [slot not in self.allowed for slot in range(logits_NE.shape[-1])]
            closed_E = torch.tensor(closed, device=logits_NE.device)
            logits_NE, active = logits_NE.masked_fill(closed_E, float("-inf")), min(active, len(self.allowed))
        top_NA, expert_NA = logits_NE.topk(active, dim=-1)
        return top_NA.softmax(dim=-1), expert_NA

    def weights_of(self, logits_NE: Tensor) -> Tensor:
        """The weight [N, E] of each expert for each token, zero for those that it does not visit."""
        weight_NA, expert_NA = self.choose(logits_NE)
        return torch.zeros_like(logits_NE).scatter(1, expert_NA, weight_NA)

    def _visit(self, x_ND: Tensor, weight_NA: Tensor, expert_NA: Tensor) -> Tensor:
        """Visits sorted by expert once: a GPU says the ends of all groups at once, not one group's size at a time."""
        sorted_V, visit_V = expert_NA.flatten().sort(stable=True)
        ends = torch.searchsorted(sorted_V, self._numbers(sorted_V.device), right=True).tolist()
        token_V, weight_V1 = visit_V // expert_NA.shape[1], weight_NA.flatten().gather(0, visit_V)[:, None]
        output_ND = torch.zeros_like(x_ND)
        for expert, start, end in zip(self.experts, [0, *ends], ends, strict=False):
            if start < end:
                token, share = token_V[start:end], weight_V1[start:end]
                output_ND = output_ND.index_add(0, token, expert(x_ND[token]) * share)
        return output_ND

    def _numbers(self, device: torch.device) -> Tensor:
        return torch.arange(len(self.experts), device=device)


def build_moe(config: ModelConfig, vocab_size: int, experts: int, experts_per_token: int) -> Decoder:
    """The assembled model's shape with random weights."""

    def make_ffn() -> nn.Module:
        return SparseMoE(config, experts, experts_per_token, Router(config.width, experts))

    return _initialised(Decoder(config, vocab_size, MOE_BLOCK[config.family], make_ffn))


def build_anchored_pair(config: ModelConfig, vocab_size: int) -> Decoder:
    """The public FFN (expert 0) and one new expert (1), both visited by every token: what an expert's job trains."""

    def make_ffn() -> nn.Module:
        return SparseMoE(config, 2, 2, AnchoredRouter(config.width))

    return _initialised(Decoder(config, vocab_size, MOE_BLOCK[config.family], make_ffn))


def _initialised(decoder: Decoder) -> Decoder:
    initialise(decoder, decoder.config.layers)
    return decoder


def moe_layers(decoder: Decoder) -> list[SparseMoE]:
    """The mixture layers of a decoder, in order; empty for a backbone."""
    return [block.ffn for block in decoder.blocks if isinstance(block.ffn, SparseMoE)]


def restrict_routing(decoder: Decoder, allowed: Sequence[int] | None) -> None:
    """Let every token visit only these experts (None lifts it); their weights are renormalised among themselves."""
    for layer in moe_layers(decoder):
        layer.allowed = allowed


def observe_routing(decoder: Decoder, active: bool = True) -> None:
    """Keep each layer's router logits of the last forward pass in `observed_logits`."""
    for layer in moe_layers(decoder):
        layer.observes, layer.observed_logits = active, None


def router_z_loss(decoder: Decoder) -> Tensor:
    """Mean over layers and tokens of logsumexp(logits) squared (ST-MoE, arXiv 2202.08906, section 3.3)."""
    logits = [layer.observed_logits for layer in moe_layers(decoder) if layer.observed_logits is not None]
    return torch.stack([torch.logsumexp(item, dim=-1).square().mean() for item in logits]).mean()


def load_balance_loss(decoder: Decoder) -> Tensor:
    """Mean over layers of E times the sum of share of visits and mean probability (arXiv 2101.03961, section 2.2).

    It is 1 when all experts are visited alike.
    """
    terms = []
    for layer in moe_layers(decoder):
        assert layer.observed_logits is not None
        probability_E = layer.observed_logits.softmax(dim=-1).mean(dim=0)
        _, visited_NA = layer.choose(layer.observed_logits)
        visits_E = torch.zeros(len(probability_E), dtype=torch.long, device=probability_E.device)
        visited_V = visited_NA.flatten()  # counted so that a GPU need not be asked; bincount looks for the largest
        share_E = visits_E.scatter_add(0, visited_V, torch.ones_like(visited_V)) / visited_NA.numel()
        terms.append(len(probability_E) * (share_E * probability_E).sum())
    return torch.stack(terms).mean()


def shape_without_channels(decoder: Decoder) -> ModelConfig:
    """The shape without the last channels, where the final norm hides some, and without the heads that write there.

    It is the decoder's own where there are none.
    """
    model = decoder.config
    seen_D = decoder.model.norm.weight.detach().nonzero()
    width = int(seen_D[-1]) + 1 if len(seen_D) else model.width
    if width == model.width:
        return model
    heads = max(_visible_heads(block.self_attn.o_proj.weight.detach()[:width], model) for block in decoder.blocks)
    per_group = model.heads // model.kv_heads
    groups = -(-heads // per_group)
    return model.model_copy(update={"width": width, "heads": groups * per_group, "kv_heads": groups})


def _visible_heads(output_DN: torch.Tensor, model: ModelConfig) -> int:
    """Heads up to the last one whose output reaches a channel that is seen."""
    written = output_DN.reshape(len(output_DN), model.heads, -1).any(dim=2).any(dim=0).nonzero()
    return int(written[-1]) + 1 if len(written) else model.heads
