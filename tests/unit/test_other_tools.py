"""Somebody who comes from another tool is told what its words are called here."""

from __future__ import annotations

from typing import Any

import pytest

from modularforge.config_files import load_config, make_config, setting_names
from modularforge.errors import ConfigError
from modularforge.other_tools import OURS, SIGNS, tool_of
from tests.conftest import ROOT

SOURCES = {"data": {"sources": [{"name": "x", "train": "x.txt"}]}}
AXOLOTL = {
    "base_model": "meta-llama/Llama-3.2-1B",
    "datasets": [{"path": "teknium/GPT4-LLM-Cleaned", "type": "alpaca"}],
    "sequence_len": 2048,
    "micro_batch_size": 2,
    "num_epochs": 1,
    "learning_rate": 0.0002,
}


def mistake(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        make_config(values, "my.yaml")
    return str(error.value)


@pytest.mark.parametrize(
    ("section", "word", "setting"),
    [
        ("", "batch_size", "backbone.batch_size"),
        ("", "learning_rate", "backbone.peak_learning_rate"),
        ("", "sequence_len", "model.context_length"),
        ("", "epochs", "backbone.steps"),
        ("", "datasets", "data.sources"),
        ("", "hidden_size", "model.width"),
        ("", "use_wandb", "metrics.writers"),
        ("", "fsdp", "training.parallel"),  # not seed
        ("training", "gradient_checkpointing", "training.recompute"),
        ("experts", "learning_rate", "experts.peak_learning_rate"),
        ("experts", "epochs", "experts.steps"),
        ("training", "batch_size", "backbone.batch_size"),
        ("model", "n_layer", "model.layers"),
        ("model", "steps", "backbone.steps"),
        ("training", "experts_per_token", "assembly.experts_per_token"),
        ("model", "wdth", "model.width"),
    ],
)
def test_a_word_of_another_tool_is_told_as_ours(section: str, word: str, setting: str) -> None:
    values = {**SOURCES, section: {word: 1}} if section else {**SOURCES, word: 1}
    dotted = f"{section}.{word}" if section else word
    assert f"{dotted} is not a setting; did you mean {setting}?" in mistake(values)


def test_every_hint_names_a_setting_and_no_word_is_one_of_ours() -> None:
    assert {*OURS.values()} <= {*setting_names(), "data.sources"}
    assert not {*OURS} & {name.rsplit(".", 1)[-1] for name in setting_names(in_lists=False)}
    top = {name.split(".")[0] for name in setting_names()}
    assert not {name for signs in SIGNS.values() for name in signs} & top


def test_a_mistake_of_the_command_line_is_not_told_of_the_file_alone() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(str(ROOT / "configs/quickstart.yaml"), ["batch_size=4", "seed=1"])
    assert str(error.value).splitlines()[0].endswith("quickstart.yaml with --set batch_size, seed has 1 mistake(s):")


def test_the_settings_of_another_tool_are_known_for_what_they_are() -> None:
    said = mistake(AXOLOTL)
    assert said.startswith("my.yaml, which looks like a config of axolotl, has ")
    assert "base_model is not a setting; did you mean model.pretrained?" in said
    assert tool_of({"merge_method": "linear", "models": []}) == "mergekit"
    assert tool_of({"model_name": "pythia-14m", "out_dir": "out", "train": {"max_steps": 10}}) == "litgpt"
    assert mistake({**SOURCES, "learning_rate": 1}).startswith("my.yaml has 1 mistake(s)"), "one word is no tool"
