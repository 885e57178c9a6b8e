"""Examples in rows: none sees another, what is learned is what the mask says, and a position restarts the stream."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from modularforge.config import ModelConfig
from modularforge.data.loader import IGNORED_TARGET
from modularforge.data.packing import PADDING, Rows, example_batches, mixed_example_batches, ordered_batches
from modularforge.data.token_files import ExampleTokens
from modularforge.errors import TrainingError
from modularforge.model import text_router as router_module
from modularforge.model.backbone import Decoder, KeyValueCache, build_backbone
from modularforge.model.moe import build_moe, moe_layers
from modularforge.model.text_router import FilterSettings, TextRouter
from modularforge.tasks.instruction import INSTRUCTION

V, T = 40, 12
SHAPE = ModelConfig(width=16, layers=2, heads=4, kv_heads=2, ffn_width=24, context_length=32)
# Prompts of 2 to 4 tokens behind a first one, responses of 1 to 3 and their end.
LENGTHS = ((3, 2), (2, 4), (4, 3), (3, 3), (2, 2), (4, 4), (3, 4))
END = 3
MODELS = ["llama", "qwen3", "mixture", "text router", "one choice for an example"]


def examples(lengths=LENGTHS, seed: int = 0) -> ExampleTokens:
    random = np.random.default_rng(seed)
    tokens, learned, ends = [], [], [0]
    for prompt, response in lengths:
        tokens += [2, *random.integers(4, V, prompt - 1), *random.integers(4, V, response - 1), END]
        learned += [0] * prompt + [1] * response
        ends.append(len(tokens))
    return ExampleTokens(np.array(tokens, np.uint16), np.array(ends), np.array(learned, np.uint8))


def text_router() -> TextRouter:
    torch.manual_seed(5)
    tables = {
        "token": torch.randn(V, 2),
        "context": torch.randn(V, 2),
        "keys": torch.arange(0, V * V, 7),
        "pair": torch.randn(len(range(0, V * V, 7)), 2),
        "prior": torch.tensor([0.2, 0.3, 0.5]).log(),
        "ends": torch.tensor([END]),
    }
    return TextRouter(tables, FilterSettings(0.5, 0.01, 0.3, 1.0))


def models() -> list[Decoder]:
    torch.manual_seed(1)
    dense = build_backbone(SHAPE, V)
    qwen = build_backbone(SHAPE.model_copy(update={"family": "qwen3"}), V)
    mixture = build_moe(SHAPE, V, 3, 2)
    for layer in moe_layers(mixture):
        torch.nn.init.normal_(layer.gate.get_parameter("weight"))
    by_text = build_moe(SHAPE, V, 3, 2)
    by_text.text_router = text_router()
    holding = build_moe(SHAPE, V, 3, 2)
    holding.text_router = text_router()
    holding.text_router.holds = True
    return [model.eval() for model in (dense, qwen, mixture, by_text, holding)]


@pytest.fixture(autouse=True)
def _decided_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that holds its choice holds it within these short examples."""
    monkeypatch.setattr(router_module, "DECIDED_WITHIN", 3)


