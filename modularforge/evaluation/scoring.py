"""One scorer for studies, reports and tests: the log-probability of every target, and what follows from it.

Losses by domain and by position, sums by document and the routing counts all come from one pass over a probe's windows.
"""

# B batch  R rows (windows)  T tokens of a window  V vocabulary  N targets that count

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modularforge.data.loader import IGNORED_TARGET
from modularforge.evaluation.losses import RoutingCount, count_routing
from modularforge.evaluation.paired import document_sums
from modularforge.evaluation.probes import MIXED, SWITCH, TEXT, UNCOUNTED, Probe, position_ranges
from modularforge.model.backbone import Decoder
from modularforge.model.moe import moe_layers, observe_routing
from modularforge.model.text_router import TextRouter

Row = dict[str, Any]


def score_batch(model: Decoder, inputs_BT: Tensor, targets_BT: Tensor, routing_BTE: Tensor | None = None) -> Tensor:
    """Log-probability of every target [B, T] in float32 on the CPU; zero where it is to be ignored.

    Everything that is measured comes through here, batch after batch in the order of the text. `routing_BTE` outranks
    what the model routes by.
    """
    device = model.lm_head.weight.device
    logits_BVT = model(inputs_BT.long().to(device), routing_BTE=routing_BTE).float().transpose(1, 2)
    targets_BT = targets_BT.long().to(device)
    return -F.cross_entropy(logits_BVT, targets_BT, ignore_index=IGNORED_TARGET, reduction="none").cpu()


def score(
    model: Decoder,
    probe: Probe,
    batch_size: int,
    routing: dict[str, RoutingCount] | None = None,
    carries: bool = False,
) -> Tensor:
    """Log-probability of every target of a probe, [R, T]; `routing` gets the visits by domain where it is given.

    With `carries`, a text router goes on from window to window of a document, as it does when it generates.
    """
    found, counts = [], routing if routing is not None and moe_layers(model) else None
    model.eval()
    observe_routing(model, counts is not None)
    with torch.inference_mode():
        routing_RTE = carried_routing(model.text_router, probe) if carries and model.text_router else None
        for first in range(0, len(probe.inputs_RT), batch_size):
            rows = slice(first, first + batch_size)
            routing_BTE = None if routing_RTE is None else routing_RTE[rows]
            found.append(score_batch(model, probe.inputs_RT[rows], probe.targets_RT[rows], routing_BTE))
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
            size, loss = int(bytes_N[mine_N].sum()), float(losses_N[mine_N].mean())
            bits = loss * count / max(1, size) / math.log(2)
            domains[label] = {
                "loss": loss, "bits_per_byte": bits, "tokens": count, "bytes": size, "positions": positions
            }  # fmt: skip
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
