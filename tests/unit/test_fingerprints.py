"""Artifacts keep their identity when the program learns new settings: runs of earlier versions go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from modularforge import config_files, pipeline
from modularforge.config import FEW_TOKENS, RECORDED_ROUTERS, Config, RouterKind
from modularforge.config_files import load_config, setting_names
from modularforge.cost import part_flops
from modularforge.experts.kind import OWN, find_kind
from modularforge.pipeline import (
    CAME_LATER,
    EVERY,
    EVERYWHERE,
    SETTINGS_FOR,
    STACKED,
    STAGES,
    fingerprint,
    stage_settings,
)
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
    ridge = config.model_copy(update={"assembly": config.assembly.model_copy(update={"router": "ridge"})})
    assert fingerprint("assembled", stage_settings(ridge, "assemble"), {}) == expected.pop("assembled")
    rows = {row.kind: row.name for row in STAGES.values()}
    assert {kind: fingerprint(kind, stage_settings(config, rows[kind]), {}) for kind in expected} == expected


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


def test_sums_without_outer_products_and_their_tokens_are_part_of_the_identity(tmp_path: Path) -> None:
    """As ever, the number of tokens is none of a backbone's with outer products."""

    def of(stage: str, **experts: Any) -> str:
        return fingerprint(stage, stage_settings(tiny_config(tmp_path, experts=experts), stage), {})

    for stage in ("backbone", "expert", "branch"):
        found = [of(stage), of(stage, statistics="norms"), of(stage, statistics="norms", statistics_tokens=99)]
        assert len({*found}) == 3
    assert of("backbone", statistics_tokens=99) == of("backbone")
    assert of("dense", statistics="norms", statistics_tokens=99) == of("dense")


def test_outer_products_of_a_pretrained_backbone_are_gathered_where_something_is_solved_from_them(
    tmp_path: Path,
) -> None:
    """They are gigabytes and minutes; of a backbone of the run's own they are gathered as ever."""
    shape = tiny_config(tmp_path).model

    def config(**sections: Any) -> Config:
        pretrained = shape.model_copy(update={"pretrained": "given"})
        return tiny_config(tmp_path, **sections).model_copy(update={"model": pretrained})

    few, solved = config(), config(assembly={"router": "ridge", "experts_per_token": 1})
    said = config(experts={"statistics": "moments", "statistics_tokens": 2 * FEW_TOKENS})
    assert [one.gathers_moments for one in (few, solved, said, tiny_config(tmp_path))] == [False, True, True, True]
    assert few.gathered_tokens == FEW_TOKENS < said.gathered_tokens
    for stage in ("backbone", "expert"):
        assert stage_settings(few, stage)["experts.statistics"] == "norms"
        assert "experts.statistics" not in stage_settings(said, stage)
        assert "experts.statistics" not in stage_settings(tiny_config(tmp_path), stage)
    assert part_flops(few, STAGES["expert"]) < part_flops(said, STAGES["expert"])


def test_tokens_of_sums_with_outer_products_count_for_what_depends_on_them_and_for_nothing_else(
    tmp_path: Path,
) -> None:
    """Of the settings alone: what is made of experts then has other inputs."""

    def of(tokens: int) -> dict[str, str]:
        config = tiny_config(tmp_path, experts={"statistics": "moments", "statistics_tokens": tokens})
        return {name: fingerprint(name, stage_settings(config, name), {}) for name in STAGES}

    before, after = of(4096), of(99)
    changed = {name for name in before if before[name] != after[name] and not name.startswith("round_")}
    assert changed == {"expert", "branch"}


# Of anchored experts with configs/default.yaml, by the router's name at commit 795ecc8, where they were taken.
OF_ROUTERS = {
    "evidence": "328af6f8ef253a5c84947946a736be7b",
    "data_stats": "315c7e5001b3d0cd8a8a4f4dcc4c4cfe",
    "centred_means": "981538bdd4f7ce893c64bd196a9282f3",
    "learned": "e7e633d30c96eda4efb65c4d88a9b6a0",
    "equalised": "588ad56283b05d92d83abe60945c174e",
    "kaiming": "cd2ca8cfa309be9174f3febac3c638da",
    "uniform": "0b2a83070d319e7f5e7688619eaeea0b",
}


@pytest.mark.parametrize("router", get_args(RouterKind))
def test_a_router_has_the_identity_of_its_old_name_under_both(router: str, caplog: pytest.LogCaptureFixture) -> None:
    config_files._say_new_name.cache_clear()
    old = RECORDED_ROUTERS.get(router, router)
    for name in (router, old):
        settings = {"assembly.router": name, "experts.anchored": True}
        config = load_config(str(ROOT / "configs/default.yaml"), list(settings.items()))
        assert config.assembly.router == router
        assert fingerprint("assembled", stage_settings(config, "assemble"), {}) == OF_ROUTERS[old]
    said = f"assembly.router: {old} is called {router} now; its old name still works in this version"
    assert [record.message for record in caplog.records] == ([said] if old != router else [])


def test_what_came_later_is_a_setting() -> None:
    assert CAME_LATER.keys() <= {item.name for item in all_settings()}


# Sections and settings of no stage: where and how a run is computed, and what it is called.
OUTSIDE = ("name", "output_dir", "data_dir", "data_seed", "metrics", "launcher", "cluster")


def test_every_setting_counts_for_the_stages_of_its_section_or_is_on_the_list(tmp_path: Path) -> None:
    """A new setting is part of an identity by itself; one that changes nothing must be put on the list on purpose."""
    sections = {section for stage in STAGES.values() for section in stage.sections}
    for setting in setting_names():
        section = setting.split(".")[0]
        used = {
            name for name, stage in STAGES.items() if section in stage.sections or setting in (*stage.also, *EVERYWHERE)
        }
        used |= counted_by_plugs(setting)
        is_known = section in (*OUTSIDE, "data", "seed", "partition") or used - silent(setting)
        assert is_known, f"{setting} changes no artifact: put it under a stage, or say why on the list"
    assert sections <= set(Config.model_fields)


def counted_by_plugs(setting: str) -> set[str]:
    """The stages on which a setting counts for a task, or for a kind of expert with a section of its own."""
    found = {
        stage
        for rows in SETTINGS_FOR.values()
        for stage, names in rows.items()
        if any(setting == name or setting.startswith(f"{name}.") for name in names)
    }
    own = {find_kind(name).settings for name in OWN} - {"experts"}
    return found | ({"expert", *STACKED} if setting.split(".")[0] in own else set())


def silent(setting: str) -> set[str]:
    """The stages that a setting has no effect on; those on which it has none anywhere are told once for all."""
    stages = set(pipeline.WITHOUT_EFFECT.get(setting, ()))
    return set() if EVERY in stages else stages


def test_the_list_of_settings_without_effect_names_settings_and_their_stages() -> None:
    known = {*setting_names(), *(item.name for item in all_settings())}
    for setting, stages in pipeline.WITHOUT_EFFECT.items():
        assert setting in known, setting
        for name in set(stages) - {EVERY}:
            is_read = setting.split(".")[0] in STAGES[name].sections or name in counted_by_plugs(setting)
            assert is_read, f"{setting} is in no section of {name}"


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