@pytest.mark.parametrize("model", models(), ids=MODELS)
def test_examples_of_a_row_are_read_as_if_each_stood_alone(model: Decoder) -> None:
    stream = examples()
    rows = Rows(stream, T, seed=1)
    assert max(map(len, rows.examples)) > 1
    tensors = rows.tensors(range(len(rows)))
    with torch.no_grad():
        logits_RTV = model(tensors["inputs"], examples_BT=tensors["examples"])
        for row, members in enumerate(rows.examples):
            for number, index in enumerate(members):
                ids, _, _ = rows.example(index)
                alone_TV = model(torch.tensor([ids[:-1].astype(int).tolist()]))[0]
                packed_TV = logits_RTV[row][tensors["examples"][row] == number]
                torch.testing.assert_close(packed_TV, alone_TV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", models(), ids=MODELS)
def test_a_row_padded_on_the_left_continues_as_without(model: Decoder) -> None:
    ids, cache, padded_cache = [2, 9, 11, 30], KeyValueCache(), KeyValueCache()
    padded = torch.tensor([[0, 0, 0, *ids]]), torch.tensor([[PADDING] * 3 + [0] * len(ids)])
    with torch.no_grad():
        for token in (7, 8, END, 5):
            plain = model(torch.tensor([ids]), cache)[0, -1]
            left = model(padded[0], padded_cache, examples_BT=padded[1])[0, -1]
            torch.testing.assert_close(left, plain, atol=1e-5, rtol=1e-5)
            ids, padded = [token], (torch.tensor([[token]]), torch.zeros(1, 1, dtype=torch.long))


def test_targets_are_the_responses_and_their_ends_alone() -> None:
    stream = ExampleTokens(
        np.array([2, 10, 11, 20, 21, END, 2, 12, 22, END], np.uint16),
        np.array([0, 6, 10]),
        np.array([0, 0, 0, 1, 1, 1, 0, 0, 1, 1], np.uint8),
    )
    tensors = Rows(stream, 10).tensors([0])
    none = IGNORED_TARGET
    assert tensors["inputs"].tolist() == [[2, 10, 11, 20, 21, 2, 12, 22]]
    assert tensors["targets"].tolist() == [[none, none, 20, 21, END, none, 22, END]]
    assert tensors["examples"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]


def test_the_loss_is_the_mean_over_learned_tokens_whatever_the_pieces_and_ranks() -> None:
    model, rows = models()[0], Rows(examples(LENGTHS * 4), T, seed=3)
    whole = next(example_batches(rows, 8, seed=5))[0]
    with torch.no_grad():
        log_RTV = model(whole["inputs"], examples_BT=whole["examples"]).log_softmax(-1)
        is_learned = whole["targets"] != IGNORED_TARGET
        naive = -log_RTV.gather(2, whole["targets"].clamp(min=0)[..., None])[..., 0][is_learned].mean()
        pieces = [{name: tensor.chunk(4)[k] for name, tensor in whole.items()} for k in range(4)]
        by_piece = sum(INSTRUCTION.loss(model, piece) for piece in pieces) / 4
        ranks = [next(example_batches(rows, 8, seed=5, rank=rank, world=2))[0] for rank in range(2)]
        by_rank = sum(INSTRUCTION.loss(model, tensors) for tensors in ranks) / 2
    for found in (INSTRUCTION.loss(model, whole), by_piece, by_rank):
        torch.testing.assert_close(torch.as_tensor(found), naive, atol=1e-5, rtol=1e-5)
    assert len({int((piece["targets"] != IGNORED_TARGET).sum()) for piece in pieces}) > 1


def test_a_position_restarts_the_stream_and_every_epoch_has_every_example_once() -> None:
    rows = Rows(examples(LENGTHS * 5), T, seed=2)
    assert sorted(itertools.chain(*rows.examples)) == list(range(35))
    batches = list(itertools.islice(example_batches(rows, 4, seed=9), 12))
    for start in (3, 7):
        position = batches[start - 1][1]
        again, place = next(example_batches(rows, 4, seed=9, start_position=position))
        assert place == batches[start][1]
        assert all(torch.equal(again[name], tensor) for name, tensor in batches[start][0].items())


def test_a_mixture_has_the_very_rows_of_its_parts() -> None:
    parts = [Rows(examples(LENGTHS * 4, seed), T, seed=seed) for seed in (1, 2)]
    mixed = itertools.chain(*(rows(item) for item, _ in mixed_example_batches(parts, [1, 2], 8, 4, seed=3)))
    alone = [example_batches(part, 4, seed=k) for part, k in zip(parts, (1, 2), strict=True)]
    wanted = itertools.chain(*(rows(item) for stream in alone for item, _ in itertools.islice(stream, 2)))
    assert sorted(mixed) == sorted(wanted)


def rows(tensors) -> list[list[int]]:
    pairs = zip(tensors["inputs"].tolist(), tensors["examples"].tolist(), strict=True)
    return [[token for token, number in zip(*pair, strict=True) if number >= 0] for pair in pairs]


def test_without_packing_each_example_has_a_row() -> None:
    found = Rows(examples(), T, seed=1, packs=False)
    assert found.examples == [[index] for index in range(len(LENGTHS))]
    assert set(found.tensors(range(7))["examples"].flatten().tolist()) == {0, PADDING}


def test_a_long_prompt_loses_its_beginning_and_a_long_response_its_end() -> None:
    tokens = [2, *range(10, 30), 30, 31, END, 2, 5, 6, 7, 8, *range(10, 30), END, 2, 5, 9, END]
    learned = [0] * 21 + [1] * 3 + [0] * 5 + [1] * 21 + [0, 0, 1, 1]
    stream = ExampleTokens(np.array(tokens, np.uint16), np.array([0, 24, 50, 54]), np.array(learned, np.uint8))
    found = Rows(stream, 8)
    assert found.long_examples.tolist() == [0, 1]
    assert found.cut_responses == 1
    assert found.example(0)[0].tolist() == [2, 25, 26, 27, 28, 29, 30, 31, END], "what starts a text stays"
    assert found.example(0)[1].sum() == 3
    assert found.example(1)[0].tolist() == [7, 8, 10, 11, 12, 13, 14, 15, 16]
    assert found.targets_W.sum() == sum(int((batch["targets"] >= 0).sum()) for batch in ordered_batches(found, 2))


def text(lengths=(30, 4, 7, 2, 1, 12, 13, 5, 26), seed: int = 0) -> ExampleTokens:
    """Documents of text, some longer than a row; one of a single token predicts nothing."""
    random = np.random.default_rng(seed)
    tokens = [[2, *random.integers(4, V, max(0, length - 2)), END][:length] for length in lengths]
    return ExampleTokens.of_text(np.concatenate(tokens).astype(np.uint16), np.cumsum([0, *lengths]))


def test_of_documents_every_token_but_the_first_is_predicted_once_whatever_their_length() -> None:
    stream = text()
    for seed in (None, 1):
        rows = Rows(stream, T, seed)
        tensors = rows.tensors(range(len(rows)))
        predicted = tensors["targets"][tensors["targets"] != IGNORED_TARGET].tolist()
        wanted = [stream.tokens[a + 1 : b].tolist() for a, b in itertools.pairwise(stream.offsets)]
        assert sorted(predicted) == sorted(itertools.chain(*wanted))
        assert rows.lengths_N.max() == T
        assert all(rows.lengths_N[row].sum() == count for row, count in zip(rows.examples, rows.targets_W, strict=True))
    pieces = [piece.tolist() for piece in (stream.tokens[a:b] for a, b in rows.spans_N2[:3])]
    document = stream.tokens[:30].tolist()
    assert pieces == [document[:13], document[12:25], document[24:]], "a piece goes on where the one before it ends"
    facts = rows.text_facts
    assert (facts["count"], facts["cut"], facts["pieces"]) == (9, 2, 6)
    assert facts["filled"] == pytest.approx(sum(map(len, wanted)) / (len(rows) * T), abs=1e-4)


@pytest.mark.parametrize("model", models(), ids=MODELS)
def test_the_loss_of_a_document_does_not_depend_on_its_neighbours(model: Decoder) -> None:
    """Neither attention, nor positions, nor what a router knows of the text come from the document before it."""
    stream = text()
    rows = Rows(stream, T, seed=1)
    row = next(row for row in rows.examples if len(row) > 1)
    place = rows.examples.index(row)
    ids, _, _ = rows.example(row[-1])
    alone = Rows(ExampleTokens.of_text(ids, np.array([0, len(ids)])), T).tensors([0])
    tensors = rows.tensors([place])
    other = tensors["inputs"].clone()
    is_last = tensors["examples"] == len(row) - 1
    other[~is_last & (tensors["examples"] >= 0)] = 7
    with torch.no_grad():
        found = [
            model(inputs, examples_BT=batch["examples"], targets_BT=batch["targets"], reduction="none")
            for inputs, batch in ((tensors["inputs"], tensors), (other, tensors), (alone["inputs"], alone))
        ]
        stream_loss = model(tensors["inputs"], targets_BT=tensors["targets"], reduction="none")[is_last]
    own, changed, single = found[0][is_last], found[1][is_last], found[2][alone["examples"] == 0]
    assert torch.equal(own, changed)
    torch.testing.assert_close(own, single, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(stream_loss, own, atol=1e-5), "without the mask it does depend on them"


def test_documents_restart_at_a_position_on_any_number_of_ranks() -> None:
    rows = Rows(text((30, 4, 7, 2, 12, 13, 5, 26) * 4), T, seed=2)
    batches = list(itertools.islice(example_batches(rows, 4, seed=9), 9))
    for start in (3, 6):
        parts = [next(example_batches(rows, 4, 9, batches[start - 1][1], rank, 2)) for rank in range(2)]
        assert {position for _, position in parts} == {batches[start][1]}
        width = batches[start][0]["inputs"].shape[1]
        again = [torch.nn.functional.pad(item["inputs"], (0, width - item["inputs"].shape[1])) for item, _ in parts]
        assert torch.equal(torch.cat(again), batches[start][0]["inputs"])


def test_the_first_tokens_of_documents_may_end_within_one() -> None:
    stream = text((5, 4, 30))
    assert [len(stream.first(count)) for count in (3, 5, 12, 39, 100)] == [3, 5, 12, 39, 39]
    assert [stream.first(count).num_examples for count in (3, 5, 6, 12, 100)] == [1, 1, 2, 3, 3]
    joined = ExampleTokens.joined([stream.first(7), stream.first(3)])
    assert joined.is_text
    assert joined.offsets.tolist() == [0, 5, 7, 10]


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(TrainingError, match="partition 1 must fill one batch of 64 sequences, but its examples fill"):
        next(example_batches(Rows(examples(), T, 0), 64, seed=0, name="partition 1"))
