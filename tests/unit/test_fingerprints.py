"""Artifacts keep their identity when the program learns new settings: runs of earlier versions go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modularforge import pipeline
from modularforge.config import Config
from modularforge.config_files import load_config, setting_names
from modularforge.pipeline import CAME_LATER, EVERY, EVERYWHERE, OUTSIDE, STAGES, fingerprint, stage_settings
from modularforge.settings_page import all_settings
from tests.conftest import ROOT, tiny_config

# Of the settings alone (no inputs), for every stage that there was, taken at commit 7c36fa4: of the shipped files, and
# of recipes of the study in docs/method.md. Where a shipped file gets other settings on purpose, take its line
# anew; a new setting or another default must change none of them. The assembled model is one of ridge routers: with the
# evidence router, whose form has changed, it is another model.
RECORDED: list[dict[str, Any]] = json.loads((ROOT / "tests/unit/fingerprints.json").read_text())


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded["base"])
def test_stages_keep_the_fingerprints_they_had_before_settings_came(recorded: dict[str, Any]) -> None:
    settings = {**recorded["set"], **CAME_LATER}
    config = load_config(str(ROOT / "configs" / recorded["base"]), list(settings.items()))
    expected = dict(recorded["fingerprints"])
    ridge = config.model_copy(update={"assembly": config.assembly.model_copy(update={"router": "data_stats"})})
    assert fingerprint("assembled", stage_settings(ridge, "assembled"), {}) == expected.pop("assembled")
    assert {stage: fingerprint(stage, stage_settings(config, stage), {}) for stage in expected} == expected


def test_a_setting_that_came_later_counts_only_where_it_changes_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "CAME_LATER", {"joint.balance_loss": 0.01})

    def of(**joint: Any) -> dict[str, Any]:
        return stage_settings(tiny_config(tmp_path, joint=joint), "joint")

    assert "joint.balance_loss" not in of()
    assert "joint.balance_loss" not in of(balance_loss=0.01)
    assert of(balance_loss=0.0)["joint.balance_loss"] == 0.0


def test_a_backbone_with_stretched_positions_keeps_the_fingerprint_it_had_with_settings_that_are_gone() -> None:
    """Taken at commit 589989d, where `mscale` and `mscale_all_dim` were settings; recorded ones are read as well."""
    stretch = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    stretch["original_max_position_embeddings"] = 64
    for recorded in (stretch, {**stretch, "mscale": None, "mscale_all_dim": None}):
        config = load_config(str(ROOT / "configs/default.yaml"), [("model.rope_scaling", recorded)])
        settings = stage_settings(config, "backbone")
        assert fingerprint("backbone", settings, {}) == "4b6cba7fe2bfd461c5c3037ce972fba9"


def test_what_came_later_is_a_setting() -> None:
    assert CAME_LATER.keys() <= {item.name for item in all_settings()}


def test_every_setting_counts_for_the_stages_of_its_section_or_is_on_the_list(tmp_path: Path) -> None:
    """A new setting is part of an identity by itself; one that changes nothing must be put on the list on purpose."""
    sections = {section for stage in STAGES.values() for section in stage.sections}
    for setting in setting_names():
        section = setting.split(".")[0]
        used = {
            name for name, stage in STAGES.items() if section in stage.sections or setting in (*stage.also, *EVERYWHERE)
        }
        is_known = section in (*OUTSIDE, "data", "seed", "partition") or used - silent(setting)
        assert is_known, f"{setting} changes no artifact: put it under a stage, or say why on the list"
    assert sections <= set(Config.model_fields)


def silent(setting: str) -> set[str]:
    """The stages that a setting has no effect on; those on which it has none anywhere are told once for all."""
    stages = set(pipeline.WITHOUT_EFFECT.get(setting, ()))
    return set() if EVERY in stages else stages


def test_the_list_of_settings_without_effect_names_settings_and_their_stages() -> None:
    for setting, stages in pipeline.WITHOUT_EFFECT.items():
        assert setting in setting_names(), setting
        for name in set(stages) - {EVERY}:
            assert setting.split(".")[0] in STAGES[name].sections, f"{setting} is in no section of {name}"


def test_a_setting_that_a_phase_learns_changes_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were identity a list of what counts, a finished expert of another kind of decay would be taken for done."""
    dump = Config.model_dump
    for kind in ("cosine", "linear"):

        def with_decay(self: Config, kind: str = kind, **options: Any) -> dict[str, Any]:
            values = dump(self, **options)
            return {**values, "experts": {**values["experts"], "decay": kind}}

        monkeypatch.setattr(Config, "model_dump", with_decay)
        for stage in ("expert", "dense", "branch", "btx"):
            assert stage_settings(tiny_config(tmp_path), stage)["experts.decay"] == kind
