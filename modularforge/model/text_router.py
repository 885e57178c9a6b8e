"""A router that reads tokens alone: which partition the text so far is from, as a Bayesian filter.

Each expert, and the public one, is a hypothesis about the text. A token's evidence moves their posterior; between two
tokens the text may switch (the fixed share of Herbster and Warmuth, Machine Learning 32, 1998), so that no posterior
grows too sure to leave a domain. All layers route by the posterior's logarithm. The tables are solved from counts
(routing/text_evidence.py) and lie beside a model's weights; without them the model routes by its own rows.
"""

# B batch  T tokens  V vocabulary  P pairs  E experts  R routed slots (E, and the public one before them if it is kept)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from checkpoints.parsing import parse_object
from modularforge.errors import DataError
from modularforge.model.hub_config import TABLES_FORMAT

NO_TOKEN = -1
MOST_EVIDENCE = 100.0
DECIDED_WITHIN = 32  # tokens of a document by which a router that holds its choice has made it
SETTINGS = ("strength", "switch", "switch_at_end", "sharpness")
TABLES = ("token", "context", "keys", "pair", "prior", "ends")


@dataclass(frozen=True)
class FilterSettings:
    """How evidence becomes a posterior.

    `strength` is the weight of a token's evidence, below 1 because neighbouring tokens say the same thing twice;
    `switch` the chance that the text turns to another domain at a token, and `switch_at_end` behind one that ends a
    document. `sharpness` is what the log-posterior is multiplied by for the routers: two experts are better than the
    one that a posterior soon is sure of.
    """

    strength: float
    switch: float
    switch_at_end: float
    sharpness: float


@dataclass(frozen=True)
class TextState:
    """What is known of a text after some tokens: the posterior [B, R] in float64, and the last token [B] (-1: none).

    A router that holds its choice also knows the tokens of the document so far [B], and the logits [B, R] that it holds
    if these are enough.
    """

    probability_BR: Tensor
    previous_B: Tensor
    read_B: Tensor | None = None
    held_BR: Tensor | None = None

    def only(self, rows: Tensor) -> TextState:
        """What is known of these rows of the batch."""
        read_B, held_BR = (None if item is None else item[rows] for item in (self.read_B, self.held_BR))
        return TextState(self.probability_BR[rows], self.previous_B[rows], read_B, held_BR)


