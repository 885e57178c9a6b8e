"""Settings: every mistake at once, with its dotted path and the nearest valid name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from launcher.__main__ import app as launcher
from modularforge.config import Config, LoraConfig
from modularforge.config_files import load_config, make_config, setting_names, to_yaml
from modularforge.errors import ConfigError, UserError
from tests.conftest import ROOT, tiny_config, tiny_values

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


def mistakes(values: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        make_config(values, "here.yaml")
    return str(caught.value)


def test_all_mistakes_are_reported_at_once() -> None:
    values = tiny_values("out")
    values["modle"] = {"width": 1}
    values["backbone"]["stesp"] = 3
    values["experts"]["count"] = "many"
    values["partition"]["overlap_ratio"] = 0.9
    text = mistakes(values)
    assert "4 mistake(s)" in text
    assert "modle is not a setting; did you mean model?" in text
    assert "backbone.stesp is not a setting; did you mean backbone.steps?" in text
    assert "experts.count must be" in text
    assert "'many'" in text
    assert "partition.overlap_ratio must be less than or equal to 0.5, but is 0.9" in text


def test_a_setting_in_the_wrong_section_is_named_in_the_right_one() -> None:
    values = tiny_values("out")
    values["model"]["z_loss"] = 0.1
    assert "did you mean experts.z_loss?" in mistakes(values)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"width": 30}, "model.width must be a multiple of model.heads (4), but is 30"),
        ("model", {"heads": 4, "kv_heads": 3}, "model.heads must be a multiple of model.kv_heads (3), but is 4"),
        ("model", {"width": 36, "heads": 12, "kv_heads": 12}, "must be even for rotary positions, but is 3"),
        ("backbone", {"batch_size": 5, "accumulation_steps": 2}, "backbone.batch_size must be a multiple of"),
        ("assembly", {"experts_per_token": 9}, "must be at most the number of experts (4), but is 9"),
        ("experts", {"anchored": False}, "assembly.router must not be trained when experts.anchored is false"),
    ],
)
def test_impossible_combinations_are_refused(section: str, change: dict[str, object], message: str) -> None:
    assert message in mistakes(tiny_values("out", **{section: change}))


@pytest.mark.parametrize(("wished", "size"), [(None, 4), (1, 4), (12, 12), (15, 12), (17, 12), (10_000, 120)])
def test_baselines_on_all_partitions_have_batches_of_their_own_and_leave_no_window_over(
    wished: int | None, size: int
) -> None:
    config = make_config(tiny_values("out", joint={"batch_size": wished}), "here.yaml")
    experts, joint = config.experts, config.baseline_phase("joint")
    assert (experts.count, experts.steps, experts.batch_size) == (3, 10, 4)
    assert joint.batch_size == size
    assert joint.steps * size == 3 * 10 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("experts.lora.rank=4", "experts.lora.rank must be left out unless experts.kind is lora"),
        ("assembly.lora=fold", "assembly.lora must be left out unless experts.kind is lora, but is fold"),
        ("evaluation.baselines=[joint_lora]", "leave it out, or set experts.kind to lora"),
        ("steering.vectors=3", "steering.vectors must be left out unless experts.kind is steering"),
        ("speech.model.prompt=Write", "speech.model.prompt must be left out unless task is speech, but task is text"),
    ],
)
def test_settings_that_only_another_kind_or_task_has_are_refused(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(QUICKSTART, [change])


def test_null_takes_a_section_back_to_its_defaults_so_that_experts_of_another_kind_can_be_had() -> None:
    path, change = str(ROOT / "configs" / "smollm2-domains.yaml"), ["experts.kind=ffn", "evaluation.baselines=[]"]
    with pytest.raises(ConfigError, match=r"experts.lora.rank must be left out unless experts.kind is lora"):
        load_config(path, change)
    assert load_config(path, [*change, "experts.lora=null"]).experts.lora == LoraConfig()
    with pytest.raises(ConfigError, match=r"experts.steps must be a whole number"):
        load_config(path, ["experts.steps=null"])


@pytest.mark.parametrize(("kind", "config"), [("lora", "quickstart"), ("steering", "speech")])
def test_settings_of_feed_forward_experts_are_refused_for_others(kind: str, config: str) -> None:
    path = str(ROOT / "configs" / f"{config}.yaml")
    with pytest.raises(ConfigError, match=f"experts.anchored must be left out with experts.kind {kind}"):
        load_config(path, [f"experts.kind={kind}", "experts.anchored=true"], asks_for_shape=False)


def test_two_sources_of_one_name_are_refused() -> None:
    values = tiny_values("out")
    values["data"]["sources"] = [values["data"]["sources"][0]] * 2
    assert "data.sources must have names of their own" in mistakes(values)


def test_set_changes_a_setting_and_keeps_its_neighbours() -> None:
    config = load_config(QUICKSTART, ["backbone.steps=7", "experts.peak_learning_rate=1e-3", "data_dir=null"])
    plain = load_config(QUICKSTART)
    assert config.backbone.steps == 7
    assert config.backbone.batch_size == plain.backbone.batch_size
    assert config.experts.peak_learning_rate == 1e-3
    assert config.data_dir is None


@pytest.mark.parametrize("change", ["steps", "=3", "backbone.steps=[", "backbone.steps.more=3"])
def test_a_malformed_set_is_refused(change: str) -> None:
    with pytest.raises(ConfigError):
        load_config(QUICKSTART, [change])


def test_a_section_that_is_set_partly_keeps_the_defaults_of_its_own_kind() -> None:
    values = tiny_values("out")
    values["backbone"] = {"steps": 5}
    assert (
        make_config(values, "here").backbone.weight_decay == Config.model_fields["backbone"].default.weight_decay == 0.1
    )


def test_a_missing_file_names_the_ones_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"configs/quickstart\.yaml"):
        load_config("configs/quikstart.yaml")


@pytest.mark.parametrize("content", ["", "just text", "- a\n- b\n", "a: [", "\xff\xfe: 1"])
def test_a_file_that_holds_no_settings_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(str(path))


def test_every_setting_is_documented_and_there_are_not_too_many() -> None:
    sections: list[Any] = [Config, *(field.annotation for field in Config.model_fields.values())]
    for section in sections:
        for name, field in getattr(section, "model_fields", {}).items():
            described = field.description or getattr(field.annotation, "__doc__", None)
            assert described, f"{section.__name__}.{name}"
    assert len(setting_names()) <= 280


def test_the_smoke_test_uses_the_sample_and_a_folder_of_its_own() -> None:
    config = load_config(str(ROOT / "configs" / "default.yaml"), smoke_test=True)
    assert config.output_dir.endswith("-smoke-test")
    assert all(str(source.train).startswith("sample:") for source in config.data.sources)
    assert load_config(QUICKSTART, smoke_test=True, output_dir="mine").output_dir == "mine"


RESOLVED = {"pretrained": "somebody/model"} | {
    name: value for name, value in tiny_config("unused").model.model_dump(mode="json").items() if name != "pretrained"
}


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> None:
        raise AssertionError("the Hub must not be asked")

    monkeypatch.setattr("modularforge.pretrained.shape.read_pretrained_config", ask)


@pytest.mark.usefixtures("no_hub")
def test_resolved_settings_are_validated_without_asking_for_a_pretrained_models_shape(tmp_path: Path) -> None:
    values = {**tiny_values(tmp_path), "model": RESOLVED}
    config = make_config(values, "a record")
    assert config.model.pretrained == "somebody/model"
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(str(path)) == config, "a node of a cluster reads resolved settings and needs no network"


@pytest.mark.usefixtures("no_hub")
def test_only_commands_that_use_a_users_file_ask_for_the_shape(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    values = {**tiny_values(tmp_path), "model": {"pretrained": "somebody/model"}}
    path.write_text(yaml.safe_dump(values))
    assert load_config(str(path), asks_for_shape=False).model.pretrained == "somebody/model"
    with pytest.raises(AssertionError, match="must not be asked"):
        load_config(str(path))
    for command in ("status", "logs", "cancel", "resume", "wait"):
        done = CliRunner().invoke(launcher, [command, *(["backbone"] if command == "logs" else []), "-c", str(path)])
        assert isinstance(done.exception, UserError), command
        assert "must hold a run" in str(done.exception), command


def test_workers_are_for_processes_here() -> None:
    done = CliRunner().invoke(launcher, ["--cluster", "--max-workers", "2", "-c", QUICKSTART])
    assert isinstance(done.exception, ConfigError)
    assert "array_throttle" in str(done.exception)


@pytest.mark.parametrize(
    ("change", "known"), [("experts.kind=none", "ffn, lora, steering"), ("task=none", "instruction, speech, text")]
)
def test_a_kind_or_task_that_is_not_installed_is_refused_before_anything_is_trained(change: str, known: str) -> None:
    with pytest.raises(ConfigError, match=f"{change.partition('=')[0]} must be one of {known}, but is 'none'"):
        load_config(QUICKSTART, [change])
