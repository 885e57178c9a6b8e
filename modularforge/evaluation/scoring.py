"""One scorer for training, calibration, evaluation and studies: the log-probability of every target, from one pass.

What is said of a model follows from that number: losses by domain and by position, sums by document, the oracle and
output ensembles of experts, and what the removal of an expert changes. Routing is counted in the same pass.
"""

# B batch  R rows (windows)  T tokens of a window  V vocabulary  N targets that count  K experts (models)
# E experts (slots of a router)  A active experts  L layers

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints.screen import progress
from modularforge.data.loader import IGNORED_TARGET, evaluation_batches
from modularforge.data.packing import Rows, ordered_batches
from modularforge.data.token_files import ExampleTokens, Stream
from modularforge.evaluation.paired import document_sums
from modularforge.evaluation.probes import MIXED, SWITCH, TEXT, UNCOUNTED, Probe, plain_probe, position_ranges
from modularforge.model.backbone import Decoder, perplexity
from modularforge.model.moe import moe_layers, observe_routing
from modularforge.model.text_router import TextRouter

Row = dict[str, Any]
Batches = Iterable[tuple[Tensor, ...]]
NO_TOKEN = -1  # an end of documents where nobody asks for documents


@dataclass(frozen=True)
class DomainLoss:
    """Mean loss in nats per token, and the tokens and bytes it was taken over."""

    loss: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Loss in bits per byte of text: comparable between tokenizers."""
        return self.loss * self.tokens / max(1, self.bytes) / math.log(2)


@dataclass(frozen=True)
class RoutingCount:
    """Visits and weights of every expert, per layer, over the tokens of one domain."""

    visits_LE: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    weights_LE: np.ndarray[tuple[int, int], np.dtype[np.float64]]

    def __add__(self, other: RoutingCount) -> RoutingCount:
        return RoutingCount(self.visits_LE + other.visits_LE, self.weights_LE + other.weights_LE)


@dataclass(frozen=True)
class Measurement:
    """What one model did on the domains; means weigh them alike."""

    domains: dict[str, DomainLoss]
    mean_loss: float
    mean_bits_per_byte: float
    routing: dict[str, RoutingCount]

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return perplexity(self.mean_loss)


def measure(
    model: Decoder,
    streams: Mapping[str, Stream],
    byte_lengths: Tensor,
    batch_size: int,
    max_tokens: int,
    context_length: int | None = None,
) -> Measurement:
    """Losses on each domain's token stream, every token predicted once, and routing counts where there are routers.

    `byte_lengths` [V] is the number of bytes each token stands for; windows have `context_length` tokens, or as many as
    the model is made for where that is less.
    """
    window = min(context_length or model.config.positions, model.config.positions)
    probe, routing = plain_probe(streams, window, NO_TOKEN, max_tokens), dict[str, RoutingCount]()
    row = summarise(probe, score(model, probe, batch_size, routing), byte_lengths)
    domains = {label: DomainLoss(row["loss"], row["tokens"], row["bytes"]) for label, row in row["domains"].items()}
    return Measurement(domains, row["mean_loss"], row["bits_per_byte"], routing)


def summed_loss(model: Decoder, batches: Batches, device: torch.device) -> tuple[float, float]:
    """Summed loss in nats of a stream's batches, and the targets it was taken over: what training and calibration use.

    A batch is inputs, targets and, of examples, the number of each token's example, all [B, T].

    Unlike all else here, a batch is summed by torch, in float32: the last bits of a sum depend on its order, and those
    of validation decide what is recorded of every training, and whether a calibration is kept.
    """
    loss, count = 0.0, 0
    model.eval()
    with torch.no_grad():  # not inference_mode: what a layer remembers of this pass may meet the training's next one
        for inputs_BT, targets_BT, *examples in batches:
            targets_BT, examples_BT = targets_BT.to(device), examples[0].to(device) if examples else None
            batch = {"examples_BT": examples_BT, "targets_BT": targets_BT}
            loss += float(model(inputs_BT.to(device), **batch, reduction="sum"))
            count += int((targets_BT != IGNORED_TARGET).sum())
    return loss, float(count)


def summed_losses(
    model: Decoder,
    streams: Mapping[str, Stream],
    context_length: int,
    batch_size: int,
    max_tokens: int,
    rank: int = 0,
    ranks: int = 1,
) -> list[float]:
    """Of each domain's stream the summed loss of this rank's batches, as in training, and their targets, in turn."""
    device = model.lm_head.weight.device
    found = [_batches(stream, context_length, batch_size, max_tokens) for stream in streams.values()]
    shares = [islice(batches, rank, None, ranks) for batches in found]
    return [value for share in shares for value in summed_loss(model, share, device)]


def even_loss(sums: Sequence[float]) -> float:
    """Mean over domains, which weigh alike, of the mean loss of each, from `summed_losses` of all ranks."""
    losses = [loss / count for loss, count in zip(sums[::2], sums[1::2], strict=True)]
    return sum(losses) / len(losses)


def _batches(stream: Stream, context_length: int, batch_size: int, max_tokens: int) -> Batches:
    """A stream's windows, or its examples in rows, in order; at most about `max_tokens` of it."""
    if not isinstance(stream, ExampleTokens):
        return evaluation_batches(stream, context_length, batch_size, max_tokens)
    rows = ordered_batches(Rows(stream.first(max_tokens), context_length), batch_size)
    return ((row["inputs"], row["targets"], row["examples"]) for row in rows)


