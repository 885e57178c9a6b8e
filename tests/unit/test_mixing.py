"""Mixtures of sources: shares by weight and temperature, limits in epochs, and a position that says all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modularforge.config import Config
from modularforge.config_files import make_config
from modularforge.data.loader import batches, mixed_batches
from modularforge.data.mixing import MixedOrder, mixture_of, order_facts
from modularforge.data.packing import Rows, example_batches
from modularforge.data.token_files import ExampleTokens, TokenFile
from modularforge.errors import ConfigError, DataError, TrainingError
from tests.conftest import tiny_values

T, NAMES = 4, ("law", "code", "prose")
SIZES = (8, 80, 32)  # windows of each source


def token_file(sizes: tuple[int, ...] = SIZES) -> TokenFile:
    """Documents of 8 tokens, whose ids say the source: 100 and more, 200 and more, 300 and more."""
    documents = [
        (label, np.arange(8) + 100 * (label + 1)) for label, size in enumerate(sizes) for _ in range(size // 2)
    ]
    tokens = np.concatenate([ids for _, ids in documents] + [np.array([999])]).astype(np.uint16)
    labels = [label for label, _ in documents]
    offsets = np.arange(len(documents) + 1) * 8
    offsets[-1] += 1  # a window needs the token behind it
    return TokenFile("train", tokens, offsets.astype(np.int64), np.array(labels, np.uint16))


def config_of(
    mix: list[dict[str, Any]], temperature: float | None = 1.0, everywhere: Sequence[str] = (), **changes: Any
) -> Config:
    values = tiny_values(Path("unused"), **changes)
    sources = [{"name": name, "train": f"{name}.jsonl"} for name in NAMES]
    values["data"] = {**values["data"], "sources": sources, "mix": mix, "temperature": temperature}
    values["partition"] = {"method": "random", "everywhere": [*everywhere]}
    return make_config(values, "tests")


def order_of(mix: list[dict[str, Any]], temperature: float | None = 1.0, seed: int = 0) -> MixedOrder:
    file = token_file()
    mixture = mixture_of(config_of(mix, temperature), file, NAMES, "the training data")
    assert mixture is not None
    return MixedOrder(mixture.of_places(np.arange(sum(SIZES)) * T), seed, mixture)


def shares(order: MixedOrder, count: int) -> list[float]:
    return [item["share"] for item in order.facts(count).values()]


def test_nothing_is_mixed_by_default() -> None:
    assert mixture_of(config_of([]), token_file(), NAMES, "x") is None


def test_shares_are_weights_times_tokens_to_the_power_of_one_by_the_temperature() -> None:
    assert shares(order_of([{"source": "law", "weight": 2}]), 1280) == pytest.approx(
        [16 / 128, 80 / 128, 32 / 128], abs=0.01
    )
    roots = np.sqrt(SIZES)
    assert shares(order_of([], 2.0), 1200) == pytest.approx(list(roots / roots.sum()), abs=0.01)
    by_weight = [{"source": "law", "weight": 3}, {"source": "prose", "weight": 0}]
    assert shares(order_of(by_weight, None), 1200) == pytest.approx([3 / 4, 1 / 4, 0], abs=0.01)


def test_a_source_comes_whole_before_any_of_it_comes_again() -> None:
    order = order_of([{"source": "law", "weight": 10}])
    found = order.windows(0, 1000)
    for own in order.own:
        mine = found[np.isin(found, own)]
        for first in range(0, len(mine) - len(own), len(own)):
            assert sorted(mine[first : first + len(own)]) == own.tolist()
    assert order.facts(1000)["law"]["epochs"] == pytest.approx(1000 * 80 / 192 / 8, rel=0.05)
    assert order.facts(1000)["law"]["windows"] == int(np.isin(found, order.own[0]).sum()), "told is what was drawn"


def test_a_position_says_what_comes_wherever_reading_began() -> None:
    mix = [{"source": "law", "weight": 5, "epochs": 7.5}, {"source": "prose", "weight": 0.3}]
    whole = order_of(mix).windows(0, 900)
    for first, end in ((0, 1), (119, 121), (240, 480), (333, 900)):
        assert order_of(mix).windows(first, end).tolist() == whole[first:end].tolist()
    assert order_of(mix, seed=1).windows(0, 900).tolist() != whole.tolist()


def test_what_a_source_at_its_limit_leaves_goes_to_the_others() -> None:
    order = order_of([{"source": "law", "weight": 100, "epochs": 2}, {"source": "code", "epochs": 1.5}])
    drawn = order.drawn(600)
    assert drawn.tolist() == [16, 120, 600 - 136]
    limited = order_of([{"source": name, "epochs": 1.4} for name in NAMES])
    assert len(limited.windows(0, 167)) == 11 + 112 + 44
    with pytest.raises(TrainingError, match=r"must have 168 sequences, but data\.mix lets only 167 be drawn"):
        limited.windows(0, 200)


def test_batches_of_a_mixture_restart_on_any_number_of_ranks() -> None:
    file = token_file()
    mixture = mixture_of(config_of([{"source": "law", "weight": 6}]), file, NAMES, "x")
    whole = list(itertools.islice(batches(file.tokens, T, 4, 3, mixture=mixture), 60))
    inputs = torch.cat([item[0] for item in whole])
    assert float((inputs[:, 0] < 200).float().mean()) == pytest.approx(48 / 160, abs=0.03)
    parts = [next(batches(file.tokens, T, 4, 3, whole[40][2], rank, 2, mixture=mixture)) for rank in range(2)]
    assert torch.equal(torch.cat([part[0] for part in parts]), whole[41][0])
    mixed = mixed_batches([file.tokens], [3], 240, T, 4, seed=9, mixtures=[mixture])
    assert sorted(torch.cat([item[0] for item in mixed]).tolist()) == sorted(inputs.tolist())


def test_packed_documents_of_a_mixture_share_no_row_with_another_source() -> None:
    file = token_file()
    mixture = mixture_of(config_of([{"source": "law", "weight": 6}]), file, NAMES, "x")
    rows = Rows(ExampleTokens.of_text(file.tokens, file.offsets), 20, 3, mixture=mixture)
    assert sorted(itertools.chain(*rows.examples)) == list(range(file.num_documents))
    assert all(len({int(file.labels[index]) for index in row}) == 1 for row in rows.examples)
    order = rows.order(5)
    assert order_facts(order, 400)["mixture"]["law"]["share"] == pytest.approx(6 * 8 / 160, abs=0.06)
    found = list(itertools.islice(example_batches(rows, 4, 5), 5))
    again = next(example_batches(rows, 4, 5, found[3][1]))
    assert torch.equal(again[0]["inputs"], found[4][0]["inputs"])


WRONG: dict[str, tuple[list[dict[str, Any]], str]] = {
    "unknown": ([{"source": "poems"}], "data.mix must name data.sources .* but names 'poems'"),
    "twice": ([{"source": "law"}, {"source": "law"}], "must name each source once, but names 'law' 2 times"),
    "nothing": ([{"source": name, "weight": 0} for name in NAMES], "must leave some source a weight above 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mixture_of_nothing_gets_a_sentence(case: str) -> None:
    mix, sentence = WRONG[case]
    with pytest.raises(ConfigError, match=sentence):
        config_of(mix)


@pytest.mark.parametrize(("labels", "sentence"), [(["poems"], "but names 'poems'"), (list(NAMES), "but names all")])
def test_labels_for_everybody_are_those_of_sources_and_not_all(labels: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"partition.everywhere must .*{sentence}"):
        config_of([], everywhere=labels)


def test_a_partition_of_nothing_that_is_drawn_gets_a_sentence() -> None:
    mixture = mixture_of(config_of([{"source": "law", "weight": 0}]), token_file((8, 0, 0)), NAMES, "partition 0")
    assert mixture is not None
    with pytest.raises(
        DataError, match=r"partition 0 must have text of a source that is drawn, .*\(law\) the weight 0"
    ):
        _ = mixture.shares_G
