"""Which experts a text goes to in a model that chooses among experts, and which of its tokens speak for them."""

# T tokens  R slots (the public one first, where there is one)  N tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modularforge.errors import DataError
from modularforge.evaluation.generation import Loaded, prompt_tokens
from modularforge.evaluation.scoring import count_routing
from modularforge.facts import fact
from modularforge.model.moe import moe_layers, observe_routing
from modularforge.model.text_router import TextRouter
from modularforge.stored_models import StoredModel

TELLING = 5  # tokens that are named
PUBLIC = "public"
FEW_DOMAINS = 3  # more, as of an expert on a random part, tell nothing


@dataclass(frozen=True)
class Slot:
    """What a text does with one expert.

    Share of its visits and of their weights, over all layers; the probability behind the last token that the text is
    its, and the evidence for it of all tokens in nats, both None where no tables route.
    """

    name: str
    visits: float
    weight: float
    probability: float | None
    evidence: float | None


@dataclass(frozen=True)
class Routes:
    """Where a text of so many tokens goes; `telling` are the tokens that speak most for the expert that it suits best.

    Each comes with its evidence in nats for that expert, less that for the next best.
    """

    tokens: int
    visited: int
    slots: list[Slot]
    telling: list[tuple[str, float]]

    @property
    def ranked(self) -> list[Slot]:
        """The slots, the one with most weight first."""
        return sorted(self.slots, key=lambda slot: -slot.weight)


def slot_names(stored: StoredModel, count: int) -> list[str]:
    """What the slots of a model are called: by the experts' indices and few domains, where it says which they are."""
    members = fact(stored.artifact, "members", []) if stored.artifact else []
    found = [_expert_name(member["index"], member.get("domains", [])) for member in members]
    has_public = len(found) == count - 1
    return [PUBLIC, *found] if has_public else found if len(found) == count else [f"slot-{k}" for k in range(count)]


def _expert_name(index: int, domains: Sequence[str]) -> str:
    said = f" ({', '.join(domains)})" if 0 < len(domains) <= FEW_DOMAINS else ""
    return f"expert-{index}{said}"


def routes_of(loaded: Loaded, names: list[str], prompt: str) -> Routes:
    """Where a prompt goes; raises DataError where it is no text, or the model has nothing to choose from."""
    model, ids = loaded.model, prompt_tokens(loaded.tokenizer, prompt)
    if not moe_layers(model):
        raise DataError(
            "--model must be a model that chooses among experts, but has none to choose from; name the assembled one"
        )
    tokens_1T = torch.tensor([ids], device=model.lm_head.weight.device)
    visits_R, weights_R = _visited(loaded, tokens_1T)
    slots, telling = [(None, None)] * len(names), list[tuple[str, float]]()
    if model.text_router:
        probability_R, evidence_TR = _evidence(model.text_router, tokens_1T)
        slots = list(zip(probability_R.tolist(), evidence_TR.sum(dim=0).tolist(), strict=True))
        telling = _telling(loaded, ids, probability_R, evidence_TR)
    found = [
        Slot(name, visits, weight, *said)
        for name, visits, weight, said in zip(names, visits_R, weights_R, slots, strict=True)
    ]
    return Routes(len(ids), moe_layers(model)[0].experts_per_token, found, telling)


def _visited(loaded: Loaded, tokens_1T: Tensor) -> tuple[list[float], list[float]]:
    """Shares of the visits and of their weights [R] over all layers, of the tokens that the model reads at once."""
    model, router = loaded.model.eval(), loaded.model.text_router
    last = tokens_1T[:, -model.config.positions :]
    observe_routing(model)
    with torch.inference_mode():
        routing_BTR = router(tokens_1T)[0][:, -model.config.positions :] if router else None
        model(last, routing_BTE=routing_BTR)
        found = count_routing(model, torch.ones(last.numel(), dtype=torch.bool, device=last.device))
    observe_routing(model, False)
    visits_R, weights_R = found.visits_LE.sum(axis=0), found.weights_LE.sum(axis=0)
    return (visits_R / visits_R.sum()).tolist(), (weights_R / weights_R.sum()).tolist()


def _evidence(router: TextRouter, tokens_1T: Tensor) -> tuple[Tensor, Tensor]:
    """The posterior [R] behind the text, and the evidence [T, R] of each token for each slot."""
    before_1T = torch.cat([router.start(1).previous_B[:, None], tokens_1T[:, :-1]], dim=1)
    with torch.inference_mode():
        return router(tokens_1T)[1].probability_BR[0].cpu(), router.evidence(before_1T, tokens_1T)[0].cpu()


def _telling(loaded: Loaded, ids: list[int], probability_R: Tensor, evidence_TR: Tensor) -> list[tuple[str, float]]:
    """The tokens that speak most for the likeliest slot against the next, once each."""
    first, second = probability_R.topk(2).indices.tolist() if len(probability_R) > 1 else (0, 0)
    ahead_T = evidence_TR[:, first] - evidence_TR[:, second]
    found: dict[str, float] = {}
    for place in ahead_T.argsort(descending=True).tolist():
        if ahead_T[place] > 0 and len(found) < TELLING:
            found.setdefault(loaded.tokenizer.decode([ids[place]]), float(ahead_T[place]))
    return list(found.items())