def score_batch(
    model: Decoder,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    routing_BTE: Tensor | None = None,
    examples_BT: Tensor | None = None,
) -> Tensor:
    """Log-probability of every target [B, T] in float32 on the CPU; zero where it is to be ignored.

    Everything that is measured comes through here, batch after batch in the order of the text. `routing_BTE` outranks
    what the model routes by.
    """
    device = model.lm_head.weight.device
    examples_BT = None if examples_BT is None else examples_BT.to(device)
    batch = {"routing_BTE": routing_BTE, "examples_BT": examples_BT, "targets_BT": targets_BT.long().to(device)}
    losses_BT: Tensor = model(inputs_BT.long().to(device), **batch, reduction="none")
    return -losses_BT.cpu()


def score(
    model: Decoder,
    probe: Probe,
    batch_size: int,
    routing: dict[str, RoutingCount] | None = None,
    carries: bool = False,
) -> Tensor:
    """Log-probability of every target of a probe, [R, T]; `routing` gets the visits by domain where it is given.

    With `carries`, a text router goes on from window to window of a document, as it does when it generates; examples
    are whole, so that there is nothing to carry.
    """
    carries = carries and probe.examples_RT is None
    found, counts = [], routing if routing is not None and moe_layers(model) else None
    model.eval()
    observe_routing(model, counts is not None)
    with torch.inference_mode(), progress(f"measure {probe.name}", len(probe.inputs_RT), "windows") as bar:
        routing_RTE = carried_routing(model.text_router, probe) if carries and model.text_router else None
        for first in range(0, len(probe.inputs_RT), batch_size):
            rows = slice(first, first + batch_size)
            routing_BTE = None if routing_RTE is None else routing_RTE[rows]
            examples_BT = None if probe.examples_RT is None else probe.examples_RT[rows]
            found.append(score_batch(model, probe.inputs_RT[rows], probe.targets_RT[rows], routing_BTE, examples_BT))
            bar.advance(len(probe.inputs_RT[rows]))
            if counts is not None:
                _add_visits(model, probe, probe.labels_RT[rows].flatten(), counts)
    observe_routing(model, False)
    return torch.cat(found)


def carried_routing(router: TextRouter, probe: Probe) -> Tensor:
    """Routing logits [R, T, E] when a row goes on where the row before it ended, as long as that is one document."""
    label_R = probe.labels_RT.amax(dim=1)
    goes_on = (probe.documents_RT[1:, 0] == probe.documents_RT[:-1, -1]) & (label_R[1:] == label_R[:-1])
    starts = [0, *((~goes_on).nonzero().flatten() + 1).tolist(), len(label_R)]
    inputs_RT = probe.inputs_RT.long().to(router.get_buffer("prior_R").device)
    return torch.cat([router.over_windows(inputs_RT[first:end])[0] for first, end in pairwise(starts)])


def _add_visits(model: Decoder, probe: Probe, labels_N: Tensor, counts: dict[str, RoutingCount]) -> None:
    for index in set(labels_N.tolist()):
        if index != UNCOUNTED:
            new = count_routing(model, (labels_N == index).to(model.lm_head.weight.device))
            old = counts.get(probe.labels[index])
            counts[probe.labels[index]] = old + new if old else new


def full_row(probes: Mapping[str, Probe], scores: Mapping[str, Tensor], byte_lengths: Tensor) -> Row:
    """What a model's scores say of the text, under `probes` of the others, and under `documents` of each document."""
    rows = {name: summarise(probes[name], scores_RT, byte_lengths) for name, scores_RT in scores.items()}
    documents = {name: document_sums(probes[name], scores_RT) for name, scores_RT in scores.items()}
    return {**rows.pop(TEXT), "probes": rows, "documents": documents}


def summarise(probe: Probe, scores_RT: Tensor, byte_lengths: Tensor) -> Row:
    """Mean loss, and loss by domain and by position; domains weigh alike.

    `byte_lengths` [V] is the number of bytes each token stands for.
    """
    kept_RT = probe.labels_RT != UNCOUNTED
    labels_N, places_N = probe.labels_RT[kept_RT], probe.places_RT[kept_RT]
    losses_N = -scores_RT[kept_RT].double()
    bytes_N = byte_lengths[probe.targets_RT[kept_RT].long()]
    ranges = position_ranges(probe.inputs_RT.shape[1])
    domains: dict[str, Row] = {}
    for index, label in enumerate(probe.labels):
        mine_N = labels_N == index
        if count := int(mine_N.sum()):
            positions = _by_position(losses_N[mine_N], places_N[mine_N], ranges)
            domain = DomainLoss(float(losses_N[mine_N].mean()), count, int(bytes_N[mine_N].sum()))
            domains[label] = {**asdict(domain), "bits_per_byte": domain.bits_per_byte, "positions": positions}
    return means(domains)


