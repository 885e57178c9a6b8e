"""Every setting is documented, and the shipped pages say what the program says."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import yaml
from typer.testing import CliRunner

from modularforge.cli import app
from modularforge.config import Config
from modularforge.config_files import sample_sources, setting_names
from modularforge.errors import ConfigError
from modularforge.settings_page import all_settings, page, schema
from modularforge.yaml_text import parse_yaml
from tests.conftest import ROOT, tiny_values

IN_LISTS = ("data.", "model.rope_scaling.", "evaluation.tasks.", "experts.lora.phases.", "speech.decoding.tests.")


def test_every_setting_has_a_sentence_a_type_and_a_default() -> None:
    found = list(all_settings())
    # Of which there may be none, or many.
    sections = ["data.clean", "data.sources", "data.sources.example", "model.rope_scaling", "evaluation.tasks"]
    sections += ["experts.lora.phases", "speech.decoding.tests", "data.mix"]
    assert [item.name for item in found if item.name not in sections] == setting_names()
    assert [item.name for item in found if not (item.sentence and item.type and item.default)] == []


def test_the_shipped_page_and_schema_are_those_of_this_program() -> None:
    """Write them anew: `modularforge settings --markdown > docs/settings.md`, and --schema in the same way."""
    assert (ROOT / "docs/settings.md").read_text() == page(None, as_markdown=True) + "\n"
    assert json.loads((ROOT / "configs/settings.schema.json").read_text()) == json.loads(schema())


def test_every_section_of_the_page_has_one_heading() -> None:
    """`## data` stood there four times, once for every section within it."""
    headings = [line for line in page(None, as_markdown=True).splitlines() if line.startswith("## ")]
    assert len(headings) == len({*headings})
    assert "## data" in headings


def test_a_default_can_be_pasted_into_a_file() -> None:
    config = Config.model_validate(tiny_values("run", data={"sources": sample_sources()}))
    given = Config.model_construct(data=config.data)
    for item in all_settings():
        value: Any = given
        for part in item.name.split("."):
            value = getattr(value, part, None)
        if item.default != "required" and not item.name.startswith(IN_LISTS):
            assert parse_yaml(item.default) == value, item.name


def test_a_pattern_finds_settings_by_name_and_sentence() -> None:
    done = CliRunner().invoke(app, ["settings", "half the context"])
    assert isinstance(done.exception, ConfigError)
    shown = CliRunner().invoke(app, ["settings", "weight_decay"]).output
    assert "backbone.weight_decay  (number ≥ 0; default 0.1)" in " ".join(shown.split("\n"))
    assert "data.sources" not in shown


def test_a_pattern_may_be_a_word_of_another_tool_or_misspelt() -> None:
    shown = CliRunner().invoke(app, ["settings", "n_embd"]).output
    assert shown.startswith("model.width  (")
    wrong = CliRunner().invoke(app, ["settings", "batch_sise"]).exception
    assert "'batch_sise' is in none; did you mean batch_size?" in str(wrong)


def test_the_schema_knows_what_settings_files_may_hold() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(schema()))
    for file in ("quickstart", "default", "cluster"):
        values = yaml.safe_load((ROOT / f"configs/{file}.yaml").read_text())
        assert list(validator.iter_errors(values)) == []
        assert list(validator.iter_errors({**values, "backbone": {"stepz": 5}}))


def test_a_pattern_and_a_schema_exclude_each_other() -> None:
    done = CliRunner().invoke(app, ["settings", "router", "--schema"])
    assert isinstance(done.exception, ConfigError)