class TextRouter(nn.Module):
    """Router logits of all layers from the ids alone; holds buffers only, which are no part of a state dict."""

    def __init__(self, tables: Mapping[str, Tensor], settings: FilterSettings) -> None:
        super().__init__()
        self.settings = settings
        self.holds = False
        # A last row of zeros: the pair of those that have none.
        none_1E = torch.zeros(1, tables["token"].shape[1])
        buffers = {
            "token_VE": tables["token"].float(),
            "context_VE": tables["context"].float(),
            "pair_PE": torch.cat([tables["pair"].float(), none_1E]),
            "keys_P": tables["keys"],
            "prior_R": tables["prior"].float(),
            "ends": tables["ends"],
        }
        for name, table in buffers.items():
            self.register_buffer(name, table, persistent=False)

    @property
    def slots(self) -> int:
        """Slots R that it routes among."""
        return len(self.get_buffer("prior_R"))

    @property
    def has_public(self) -> bool:
        """Whether the first slot is the public expert, which has no evidence for or against it."""
        return self.slots > self.get_buffer("token_VE").shape[1]

    def start(self, batch: int) -> TextState:
        """What is known before the first token."""
        prior_R = self.get_buffer("prior_R")
        return TextState(
            prior_R.double().exp().expand(batch, -1),
            torch.full((batch,), NO_TOKEN, dtype=torch.long, device=prior_R.device),
        )

    @torch.no_grad()
    def forward(
        self, tokens_BT: Tensor, state: TextState | None = None, starts_BT: Tensor | None = None
    ) -> tuple[Tensor, TextState]:
        """Logits [B, T, R] after each token, and the state behind the last one; all is forgotten before `starts`."""
        state = state or self.start(len(tokens_BT))
        before_BT = torch.cat([state.previous_B[:, None], tokens_BT[:, :-1]], dim=1)
        if starts_BT is not None:
            before_BT = before_BT.masked_fill(starts_BT, NO_TOKEN)
        evidence_BTR = self.evidence(before_BT, tokens_BT).double() * self.settings.strength
        # At most one: what matters is the ratio, and the share of the prior keeps the sum above zero.
        likelihood_TBR = (evidence_BTR - evidence_BTR.amax(dim=-1, keepdim=True)).exp().transpose(0, 1)
        is_behind_end_BT = torch.isin(before_BT, self.get_buffer("ends"))
        share_TB1 = (
            torch.where(is_behind_end_BT, self.settings.switch_at_end, self.settings.switch).double().T[..., None]
        )
        if starts_BT is not None:
            share_TB1 = share_TB1.masked_fill(starts_BT.T[..., None], 1.0)
        turned_TBR = share_TB1 * self.get_buffer("prior_R").double().exp()
        probability_BR, found = state.probability_BR, []
        # One small step a token: few operations each, since on short texts they cost more than what they compute.
        for stays_B1, turned_BR, likelihood_BR in zip(1.0 - share_TB1, turned_TBR, likelihood_TBR, strict=True):
            weight_BR = torch.addcmul(turned_BR, probability_BR, stays_B1) * likelihood_BR
            probability_BR = weight_BR / weight_BR.sum(dim=-1, keepdim=True)
            found.append(probability_BR)
        logits_BTR = torch.stack(found, dim=1).log().float() * self.settings.sharpness
        after = TextState(probability_BR, tokens_BT[:, -1])
        begins_BT = is_behind_end_BT if starts_BT is None else is_behind_end_BT | starts_BT
        return self._held(logits_BTR, begins_BT, state, after) if self.holds else (logits_BTR, after)

    @torch.no_grad()
    def over_windows(self, tokens_BT: Tensor, state: TextState | None = None) -> tuple[Tensor, TextState]:
        """The same where row after row is one text: logits [B, T, R], and the state [1, R] behind the last row."""
        logits_1NR, state = self(tokens_BT.reshape(1, -1), state)
        return logits_1NR.view(*tokens_BT.shape, -1), state

    def _held(
        self, logits_BTR: Tensor, is_first_BT: Tensor, before: TextState, after: TextState
    ) -> tuple[Tensor, TextState]:
        """The logits as they are at a document's first tokens, and those of the last of these from then on.

        No token is routed by a later one, so losses are as honest as with a choice for each token.
        """
        B, T, R = logits_BTR.shape
        place_T = torch.arange(T, device=logits_BTR.device)
        read_B = torch.zeros(B, dtype=torch.long, device=place_T.device) if before.read_B is None else before.read_B
        held_BR = logits_BTR[:, 0] if before.held_BR is None else before.held_BR
        # Where the document began that each token is of, from the first token here; in front of it, below zero.
        begins_BT = torch.where(is_first_BT, place_T, -read_B[:, None]).cummax(dim=1).values
        from_BT = torch.minimum(place_T.expand(B, T), begins_BT + DECIDED_WITHIN - 1)
        own_BTR = logits_BTR.gather(1, from_BT.clamp(min=0)[..., None].expand(B, T, R))
        found_BTR = torch.where((from_BT < 0)[..., None], held_BR[:, None], own_BTR)
        return found_BTR, replace(after, read_B=T - begins_BT[:, -1], held_BR=found_BTR[:, -1])

    def evidence(self, before_BT: Tensor, tokens_BT: Tensor) -> Tensor:
        """Evidence [B, T, R] in nats of each token behind the one before it (-1: none); zero for the public expert."""
        token_VE, keys_P = self.get_buffer("token_VE"), self.get_buffer("keys_P")
        # Ids of a padded vocabulary that no text has are as neutral as special tokens.
        known_BT = tokens_BT.clamp(max=len(token_VE) - 1)
        evidence_BTE = token_VE[known_BT] * (tokens_BT < len(token_VE))[..., None]
        neutral_BT1 = (evidence_BTE == 0).all(dim=-1, keepdim=True)
        # Behind nothing, and behind a token that ends a document, the token speaks for itself.
        follows_BT = (
            (before_BT != NO_TOKEN) & (before_BT < len(token_VE)) & ~torch.isin(before_BT, self.get_buffer("ends"))
        )
        if len(keys_P):
            pair_BT = before_BT * len(token_VE) + tokens_BT
            place_BT = torch.searchsorted(keys_P, pair_BT).clamp(max=len(keys_P) - 1)
            place_BT = torch.where((keys_P[place_BT] == pair_BT) & follows_BT, place_BT, len(keys_P))
            pair_BTE = (
                self.get_buffer("context_VE")[before_BT.clamp(0, len(token_VE) - 1)]
                + self.get_buffer("pair_PE")[place_BT]
            )
            evidence_BTE = evidence_BTE + pair_BTE * (follows_BT[..., None] & ~neutral_BT1)
        return nn.functional.pad(evidence_BTE, (int(self.has_public), 0))


def load_text_router(path: Path) -> TextRouter:
    """The router of a `text_router.tables`; raises DataError."""
    try:
        with safe_open(path, framework="pt") as file:
            values = parse_object((file.metadata() or {}).get("text_router", ""))
            if values.get("format") != TABLES_FORMAT:
                raise ValueError(f"its format is {values.get('format')!r:.20}, not {TABLES_FORMAT}")
            tables = {name: file.get_tensor(name) for name in TABLES}
        settings = FilterSettings(*(float(values[name]) for name in SETTINGS))
        _check(tables, settings)
    except Exception as error:  # safetensors raises a class of its own
        raise DataError(
            f"{path} must be the tables of a text router, but is not: {error}; assemble the model again, or delete it "
            "to route by the model's own rows"
        ) from error
    return TextRouter(tables, settings)


def _check(tables: dict[str, Tensor], settings: FilterSettings) -> None:
    """Raise ValueError unless the tables fit each other."""
    size, experts = tables["token"].shape
    keys, slots = tables["keys"], len(tables["prior"])
    if tables["context"].shape != (size, experts) or tables["pair"].shape != (len(keys), experts):
        raise ValueError("its tables have other shapes")
    if keys.dtype != torch.int64 or tables["ends"].dtype != torch.int64 or slots not in (experts, experts + 1):
        raise ValueError("its keys or slots are none of a router's")
    if not bool((keys.diff() > 0).all()):
        raise ValueError("its keys are out of order")
    # Logarithms of ratios of counts stay far below; larger ones would leave some slot a probability of zero.
    if not all(bool((tables[name].abs() <= MOST_EVIDENCE).all()) for name in ("token", "context", "pair", "prior")):
        raise ValueError(f"its evidence is not within {MOST_EVIDENCE:g} nats")
    if not abs(float(tables["prior"].double().logsumexp(0))) < 1e-3:
        raise ValueError("its priors are no distribution")
    shares_are_shares = all(0 < share < 1 for share in (settings.switch, settings.switch_at_end))
    if not shares_are_shares or not all(0 < item <= 10 for item in (settings.strength, settings.sharpness)):
        raise ValueError("its settings are out of range")