def _by_position(losses_N: Tensor, places_N: Tensor, ranges: list[tuple[int, int]]) -> dict[str, float]:
    inside = {f"{first}-{end - 1}": (places_N >= first) & (places_N < end) for first, end in ranges}
    return {name: float(losses_N[mask_N].mean()) for name, mask_N in inside.items() if mask_N.any()}


def means(domains: Mapping[str, Row]) -> Row:
    """Equal-weight means over the domains, also by position where all of them have such."""
    items = list(domains.values())
    positions = [name for name in items[0]["positions"] if all(name in item["positions"] for item in items)]
    return {
        "mean_loss": sum(item["loss"] for item in items) / len(items),
        "bits_per_byte": sum(item["bits_per_byte"] for item in items) / len(items),
        "positions": {name: sum(item["positions"][name] for item in items) / len(items) for name in positions},
        "domains": dict(domains),
    }


def oracle(rows: Mapping[str, Row]) -> Row:
    """The best expert of each domain, chosen by its loss on that domain's text, wherever text of the domain counts.

    `rows` are the experts' rows, as `full_row` of the probes gives them.
    """
    first = next(iter(rows.values()))
    best = {
        label: min(rows.values(), key=lambda row: float(row["domains"][label]["loss"])) for label in first["domains"]
    }
    chosen = means({label: row["domains"][label] for label, row in best.items()})
    known = {name: first["probes"][name] for name in (SWITCH, MIXED) if name in first["probes"]}
    probes = {
        name: means({label: best[label]["probes"][name]["domains"][label] for label in probe["domains"]})
        for name, probe in known.items()
    }
    documents = {
        name: {
            **item,
            "losses": {label: best[label]["documents"][name]["losses"][label] for label in item["losses"]},
        }
        for name, item in first.get("documents", {}).items()
        if name in (TEXT, *known)
    }
    return {**chosen, "probes": probes, "documents": documents}


def uniform_ensemble(scores_KRT: Tensor) -> Tensor:
    """Log of the mean probability of each target, [R, T]: the output ensemble of models with equal weights.

    A mixture of distributions gives the target the weighted sum of what they give it: no logits are needed.
    """
    return torch.logsumexp(scores_KRT, dim=0) - math.log(len(scores_KRT))


def posterior_ensemble(scores_KRT: Tensor) -> Tensor:
    """Log-probability of each target [R, T] when models weigh by their likelihood of the window's earlier targets.

    That is the posterior over experts given the tokens so far (DEMix, arXiv 2108.05036; c-BTM, arXiv 2303.14177).
    """
    past_KRT = scores_KRT.cumsum(dim=2) - scores_KRT
    return torch.logsumexp(past_KRT.log_softmax(dim=0) + scores_KRT, dim=0)


def count_routing(model: Decoder, kept_N: Tensor) -> RoutingCount:
    """Visits and summed weights [layers, E] of the tokens that count, from the logits of the last forward pass."""
    visits, weights = [], []
    for layer in moe_layers(model):
        assert layer.observed_logits is not None
        weight_NA, expert_NA = layer.choose(layer.observed_logits[kept_N])
        flat, experts = expert_NA.flatten(), len(layer.experts)
        visits.append(torch.bincount(flat, minlength=experts).double().cpu().numpy())
        weights.append(torch.bincount(flat, weight_NA.flatten().double(), minlength=experts).cpu().numpy())
    return RoutingCount(np.stack(visits), np.stack(weights))


def routing_summary(routing: Mapping[str, RoutingCount]) -> dict[str, object]:
    """Share of visits per layer and expert over all domains weighted alike, its balance, and domain by expert.

    Balance is the entropy of the shares over its maximum: 1 when all experts are visited alike, 0 when one is.
    """
    shares = {label: count.visits_LE / count.visits_LE.sum(axis=1, keepdims=True) for label, count in routing.items()}
    weights = {
        label: count.weights_LE / count.weights_LE.sum(axis=1, keepdims=True) for label, count in routing.items()
    }
    share_LE = np.mean(list(shares.values()), axis=0)
    entropy_L = -(share_LE * np.log(np.maximum(share_LE, 1e-30))).sum(axis=1)
    return {
        "share_per_layer_and_expert": share_LE.round(6).tolist(),
        "balance_per_layer": (entropy_L / math.log(max(2, share_LE.shape[1]))).round(6).tolist(),
        "share_per_domain_and_expert": {label: item.mean(axis=0).round(6).tolist() for label, item in shares.items()},
        "weight_per_domain_and_expert": {label: item.mean(axis=0).round(6).tolist() for label, item in weights.items()},
    }
