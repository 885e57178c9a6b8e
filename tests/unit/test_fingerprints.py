"""Artifacts keep their identity when the program learns new settings: runs of earlier versions go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modularforge import pipeline
from modularforge.config import Config
from modularforge.pipeline import CAME_LATER, STAGES, fingerprint, stage_settings
from modularforge.settings import load_config, setting_names
from modularforge.study.runs import Runs
from modularforge.study.study_file import load_study
from tests.conftest import ROOT, tiny_config

# Of the settings alone (no inputs), of every stage that there was, taken at commit 7c36fa4. Where a shipped file gets
# other settings on purpose, its line is to be taken anew; a new setting or another default must change none of them.
RECORDED: dict[str, dict[str, str]] = json.loads((ROOT / "tests/unit/fingerprints.json").read_text())


def shipped(name: str) -> Config:
    """The settings of a shipped file, or of one recipe of a study, as before the later settings came."""
    file, _, recipe = name.partition(" ")
    path = str(ROOT / "configs" / file)
    if not recipe:
        return load_config(path, list(CAME_LATER.items()))
    study = load_study(path)
    study = study.model_copy(update={"base": str(ROOT / study.base), "set": {**study.set, **CAME_LATER}})
    return Runs(study).config(0, recipe)


@pytest.mark.parametrize("name", RECORDED)
def test_stages_of_shipped_settings_have_the_fingerprints_they_had(name: str) -> None:
    config = shipped(name)
    found = {stage: fingerprint(stage, stage_settings(config, stage), {}) for stage in RECORDED[name]}
    assert found == RECORDED[name]


def test_a_setting_that_came_later_counts_only_where_it_changes_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "CAME_LATER", {"joint.balance_loss": 0.01})

    def of(**joint: Any) -> dict[str, Any]:
        return stage_settings(tiny_config(tmp_path, joint=joint), "joint")

    assert "joint.balance_loss" not in of()
    assert "joint.balance_loss" not in of(balance_loss=0.01)
    assert of(balance_loss=0.0)["joint.balance_loss"] == 0.0


def test_what_came_later_is_a_setting() -> None:
    assert CAME_LATER.keys() <= set(setting_names())
    assert STAGES.keys() >= RECORDED["quickstart.yaml"].keys()
