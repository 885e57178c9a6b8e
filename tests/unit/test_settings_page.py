"""Every setting is documented, and the shipped pages say what the program says."""

from __future__ import annotations

import json

import jsonschema
import yaml
from typer.testing import CliRunner

from modularforge.cli import app
from modularforge.config_files import setting_names
from modularforge.errors import ConfigError
from modularforge.settings_page import all_settings, page, schema
from tests.conftest import ROOT


def test_every_setting_has_a_sentence_a_type_and_a_default() -> None:
    found = list(all_settings())
    assert [item.name for item in found] == setting_names()
    assert [item.name for item in found if not (item.sentence and item.type and item.default)] == []


def test_the_shipped_page_and_schema_are_those_of_this_program() -> None:
    """Write them anew: `modularforge settings --markdown > docs/settings.md`, and --schema in the same way."""
    assert (ROOT / "docs/settings.md").read_text() == page(None, as_markdown=True) + "\n"
    assert json.loads((ROOT / "configs/settings.schema.json").read_text()) == json.loads(schema())


def test_a_pattern_finds_settings_by_name_and_sentence() -> None:
    done = CliRunner().invoke(app, ["settings", "half the context"])
    assert isinstance(done.exception, ConfigError)
    shown = CliRunner().invoke(app, ["settings", "weight_decay"]).output
    assert "backbone.weight_decay  (number ≥ 0; default 0.1)" in " ".join(shown.split("\n"))
    assert "data.sources" not in shown


def test_the_schema_knows_what_settings_files_may_hold() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(schema()))
    for file in ("quickstart", "default", "cluster"):
        values = yaml.safe_load((ROOT / f"configs/{file}.yaml").read_text())
        assert list(validator.iter_errors(values)) == []
        assert list(validator.iter_errors({**values, "backbone": {"stepz": 5}}))


def test_the_schema_is_of_all_settings() -> None:
    done = CliRunner().invoke(app, ["settings", "router", "--schema"])
    assert isinstance(done.exception, ConfigError)
