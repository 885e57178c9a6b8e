"""Probes are what they say, and losses and errors of them equal naive computations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modularforge.config import ModelConfig
from modularforge.evaluation import paired
from modularforge.evaluation.paired import Sums, differences, document_sums, mean_sums, paired_difference
from modularforge.evaluation.probes import (
    UNCOUNTED,
    Probe,
    domain_probes,
    mixed_probe,
    switch_probe,
    text_probe,
)
from modularforge.evaluation.scoring import even_loss, full_row, measure, oracle, score, summarise, summed_losses
from modularforge.model.backbone import build_backbone
from modularforge.observe.findings import doubts
from modularforge.tasks.text import TextValidation
from modularforge.training.distributed import World
from modularforge.training.losses import mean_loss
from tests.naive import naive_losses

END, T = 3, 12
# Every token of a domain tells which it is: 100, 200 and 300 and the place in the stream; END ends documents.
LENGTHS = {"law": (30, 41), "code": (25, 10, 20), "novels": (60,)}


def stream(number: int, lengths: tuple[int, ...]) -> Any:
    ids = np.arange(sum(lengths)) + 100 * number
    ids[np.cumsum(lengths) - 1] = END
    return ids


STREAMS = {label: stream(number, lengths) for number, (label, lengths) in enumerate(LENGTHS.items(), start=1)}
LABELS = list(STREAMS)


def domain_of(token: int) -> int | None:
    return None if token == END else token // 100 - 1


def counted(probe: Probe) -> list[tuple[int, int]]:
    return [(int(r), int(t)) for r, t in zip(*np.where(probe.labels_RT.numpy() != UNCOUNTED), strict=True)]


def test_plain_text_predicts_every_token_once_with_the_document_it_is_of() -> None:
    probe = text_probe("text", STREAMS, T, END, 1000)
    for index, (label, tokens) in enumerate(STREAMS.items()):
        mine = probe.labels_RT == index
        assert probe.targets_RT[mine].tolist() == tokens[1:].tolist()
        expected = [number for number, length in enumerate(LENGTHS[label]) for _ in range(length)]
        assert probe.documents_RT[mine].tolist() == expected[1:], "the first token of a stream is never predicted"
    assert set(probe.places_RT[0].tolist()) == set(range(T))


def test_behind_a_switch_only_the_second_half_counts_and_the_first_is_of_another_domain() -> None:
    probe = switch_probe(STREAMS, T, END, 1000)
    rows_of: dict[int, list[list[int]]] = {}
    before = set()
    for row in range(len(probe.inputs_RT)):
        inputs, targets, labels = (item[row].tolist() for item in (probe.inputs_RT, probe.targets_RT, probe.labels_RT))
        assert labels[: T // 2] == [UNCOUNTED] * (T // 2)
        (own,) = set(labels[T // 2 :])
        assert {domain_of(token) for token in inputs[T // 2 :]} <= {own, None}
        others = {domain_of(token) for token in inputs[: T // 2]} - {None}
        assert len(others) == 1
        assert own not in others
        before.add((own, *others))
        assert targets == inputs[1:] + targets[-1:]
        rows_of.setdefault(own, []).append(targets[T // 2 :])
        assert probe.places_RT[row, T // 2 :].tolist() == list(range(T - T // 2))
    for index, label in enumerate(LABELS):
        places = [STREAMS[label].tolist().index(next(token for token in row if token != END)) for row in rows_of[index]]
        assert np.diff(places).min() >= T // 2 - 1, "each target once, in order"
        assert places[-1] > len(STREAMS[label]) - 2 * T, "spread over the whole stream"
    assert before == {(a, b) for a in range(3) for b in range(3) if a != b}, "every domain behind every other"


def test_mixed_documents_alternate_and_leave_out_what_no_model_can_know() -> None:
    probe = mixed_probe(STREAMS, 64, 200)
    assert probe.shares_documents
    for row in range(len(probe.inputs_RT)):
        inputs, labels = probe.inputs_RT[row].tolist(), probe.labels_RT[row].tolist()
        domains = [domain_of(token) for token in inputs]
        changes = [t for t in range(1, 64) if None not in domains[t - 1 : t + 1] and domains[t] != domains[t - 1]]
        assert changes, "more than one domain in every document"
        assert labels[: changes[0]] == [UNCOUNTED] * changes[0], "the first passage does not count"
        for t in changes:
            assert labels[t - 1] == UNCOUNTED, "the first token of a passage is not predicted"
            assert labels[t] == domains[t]
    again = mixed_probe(STREAMS, 64, 200)
    assert torch.equal(probe.inputs_RT, again.inputs_RT), "the same for every model"


def test_passages_have_the_lengths_they_say() -> None:
    streams = {label: np.arange(5000) % 50 + 100 * number for number, label in enumerate("abcd", start=1)}
    probe = mixed_probe(streams, 4096, 8192)
    owners = (probe.inputs_RT // 100).numpy()
    edges = [np.flatnonzero(np.diff(row)) for row in owners]
    lengths = np.concatenate([np.diff(row) for row in edges])
    assert lengths.min() == 16
    assert lengths.max() == 96


def test_one_domain_alone_has_nothing_to_switch_to() -> None:
    assert list(domain_probes({"law": STREAMS["law"]}, T, END, 1000, 100)) == ["text"]
    assert list(domain_probes({**STREAMS, "tiny": STREAMS["law"][:5]}, T, END, 1000, 100)) == [
        "text",
        "switch",
        "mixed",
    ]


def test_the_scorer_gives_what_a_model_gives_each_target() -> None:
    torch.manual_seed(0)
    model = build_backbone(ModelConfig(width=8, layers=1, heads=2, kv_heads=1, ffn_width=12, context_length=T), 400)
    for probe in domain_probes(STREAMS, T, END, 1000, 50).values():
        scores_RT = score(model, probe, 3)
        row = summarise(probe, scores_RT, torch.ones(400, dtype=torch.long))
        naive: dict[str, list[float]] = {label: [] for label in LABELS}
        with torch.no_grad():
            for r, t in counted(probe):
                logits_V = model(probe.inputs_RT[r : r + 1].long())[0, t]
                loss = -float(logits_V.log_softmax(-1)[int(probe.targets_RT[r, t])])
                naive[LABELS[int(probe.labels_RT[r, t])]].append(loss)
        for label, losses in naive.items():
            assert row["domains"][label]["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
            assert row["domains"][label]["tokens"] == len(losses)
        assert row["mean_loss"] == pytest.approx(np.mean([np.mean(losses) for losses in naive.values()]), abs=1e-5)


def test_what_training_sums_by_batch_is_what_the_scorer_gives_by_target() -> None:
    torch.manual_seed(0)
    model = build_backbone(ModelConfig(width=8, layers=1, heads=2, kv_heads=1, ffn_width=12, context_length=T), 400)
    lengths, limit = torch.full((400,), 3), 30
    asked = (model, STREAMS, lengths, 2, limit)
    found, naive = measure(*asked), naive_losses(*asked)
    assert even_loss(summed_losses(model, STREAMS, T, 2, limit)) == pytest.approx(found.mean_loss, abs=1e-6)
    assert found.mean_loss == pytest.approx(naive.mean_loss, abs=1e-6)
    assert found.mean_bits_per_byte == pytest.approx(naive.mean_bits_per_byte, abs=1e-6)
    for label, domain in found.domains.items():
        alone = mean_loss(model, TextValidation(STREAMS[label][: limit + 1], T, 2), World())
        assert domain.loss == pytest.approx(alone, abs=1e-6)
        assert domain.perplexity == pytest.approx(math.exp(alone), rel=1e-5)
        assert (domain.tokens, domain.bytes) == (min(limit, len(STREAMS[label]) - 1), 3 * domain.tokens)
    assert found.routing == {}, "a model without routers visits no expert"


def scores_of(probe: Probe, seed: int) -> Tensor:
    return -torch.rand(probe.inputs_RT.shape, generator=torch.Generator().manual_seed(seed))


def test_sums_over_documents_add_up_to_the_loss_however_few_they_may_be() -> None:
    for probe in domain_probes(STREAMS, T, END, 1000, 50).values():
        scores_RT = scores_of(probe, 1)
        row = summarise(probe, scores_RT, torch.ones(400, dtype=torch.long))
        for most in (1000, 2, 1):
            sums = document_sums(probe, scores_RT, most)
            for label, item in row["domains"].items():
                assert len(sums["tokens"][label]) <= most
                assert sum(sums["tokens"][label]) == item["tokens"]
                assert sum(sums["losses"][label]) / item["tokens"] == pytest.approx(item["loss"], abs=1e-4)


def test_a_long_document_counts_as_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "PART_TOKENS", 16)
    probe = text_probe("text", STREAMS, T, END, 1000)
    sums = document_sums(probe, scores_of(probe, 1))
    assert sums["tokens"]["law"] == [16, 13, 16, 16, 9]
    assert sums["tokens"]["code"] == [16, 8, 10, 16, 4]


def simulated(random: np.random.Generator, shared: bool = False) -> tuple[Sums, Sums]:
    """Two models on 30 documents of two domains; the difference of a document's tokens is the document's own."""
    mine: Sums = {"shares_documents": shared, "tokens": {}, "losses": {}}
    other: Sums = {"shares_documents": shared, "tokens": {}, "losses": {}}
    common = random.normal(0, 1, 30)
    for label in "ab":
        tokens = random.integers(5, 60, 30)
        change = 0.3 + (common if shared else random.normal(0, 1, 30))
        base = random.normal(3, 1, 30) * tokens
        for sums, losses in ((mine, base + change * tokens), (other, base)):
            sums["tokens"][label], sums["losses"][label] = tokens.tolist(), losses.tolist()
    return mine, other


@pytest.mark.parametrize("shared", [False, True])
def test_the_standard_error_is_the_spread_over_drawings_of_documents(shared: bool) -> None:
    random = np.random.default_rng(0)
    found = [paired_difference(*simulated(random, shared)) for _ in range(800)]
    values = [item.difference for item in found if item]
    errors = [item.standard_error for item in found if item and item.standard_error is not None]
    assert len(errors) == 800
    assert np.mean(values) == pytest.approx(0.3, abs=0.03)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.08)
    covered = [abs(v - 0.3) < 2 * e for v, e in zip(values, errors, strict=True)]
    assert 0.91 < np.mean(covered) < 0.98


def test_a_difference_needs_the_same_text_and_an_error_two_documents() -> None:
    mine, other = simulated(np.random.default_rng(1))
    assert paired_difference(mine, {**other, "tokens": {"a": [1], "b": [2]}}) is None
    one = {"shares_documents": False, "tokens": {"a": [4]}, "losses": {"a": [8.0]}}
    alone = paired_difference(one, {**one, "losses": {"a": [6.0]}})
    assert alone is not None
    assert (alone.difference, alone.standard_error, alone.is_clear) == (0.5, None, False)
    same = paired_difference(mean_sums([mine, mine]), mine)
    assert same is not None
    assert same.difference == pytest.approx(0, abs=1e-12)


def test_the_oracle_takes_the_best_expert_of_the_domain_on_every_probe() -> None:
    probes, lengths = domain_probes(STREAMS, T, END, 1000, 50), torch.ones(400, dtype=torch.long)
    rows = {}
    for expert, label in enumerate(LABELS):  # each is good at its own domain
        scores = {name: scores_of(probe, expert) for name, probe in probes.items()}
        for name, probe in probes.items():
            scores[name][probe.labels_RT == LABELS.index(label)] *= 0.01
        rows[label] = full_row(probes, scores, lengths)
    best = oracle(rows)
    for label in LABELS:
        assert best["domains"][label] == rows[label]["domains"][label]
        assert best["probes"]["switch"]["domains"][label] == rows[label]["probes"]["switch"]["domains"][label]
        assert best["documents"]["mixed"]["losses"][label] == rows[label]["documents"]["mixed"]["losses"][label]


def results_with(change: float, error: float | None, probe: str = "switch") -> dict[str, Any]:
    item = {
        "difference": change,
        "standard_error": error,
        "documents": 9,
        "is_clear": bool(error and abs(change) > 2 * error),
    }
    worst = {**item, "domains": {"law": item}}
    return {"differences": {"backbone": {probe: worst}}}


def test_doubts_name_what_is_worse_and_what_is_not_certain() -> None:
    (whole, domain) = doubts(results_with(0.25, 0.01))
    assert whole == "behind a switch of domain it is worse than the backbone by 0.2500 ± 0.0100"
    assert "law (by 0.2500 ± 0.0100)" in domain
    assert doubts(results_with(-0.25, 0.01)) == []
    assert "within two standard errors" in doubts(results_with(-0.01, 0.01, "text"))[0]
    assert doubts(results_with(math.nan, None)) == []
    assert doubts({}) == []


def test_differences_are_of_every_probe_that_both_have() -> None:
    mine, other = simulated(np.random.default_rng(2))
    found = differences({"text": mine, "switch": mine}, {"text": other})
    assert list(found) == ["text"]
    assert found["text"]["difference"] == pytest.approx(
        np.mean([item["difference"] for item in found["text"]["domains"].values()])
    )
