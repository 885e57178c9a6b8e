"""Kinds of expert and tasks are found by name, those of installed packages too, and results know their metrics."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modularforge import plugins
from modularforge.config import ModelConfig
from modularforge.errors import ConfigError, MismatchError
from modularforge.experts import kind
from modularforge.experts.ffn import FFN
from modularforge.model.backbone import build_backbone
from modularforge.tasks import task
from modularforge.tasks.text import TEXT, HeldOutText, TextExamples
from tests.conftest import tiny_config

PACKAGE = """
class Gating:
    name = "gating"

GATING = Gating()
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with a kind of its own, and one that would take the name of ours."""
    (tmp_path / "gating_package.py").write_text(PACKAGE)
    information = tmp_path / "gating_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: gating-package\nVersion: 1.0\n")
    points = "gating = gating_package:GATING\nffn = gating_package:GATING\n"
    (information / "entry_points.txt").write_text(f"[modularforge.experts]\n{points}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "gating_package", raising=False)


def test_a_kind_of_another_package_is_found_by_its_entry_point(installed: None) -> None:
    assert kind.find_kind("gating").name == "gating"
    assert kind.find_kind("ffn") is FFN, "ours keep their names"


def test_an_unknown_name_is_refused_with_those_that_there_are(installed: None) -> None:
    with pytest.raises(ConfigError, match=r"a kind of expert must be one of .*ffn, .*lora, .*but is 'none'"):
        kind.find_kind("none")
    with pytest.raises(
        ConfigError, match=r"a task must be one of instruction, speech, text, but is 'none'.*modularforge\.tasks"
    ):
        task.find_task("none")


def test_own_tables_name_what_there_is() -> None:
    for group, own in ((kind.GROUP, kind.OWN), (task.GROUP, task.OWN)):
        for name, value in own.items():
            assert EntryPoint(name, value, group).load().name == name
            assert plugins.find(group, own, name, "plug").name == name


@pytest.mark.parametrize("row", [*kind.OWN.values(), "tests.gains_kind:GAINS"])
def test_modules_of_a_kind_answer_what_its_page_says(row: str) -> None:
    """Functions are found by name when they are called, so a misspelt one would be met only then."""
    found = EntryPoint("", row, kind.GROUP).load()
    methods = {name: method for name, method in vars(kind.Kind).items() if inspect.isfunction(method)}
    answers = {name: method for name, method in methods.items() if not name.startswith("_")}
    assert len(answers) == 8
    for name, method in answers.items():
        module = import_module(found.merging if name in ("freezes", "merge", "part_of") else found.training)
        if name == "soup" and not hasattr(module, name):
            continue  # the one that may be left out
        wanted = list(inspect.signature(method).parameters)[1:]
        assert list(inspect.signature(getattr(module, name)).parameters) == wanted, f"{module.__name__}.{name}"


def test_experts_of_several_kinds_make_no_model(tmp_path: Path) -> None:
    def expert(url: str, **facts: str) -> SimpleNamespace:
        return SimpleNamespace(url=url, manifest=SimpleNamespace(facts=facts))

    old, new, other = expert("a"), expert("b", expert_kind="ffn"), expert("c", expert_kind="lora")
    config = tiny_config(tmp_path)
    assert kind.common_kind(config, [old, new]) is FFN, "those of earlier versions do not say it"  # type: ignore[list-item]
    assert kind.common_kind(config, []) is FFN
    with pytest.raises(MismatchError, match=r"must be of one kind, but b is ffn, c is lora"):
        kind.common_kind(config, [old, new, other])  # type: ignore[list-item]


def test_text_gives_batches_that_restart_and_count_tokens() -> None:
    examples = TextExamples(np.arange(101), context_length=5, batch_size=4, seed=0)
    stream = examples.batches()
    first, second = next(stream), next(stream)
    assert first.units == 20
    assert torch.equal(first.tensors["targets"], first.tensors["inputs"] + 1)
    again = next(examples.batches(first.position))
    assert torch.equal(again.tensors["inputs"], second.tensors["inputs"])
    halves = [next(examples.batches(first.position, rank, 2)) for rank in (0, 1)]
    assert torch.equal(torch.cat([half.tensors["inputs"] for half in halves]), second.tensors["inputs"])


def test_text_measures_what_its_table_says() -> None:
    torch.manual_seed(0)
    shape = ModelConfig(width=8, layers=1, heads=2, kv_heads=2, ffn_width=8, context_length=8)
    model, tokens = build_backbone(shape, 50), np.arange(40) % 50
    held_out = HeldOutText({"law": tokens}, torch.full((50,), 2), 8, 2, 100)
    found = TEXT.metrics(model, held_out, torch.device("cpu"))
    assert found.keys() == {"law"}
    assert list(found["law"]) == [metric.name for metric in TEXT.table]
    assert [metric.name for metric in TEXT.table if metric.decides] == ["loss"]
    assert found["law"]["perplexity"] == pytest.approx(np.exp(found["law"]["loss"]))
    assert found["law"]["bits_per_byte"] == pytest.approx(found["law"]["loss"] / 2 / np.log(2))
