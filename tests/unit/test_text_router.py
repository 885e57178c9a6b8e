"""Routing by tokens alone: counts, what they are evidence of, the filter, and the mean over recent tokens in a head."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from modularforge.config import ModelConfig, RopeScalingConfig
from modularforge.errors import DataError
from modularforge.evaluation.probes import text_probe
from modularforge.evaluation.scoring import carried_routing
from modularforge.model.backbone import rotary_frequencies
from modularforge.model.hub_config import special_ids
from modularforge.model.text_router import TextRouter, load_text_router
from modularforge.routing import text_counts
from modularforge.routing.kernel import HeadNorms, angles_of, bell, kernel_head
from modularforge.routing.text_counts import TextCounts, count_text, load_counts, only_tokens, save_counts
from modularforge.routing.text_evidence import (
    BACKOFF_TOKENS,
    FILTER,
    SMOOTHING_TOKENS,
    Texts,
    pair_evidence,
    slot_priors,
    token_evidence,
    write_tables,
)

VOCABULARY, END = 40, 3
RANDOM = np.random.default_rng(0)
# Three texts with words of their own: each takes most of its tokens from ten of the forty.
STREAMS = [
    np.where(
        RANDOM.random(6000) < 0.7, RANDOM.integers(4 + 10 * part, 14 + 10 * part, 6000), RANDOM.integers(4, 40, 6000)
    )
    for part in range(3)
]


def counts_of_all(pairs: int = 2000) -> list[TextCounts]:
    return [count_text(stream, VOCABULARY, (0, 1, 2, END), 10_000, pairs) for stream in STREAMS]


def router_of(tmp_path: Path, public: bool = True, pairs: int = 2000) -> TextRouter:
    background = count_text(np.concatenate(STREAMS), VOCABULARY, (0, 1, 2, END), 20_000, 4000)
    write_tables(
        tmp_path / "x.tables", Texts(counts_of_all(), background, (0, 1, 2, END), (END,)), public, most_pairs=pairs
    )
    return load_text_router(tmp_path / "x.tables")


def test_counts_are_those_of_a_walk_over_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_counts, "TOKENS_AT_ONCE", 1 << 20)
    text = np.array([5, 6, 5, 6, END, 7, 5, 6], np.uint16)
    found = count_text(text, VOCABULARY, (END,), 100, 100)
    assert {int(token): found.tokens_V[token] for token in np.flatnonzero(found.tokens_V)} == {5: 3, 6: 3, 7: 1}
    naive: dict[int, int] = {}
    for before, token in pairwise(text.tolist()):
        if END not in (before, token):
            naive[before * VOCABULARY + token] = naive.get(before * VOCABULARY + token, 0) + 1
    assert dict(zip(found.keys_P.tolist(), found.pairs_P.tolist(), strict=True)) == dict(sorted(naive.items()))


def test_pieces_give_the_counts_of_the_whole_but_for_pairs_across_them(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = count_text(STREAMS[0], VOCABULARY, (), 10_000, 2000)
    monkeypatch.setattr(text_counts, "TOKENS_AT_ONCE", 1000)
    pieces = count_text(STREAMS[0], VOCABULARY, (), 10_000, 2000)
    assert np.array_equal(whole.tokens_V, pieces.tokens_V)
    assert whole.pairs_P.sum() - pieces.pairs_P.sum() == 5
    part = count_text(STREAMS[0], VOCABULARY, (), 3000, 2000)
    assert part.tokens_V.sum() == 3000
    few = count_text(STREAMS[0], VOCABULARY, (), 10_000, 50)
    assert len(few.keys_P) == 50
    assert few.pairs_P.min() >= np.sort(pieces.pairs_P)[-50] - 1


def test_a_text_without_tokens_or_with_one_has_counts() -> None:
    for text in (np.empty(0, np.int64), np.array([5])):
        found = count_text(text, VOCABULARY, (END,), 100, 100)
        assert found.tokens_V.sum() == len(text)
        assert not found.has_pairs


def test_stored_counts_are_read_back_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    counts = counts_of_all()[0]
    save_counts(tmp_path / "a", counts)
    again = load_counts(tmp_path / "a")
    assert np.array_equal(again.keys_P, counts.keys_P)
    assert np.array_equal(again.tokens_V, counts.tokens_V)
    save_counts(tmp_path / "b", TextCounts(counts.tokens_V, counts.keys_P[::-1].copy(), counts.pairs_P))
    (tmp_path / "c").write_bytes((tmp_path / "a").read_bytes()[:-9])
    for name in ("b", "c"):
        with pytest.raises(DataError, match="must be a file of token counts"):
            load_counts(tmp_path / name)


def test_evidence_of_pairs_is_naive_bayes_backed_off_to_tokens() -> None:
    counts = counts_of_all()
    background = count_text(np.concatenate(STREAMS), VOCABULARY, (END,), 20_000, 4000)
    found = pair_evidence(counts, background, (END,), 5000)
    share_V = background.tokens_V / background.tokens_V.sum() + 0.1 / background.tokens_V.sum()
    share_V /= share_V.sum()
    size = np.mean([item.tokens_V.sum() for item in counts])
    table = {int(key): row for key, row in zip(found.keys_P, found.pair_PE, strict=True)}

    def log_p(item: TextCounts, own_V: np.ndarray, before: int, token: int, scale: float = 1.0) -> float:
        often = dict(zip(item.keys_P.tolist(), item.pairs_P.tolist(), strict=True))
        after = sum(value for key, value in often.items() if key // VOCABULARY == before) * scale
        pair = often.get(before * VOCABULARY + token, 0.0) * scale
        return math.log((pair + BACKOFF_TOKENS * own_V[token]) / (after + BACKOFF_TOKENS))

    for before, token in ((5, 6), (20, 7), (39, 33)):
        for expert, item in enumerate(counts):
            own_V = item.tokens_V + SMOOTHING_TOKENS * share_V + item.tokens_V.sum() * share_V.min()
            own_V /= own_V.sum()
            expected = log_p(item, own_V, before, token)
            expected -= log_p(background, share_V, before, token, size / background.tokens_V.sum())
            mine = found.token_VE[token, expert] + found.context_VE[before, expert]
            mine += float(table.get(before * VOCABULARY + token, np.zeros(3))[expert])
            assert mine == pytest.approx(expected, abs=5e-3)  # pairs are kept in half precision


def test_special_tokens_say_nothing_and_the_most_telling_pairs_stay() -> None:
    counts = counts_of_all()
    found = pair_evidence(counts, None, (0, END, 7), 60)
    assert not found.token_VE[[0, END, 7]].any()
    assert not found.context_VE[[0, END, 7]].any()
    assert len(found.keys_P) == 60
    every = pair_evidence(counts, None, (0, END, 7), 5000)
    spread = np.abs(np.asarray(every.pair_PE, np.float32)).max(axis=1)
    kept = np.isin(every.keys_P, found.keys_P)
    assert spread[kept].mean() > spread[~kept].mean()


def test_the_filter_is_the_posterior_of_a_text_that_may_switch(tmp_path: Path) -> None:
    router = router_of(tmp_path)
    tokens = STREAMS[1][:30].copy()
    tokens[12] = END
    logits_1TR, _ = router(torch.from_numpy(tokens)[None])
    evidence_1TR = router.evidence(torch.tensor([[-1, *tokens[:-1]]]), torch.from_numpy(tokens)[None])
    prior_R = router.get_buffer("prior_R").double().exp().numpy()
    probability_R = prior_R
    for place in range(len(tokens)):
        share = FILTER["switch_at_end"] if place and tokens[place - 1] == END else FILTER["switch"]
        probability_R = (1 - share) * probability_R + share * prior_R
        probability_R = probability_R * np.exp(FILTER["strength"] * evidence_1TR[0, place].double().numpy())
        probability_R /= probability_R.sum()
        expected = FILTER["sharpness"] * np.log(probability_R)
        assert np.allclose(logits_1TR[0, place].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("public", [False, True])
def test_the_router_follows_a_text_that_turns_to_another_domain(public: bool, tmp_path: Path) -> None:
    router = router_of(tmp_path, public)
    assert (router.slots, router.has_public) == (3 + public, public)
    text = torch.from_numpy(np.concatenate([STREAMS[0][:64], STREAMS[2][:64]]))[None]
    best_T = router(text)[0][0].argmax(dim=-1)
    assert (best_T[16:64] == 0 + public).float().mean() > 0.9
    assert (best_T[84:] == 2 + public).float().mean() > 0.9


def test_where_nothing_speaks_for_anyone_the_public_expert_comes_first(tmp_path: Path) -> None:
    for tokens in ([[0, 2]], [[VOCABULARY + 5, VOCABULARY + 9]]):
        logits_BTR, _ = router_of(tmp_path)(torch.tensor(tokens))
        assert logits_BTR.argmax(dim=-1).tolist() == [[0, 0]]
        order = logits_BTR[0, -1].diff()
        assert order.abs().min() > 1e-5  # no accident of the sort
    assert np.isclose(np.exp(slot_priors(np.array([-1.0, -0.5]), True)).sum(), 1.0)


def test_state_carried_over_pieces_gives_the_logits_of_the_whole(tmp_path: Path) -> None:
    router = router_of(tmp_path)
    tokens_BT = torch.from_numpy(np.stack([stream[:64] for stream in STREAMS]))
    whole_BTR, _ = router(tokens_BT)
    state, pieces = None, []
    for piece_BT in tokens_BT.split([1, 30, 33], dim=1):
        logits_BTR, state = router(piece_BT, state)
        pieces.append(logits_BTR)
    assert torch.allclose(torch.cat(pieces, dim=1), whole_BTR, atol=1e-6)
    rows_BTR, _ = router.over_windows(tokens_BT[0].view(4, 16))
    assert torch.allclose(rows_BTR.reshape(64, -1), whole_BTR[0], atol=1e-6)


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    router_of(tmp_path)
    content = (tmp_path / "x.tables").read_bytes()
    for damaged in (
        b"",
        content[:-5],
        content.replace(rb"format\": 1", rb"format\": 9"),
        content.replace(b"0.003", b"1.003"),
    ):
        assert damaged != content
        (tmp_path / "x.tables").write_bytes(damaged)
        with pytest.raises(DataError, match="must be the tables of a text router"):
            load_text_router(tmp_path / "x.tables")


SHAPES = {
    "plain": ModelConfig(width=48, heads=4, kv_heads=2, layers=2, ffn_width=64, context_length=256),
    "long": ModelConfig(width=256, heads=4, kv_heads=2, layers=2, ffn_width=64, context_length=8192, rope_theta=1e5),
    "llama3": ModelConfig(
        width=256, heads=4, kv_heads=2, layers=2, ffn_width=64, context_length=4096, rope_theta=1e5,
        rope_scaling=RopeScalingConfig(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                       original_max_position_embeddings=1024),
    ),
    "yarn": ModelConfig(
        width=256, heads=4, kv_heads=2, layers=2, ffn_width=64, context_length=4096,
        rope_scaling=RopeScalingConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024),
    ),
    "linear": ModelConfig(
        width=256, heads=4, kv_heads=2, layers=2, ffn_width=64, context_length=2048,
        rope_scaling=RopeScalingConfig(rope_type="linear", factor=2.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_the_bell_is_half_at_some_twenty_tokens_and_does_not_come_back(name: str) -> None:
    model = SHAPES[name]
    angles, _ = rotary_frequencies(model)
    mine = angles_of(model)
    assert np.abs(np.log(mine / angles.numpy())).max() < 0.35  # YaRN rounds where its ramp begins
    distance = np.arange(model.context_length)
    score = sum(
        strength * (np.cos(float(angles[pair]) * distance) - 1)
        for pair, strength in bell(mine, model.positions).items()
    )
    weight = np.exp(score)
    assert 14 <= np.argmax(weight < 0.5) <= 32
    assert weight[150:].max() < 1e-2
    assert weight[150:].sum() < 0.02 * weight.sum()


@pytest.mark.parametrize(("gain", "half", "share"), [(3.0, 32, 0.99), (1.5, 45, 0.95)])
def test_norms_of_queries_and_keys_bound_the_bell_but_leave_it_one(gain: float, half: int, share: float) -> None:
    model = SHAPES["plain"].model_copy(update={"family": "qwen3", "head_width": 64, "context_length": 2048})
    width, random = model.width_per_head, np.random.default_rng(1)
    gains = [random.uniform(gain, 1.2 * gain, width).astype(np.float32) for _ in range(2)]
    heads = kernel_head(model, HeadNorms(*gains))
    query, key = (head / np.sqrt(np.square(head).mean()) * gain for head, gain in zip(heads, gains, strict=True))
    assert all(np.square(head).mean() == pytest.approx(1.0, rel=1e-3) for head in heads)
    angles, back = angles_of(model), np.arange(model.positions)
    used = np.flatnonzero(query * key)
    assert set(used) == set(bell(angles, model.positions))
    score = sum(query[p] * key[p] / math.sqrt(width) * (np.cos(float(angles[p]) * back) - 1) for p in used)
    weight = np.exp(score)
    assert 14 <= np.argmax(weight < 0.5) <= half
    assert weight[:100].sum() > share * weight.sum()


def test_a_model_without_a_fitting_angle_takes_the_plain_mean() -> None:
    model = ModelConfig(width=8, heads=4, kv_heads=2, layers=1, ffn_width=8, context_length=32)
    assert not bell(angles_of(model), 32)
    query_H, key_H = kernel_head(model, HeadNorms(None, None))
    assert not query_H.any()
    assert not key_H.any()


def test_without_a_background_it_is_the_mean_of_the_partitions() -> None:
    counts = [only_tokens(np.array([8.0, 0.0, 2.0])), only_tokens(np.array([0.0, 80.0, 20.0]))]
    evidence_VE = token_evidence(counts)
    assert evidence_VE[0, 0] > 0 > evidence_VE[0, 1]
    assert evidence_VE[1, 1] > 0 > evidence_VE[1, 0]
    assert np.abs(evidence_VE[2]).max() < 5e-2  # as likely in both


def test_a_probes_windows_of_one_document_are_read_as_one_text(tmp_path: Path) -> None:
    router = router_of(tmp_path)
    streams = {"a": np.append(STREAMS[0][:79], [END, *STREAMS[0][200:220]]), "b": STREAMS[1][:50]}
    probe = text_probe("text", streams, 16, END, 1000)
    found_RTR = carried_routing(router, probe)
    lengths = [len(stream) - 1 for stream in streams.values()]
    first_RTR = found_RTR[: -(-lengths[0] // 16)].reshape(-1, router.slots)
    ids = torch.from_numpy(streams["a"][:-1].astype(np.int64))[None]
    # The end of a document is for the router to see; the next domain's text is another one.
    assert torch.allclose(first_RTR[: lengths[0]], router(ids)[0][0], atol=1e-6)
    other = torch.from_numpy(streams["b"][:-1].astype(np.int64))[None]
    rest_RTR = found_RTR[-(-lengths[0] // 16) :].reshape(-1, router.slots)
    assert torch.allclose(rest_RTR[: lengths[1]], router(other)[0][0], atol=1e-6)


@pytest.mark.parametrize("tokens", [600, 6000])
def test_text_of_the_background_speaks_for_nobody_however_much_was_counted(tokens: int) -> None:
    text = RANDOM.choice(np.arange(4, VOCABULARY), tokens, p=(weights := 1.0 / np.arange(1, 37)) / weights.sum())
    counts = count_text(text, VOCABULARY, (END,), 10_000, 5000)
    found = pair_evidence([counts], counts, (0, 1, 2, END), 5000)
    assert np.abs(found.token_VE).max() < 1e-2
    assert np.abs(found.context_VE).max() < 1e-3
    assert np.abs(found.pair_PE.astype(np.float32)).max() < 1e-2


def test_ids_outside_the_vocabulary_are_no_special_tokens() -> None:
    values = {"vocab_size": 10, "eos_token_id": [3, 12], "bos_token_id": 1, "pad_token_id": -1}
    tokenizer = b'{"added_tokens": [{"id": 0, "special": true}, {"id": 11, "special": true}]}'
    assert special_ids(values, tokenizer) == (0, 1, 3)
    with pytest.raises(DataError, match="must list its added tokens"):
        special_ids(values, b'{"added_tokens": [3]}')
