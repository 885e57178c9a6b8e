"""Experts that train what they share, in rounds: what becomes of it, whoever is late, and whatever is killed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints import Artifact, find_artifact
from checkpoints.errors import MissingArtifactError
from checkpoints.pieces import TENSORS_NAME
from launcher.plan import describe_plan
from launcher.processes import LocalLauncher
from launcher.sbatch import Request, dependency
from launcher.submit import by_twin
from launcher.tasks import Group, build_groups, build_tasks, nodes_section
from modularforge import ModuleTrainer, edit_experts
from modularforge.assembly import shared
from modularforge.assembly.shared import SHARED_NAME
from modularforge.config import Config
from modularforge.config_files import to_yaml
from modularforge.errors import ConfigError
from modularforge.experts.ffn import EXPERT_NAME
from modularforge.info import describe
from modularforge.model import names
from modularforge.model.folder import read_tensors
from modularforge.observe.completion import parts_of
from modularforge.observe.rounds import rounds_table
from modularforge.observe.run import read_run
from modularforge.routing.text_counts import token_occurrences
from modularforge.run import Run
from modularforge.stages import merge
from tests.conftest import run_command, tiny_config
from tests.pipeline.test_experts import beside

ALL = ["embeddings", "head", "attention", "norms"]


def in_rounds(finished_run: Config, folder: Path, rounds: int = 2, **changes: Any) -> Config:
    """Settings of plain experts that train all they share; data and backbone are those of the finished run."""
    experts = {"anchored": False, "unfreeze": ALL, "rounds": rounds, **changes.pop("experts", {})}
    assembly = {"router": "ridge", "public_expert": True, **changes.pop("assembly", {})}
    return beside(finished_run, folder, experts=experts, assembly=assembly, **changes)


def shared_of(artifact: Artifact) -> dict[str, Tensor]:
    return load_file(artifact.local_file(SHARED_NAME))


@pytest.fixture(scope="module")
def whole(finished_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of two rounds up to the assembled model; tests must not change it."""
    config = in_rounds(finished_run, tmp_path_factory.mktemp("rounds"))
    make(config)
    return config


def make(config: Config) -> None:
    run = Run(config)  # one for all, as a study has it
    for number in range(1, config.experts.rounds):
        for index in range(3):
            run.make(f"round_{number}", index)
        run.make(f"merge_{number}")
    for index in range(3):
        run.make("expert", index)
    run.make("assemble")


def test_rounds_in_pieces_are_those_of_one_process(whole: Config, tmp_path: Path) -> None:
    training = whole.training.model_copy(update={"parallel": "fsdp"})
    config = whole.model_copy(update={"training": training, "output_dir": str(tmp_path)})
    others = ["backbone", "rounds/round_1-1", "rounds/round_1-2", "rounds/merge_1"]
    (tmp_path / "rounds").mkdir()
    for name in others:
        (tmp_path / name).symlink_to((Path(whole.output_dir) / name).resolve())
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    run_command("tests.shard_ranks", str(tmp_path / "config.yaml"), "2", "round_1-0", "expert-0")
    for name, file in (("rounds/round_1-0", TENSORS_NAME), ("experts/expert-0", EXPERT_NAME)):
        for path in (f"{name}/{file}", f"{name}/{SHARED_NAME}"):
            one, two = (load_file(Path(folder) / path) for folder in (whole.output_dir, tmp_path))
            assert one.keys() == two.keys()
            for key, tensor in one.items():
                assert torch.allclose(tensor.float(), two[key].float(), atol=1e-3), (path, key)


def test_a_last_round_that_settles_leaves_what_was_merged_and_trains_blocks_behind_it(
    whole: Config, tmp_path: Path
) -> None:
    before = Run(whole)
    settled = whole.model_copy(update={"experts": whole.experts.model_copy(update={"settle": True})})
    left_out = shutil.ignore_patterns("experts", "assembled", "checkpoints")
    shutil.copytree(whole.output_dir, tmp_path / "run", ignore=left_out)
    run = Run(settled.model_copy(update={"output_dir": str(tmp_path / "run")}))
    made = [run.make("expert", index) for index in range(3)]
    assert run.plan("round_1", 0).fingerprint == before.plan("round_1", 0).fingerprint, (
        "rounds before know nothing of it"
    )
    merged = shared_of(run.require("merge_1"))
    for index, artifact in enumerate(made):
        assert artifact.manifest.fingerprint != before.require("expert", index).manifest.fingerprint
        own = shared_of(artifact)
        assert own.keys() == merged.keys()
        assert all(torch.equal(own[name], tensor.to(own[name].dtype)) for name, tensor in merged.items())
    ffn, earlier = (load_file(found.require("expert", 0).local_file(EXPERT_NAME)) for found in (run, before))
    assert not any(torch.equal(tensor, earlier[name]) for name, tensor in ffn.items()), "the blocks went on"
    run.make("assemble")
    model = read_tensors(run.require("assemble").local_folder())
    assert all(
        torch.equal(model[name], tensor.to(model[name].dtype)) for name, tensor in merged.items() if name in model
    )


def mean(artifacts: list[Artifact]) -> dict[str, Tensor]:
    """The mean by hand, in float64."""
    each = [shared_of(artifact) for artifact in artifacts]
    return {name: torch.stack([own[name].double() for own in each]).mean(dim=0) for name in each[0]}


def test_a_merge_and_the_assembled_model_are_means_by_hand(whole: Config) -> None:
    run = Run(whole)
    merged = shared_of(run.require("merge_1"))
    for name, value in mean([run.require("round_1", k) for k in range(3)]).items():
        assert torch.allclose(merged[name].double(), value, rtol=1e-7, atol=0), name
    assembled = load_file(run.require("assemble").local_file("backbone.safetensors"))
    by_hand = mean([run.require("expert", k) for k in range(3)])
    assert {names.shared_part(name) for name in by_hand} == {"embeddings", "attention", "norms"}, "the head is tied"
    for name, value in by_hand.items():
        assert torch.allclose(assembled[name].double(), value, rtol=1e-7, atol=0), name
        assert not torch.equal(assembled[name], run.backbone.tensors[name]), name


def test_rows_of_tokens_weigh_by_counts_between_rounds_and_in_the_model(finished_run: Config, tmp_path: Path) -> None:
    config = in_rounds(finished_run, tmp_path, assembly={"shared": "counts"})
    make(config)
    run = Run(config)
    merged, embedding = shared_of(run.require("merge_1")), "model.embed_tokens.weight"
    rounds = [run.require("round_1", index) for index in range(3)]
    counts_KV = torch.from_numpy(np.stack([token_occurrences(artifact) for artifact in rounds]))
    assert all(
        np.array_equal(token_occurrences(a), token_occurrences(run.require("expert", k))) for k, a in enumerate(rounds)
    )
    base = run.backbone.tensors[embedding].double()
    total_V = counts_KV.sum(dim=0) + shared.BASE_COUNT
    by_hand = base + sum(
        (counts_KV[k] / total_V)[:, None] * (shared_of(artifact)[embedding].double() - base)
        for k, artifact in enumerate(rounds)
    )
    assert torch.allclose(merged[embedding].double(), by_hand, atol=1e-7)
    assert torch.equal(merged[embedding][0], run.backbone.tensors[embedding][0].float()), "nobody's text has it"
    plain = mean(rounds)
    others = [name for name in merged if name != embedding]
    assert all(torch.allclose(merged[name].double(), plain[name], rtol=1e-7, atol=0) for name in others)
    model = load_file(run.require("assemble").local_file("backbone.safetensors"))
    assert not torch.equal(model[embedding], merged[embedding])


def test_an_expert_alone_is_its_own_model(whole: Config) -> None:
    run = Run(whole)
    own = run.backbone.expert(run.require("expert", 1)).state_dict()
    for name, value in shared_of(run.require("expert", 1)).items():
        assert torch.equal(own[name], value), name
        assert not torch.equal(value, shared_of(run.require("expert", 2))[name]), name


def test_the_next_round_begins_with_what_was_merged_and_its_own_ffn(whole: Config) -> None:
    from modularforge.stages.expert import state_after

    run = Run(whole)
    state, merged = state_after(run, 0, 1), shared_of(run.require("merge_1"))
    own = load_file(run.require("round_1", 0).local_file("state.safetensors"))
    assert state.step == 5
    for name, value in merged.items():
        assert torch.equal(state.tensors[f"weights.{name}"], value)
    for name, value in own.items():
        assert torch.equal(state.tensors[name], value), name
    assert any(name.startswith("exp_avg.") and names.shared_part(name.removeprefix("exp_avg.")) for name in own)


def test_one_expert_in_rounds_is_the_same_as_in_one(finished_run: Config, tmp_path: Path) -> None:
    """A round is a pause: with nobody to share with, no bit changes, momenta, rates and the order of data included."""
    found = []
    for rounds in (1, 3):
        config = in_rounds(finished_run, tmp_path / str(rounds), rounds, cluster={"min_experts": 1})
        run = Run(config)
        for number in range(1, rounds):
            run.make(f"round_{number}", 1)
            run.make(f"merge_{number}")
        found.append(run.make("expert", 1))
    assert found[0].manifest.files == found[1].manifest.files
    assert found[0].manifest.facts["validation_loss"] == found[1].manifest.facts["validation_loss"]


def test_order_and_company_change_no_bit(whole: Config, finished_run: Config, tmp_path: Path) -> None:
    config = in_rounds(finished_run, tmp_path)
    run = Run(config)
    torch.manual_seed(99)
    for index in (2, 0, 1):
        Run(config).make("round_1", index)
    run.make("merge_1")
    run.make("expert", 2)
    asked: list[tuple[str, int | None]] = [("round_1", 1), ("merge_1", None), ("expert", 2)]
    for stage, index_or_none in asked:
        found, expected = (found.require(stage, index_or_none) for found in (run, Run(whole)))
        assert found.manifest.files == expected.manifest.files, stage


def test_parts_that_are_not_named_stay_as_they_are(finished_run: Config, tmp_path: Path) -> None:
    config = in_rounds(finished_run, tmp_path, 1, experts={"unfreeze": ["norms"], "unfreeze_rate": 1.0})
    artifact = Run(config).make("expert", 0)
    assert {names.shared_part(name) for name in shared_of(artifact)} == {"norms"}
    own = Run(config).backbone.expert(artifact).state_dict()
    for name, value in Run(config).backbone.tensors.items():
        if names.shared_part(name) in ("embeddings", "attention"):
            assert torch.equal(own[name], value), name


class Killed(BaseException):
    """Stands for a process that ends here."""


def test_a_merge_that_was_killed_is_made_again_with_the_same_bytes(
    whole: Config, finished_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = in_rounds(finished_run, tmp_path)
    shutil.copytree(Path(whole.output_dir) / "rounds", Path(config.output_dir) / "rounds")
    shutil.rmtree(Path(config.output_dir) / "rounds" / "merge_1")

    def die(*arguments: Any) -> Any:
        found = shared.chunks(*arguments)
        yield next(found)
        yield next(found)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(merge, "chunks", die)
        with pytest.raises(Killed):
            Run(config).make("merge_1")
    assert find_artifact(Run(config).url("merge_1")) is None
    with pytest.raises(MissingArtifactError, match=r"merge_1 must be finished first, .* run `modularforge merge_1`"):
        Run(config).make("expert", 0)
    Run(config).make("merge_1")
    assert Run(config).require("merge_1").manifest.files == Run(whole).require("merge_1").manifest.files


@pytest.fixture
def late(finished_run: Config, tmp_path: Path) -> Config:
    """Two of three experts have finished the first round."""
    config = in_rounds(finished_run, tmp_path, cluster={"min_experts": 2})
    for index in (0, 2):
        Run(config).make("round_1", index)
    return config


def test_a_late_expert_joins_the_next_round(late: Config, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(late)
    run.make("merge_1")
    assert "merge_1 goes on without expert-1, which are late or have failed" in caplog.text
    for index in (0, 2):
        Run(late).make("expert", index)
    with pytest.raises(MissingArtifactError, match=r"round_1-1 must be finished first"):
        Run(late).make("expert", 1)
    Run(late).make("assemble")
    Run(late).make("round_1", 1)
    assert set(Run(late).require("merge_1").manifest.facts["merged"]) == {0, 2}, "a merge stays what it is"
    caplog.set_level("INFO")
    Run(late).make("expert", 1)
    assert "expert 1 was late for merge_1, and joins the others again here" in caplog.text
    assert len(Run(late).chosen_experts()) == 2, "the model that is committed is one to use"
    everyone = late.model_copy(update={"cluster": late.cluster.model_copy(update={"min_experts": None})})
    assert len(Run(everyone).make("assemble").manifest.inputs) == 4


class Clock:
    """Time that passes where somebody waits."""

    now, meanwhile = 0.0, staticmethod(lambda: None)
    time = staticmethod(lambda: 0.0)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


def test_too_few_experts_are_waited_for_and_then_told(late: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    all_of_them = late.cluster.model_copy(update={"min_experts": None, "straggler_minutes": 1})
    config, clock = late.model_copy(update={"cluster": all_of_them}), Clock()
    monkeypatch.setattr(merge, "time", clock)
    with pytest.raises(MissingArtifactError, match=r"merge_1 needs 3 of 3 experts, but 2 are finished \(missing: 1\)"):
        Run(config).make("merge_1")
    assert clock.now == 60.0
    clock.meanwhile = lambda: Run(config).make("round_1", 1)
    assert set(Run(config).make("merge_1").manifest.facts["merged"]) == {0, 1, 2}


def test_experts_are_removed_and_added_with_their_share(whole: Config, tmp_path: Path) -> None:
    run = Run(whole)
    without = edit_experts.remove(run.url("assemble"), 1, str(tmp_path / "without"))
    found = load_file(without.local_file("backbone.safetensors"))
    for name, value in mean([run.require("expert", k) for k in (0, 2)]).items():
        assert torch.allclose(found[name].double(), value, rtol=1e-7, atol=0), name
    again = edit_experts.add(without.url, run.url("expert", 1), str(tmp_path / "again"))
    files = run.require("assemble").manifest.files
    assert {name: entry for name, entry in again.manifest.files.items() if name in files} == files


def test_one_that_shares_nothing_counts_with_the_backbones(whole: Config, finished_run: Config, tmp_path: Path) -> None:
    plain = beside(finished_run, tmp_path, experts={"anchored": False}, assembly={"router": "ridge"})
    other, run = Run(plain).make("expert", 1), Run(whole)
    mixed = edit_experts.replace(run.url("assemble"), 1, other.url, str(tmp_path / "mixed"))
    found, backbone = load_file(mixed.local_file("backbone.safetensors")), run.backbone.tensors
    for name, value in mean([run.require("expert", k) for k in (0, 2)]).items():
        expected = (2 * value + backbone[name].double()) / 3
        assert torch.allclose(found[name].double(), expected, atol=1e-7), name


def test_weights_by_tokens_and_an_outer_step_count_for_identity(whole: Config) -> None:
    def plan_of(stage: str, **changes: dict[str, Any]) -> str:
        values = {name: getattr(whole, name).model_copy(update=change) for name, change in changes.items()}
        return Run(whole.model_copy(update=values)).plan(stage, 0 if stage == "round_1" else None).fingerprint

    assembly = {"assembly": {"shared": "tokens"}}
    outer = {"experts": {"outer": whole.experts.outer.model_copy(update={"momentum": 0.5})}}
    assert plan_of("round_1") == plan_of("round_1", **assembly) == plan_of("round_1", **outer)
    assert len({plan_of("merge_1"), plan_of("merge_1", **assembly), plan_of("merge_1", **outer)}) == 3


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"rounds": 2}, r"experts\.rounds must be left out without experts\.unfreeze"),
    ({"unfreeze": ["norms"], "outer": {"momentum": 0.9}}, r"experts\.outer\.momentum must be left out where"),
    ({"unfreeze": ["head"]}, r"experts\.unfreeze must have embeddings beside head where model\.tied_head is true"),
    ({"unfreeze": ["norms"], "rounds": 8, "steps": 5}, r"experts\.rounds must be at most experts\.steps \(5\)"),
    ({"unfreeze": ["norms"], "kind": "steering"}, r"experts\.unfreeze must be left out with experts\.kind steering"),
]


@pytest.mark.parametrize(("experts", "sentence"), MISTAKES, ids=[str(number) for number in range(len(MISTAKES))])
def test_settings_that_cannot_be_are_one_sentence(experts: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        tiny_config(tmp_path, experts={"anchored": False, **experts}, assembly={"router": "evidence"})


def test_a_round_that_there_is_not_is_refused(whole: Config) -> None:
    with pytest.raises(ConfigError, match=r"round_2 must come before the last round, but experts\.rounds is 2"):
        Run(whole).make("round_2", 0)


def groups_of(config: Config) -> dict[str, Group]:
    return {group.name: group for group in build_groups(build_tasks(config))}


def test_rounds_are_groups_of_the_graph(whole: Config) -> None:
    config = whole.model_copy(update={"experts": whole.experts.model_copy(update={"rounds": 3})})
    groups = groups_of(config)
    order = ["backbone", "round_1", "merge_1", "round_2", "merge_2", "expert"]
    assert [name for name in groups if name in order] == order
    assert [(groups[name].after, groups[name].after_end, groups[name].goes_on) for name in order[1:]] == [
        (("backbone",), (), ""),
        ((), ("round_1",), ""),
        (("merge_1",), (), "round_1"),
        ((), ("round_2",), ""),
        (("merge_2",), (), "round_2"),
    ]
    assert groups["round_2"].tasks[1].needs == ("merge_1", "round_1-1")
    assert groups["assemble"].after_end == ("expert",)
    assert nodes_section("round_2") == "expert"
    assert nodes_section("merge_2") == "other"


def test_slurm_lets_a_merge_go_on_after_a_time_and_a_task_follow_its_own(whole: Config) -> None:
    def waits(patience: int | None, **jobs: Any) -> str | None:
        return dependency(Request("merge_1", "k", "run", Path("snapshot"), patience=patience, **jobs))

    assert waits(None, after_end=("7",)) == "afterany:7"
    assert waits(30, after_end=("7",)) == "afterany:7?after:7+30"
    assert waits(30, after_end=("7", "8")) == "after:7+30:8+30", "the end of one of two arrays is not enough"
    assert waits(30) is None
    assert waits(None, after_success=("9",), after_task=("7",)) == "afterok:9,aftercorr:7"
    patient = whole.model_copy(update={"cluster": whole.cluster.model_copy(update={"straggler_minutes": 30})})
    groups = groups_of(patient)
    assert [groups[name].patience(patient) for name in ("round_1", "merge_1", "assemble")] == [None, 30, None]
    text = describe_plan(patient)
    assert "#SBATCH --dependency='afterany:<round_1>?after:<round_1>+30'" in text
    assert "#SBATCH --dependency='afterok:<merge_1>,aftercorr:<round_1>'" in text
    assert "when round_1 has ended or 30 min have passed since it started" in text


def test_only_tasks_whose_own_round_still_runs_wait_for_it(whole: Config) -> None:
    tasks = groups_of(whole)["expert"].tasks
    live = {"round_1-0": "7", "round_1-1": "7", "round_1-2": "9"}
    found = by_twin(tasks, live, {"round_1-0"})
    assert {job: [task.index for task in own] for job, own in found.items()} == {"": [0], "7": [1], "9": [2]}


@pytest.fixture
def launcher(whole: Config) -> LocalLauncher:
    """One that has everything before the rounds, and starts nothing."""
    cluster = whole.cluster.model_copy(update={"min_experts": 2, "straggler_minutes": 10})
    config = whole.model_copy(update={"cluster": cluster})
    found = LocalLauncher(config, build_tasks(config), print)
    found.done = {"prepare-data", "backbone", "dense"}
    return found


def ready(launcher: LocalLauncher) -> list[str]:
    return [task.name for task in launcher.tasks if launcher._is_ready(task)]


def test_here_a_failed_expert_holds_nobody(launcher: LocalLauncher) -> None:
    assert ready(launcher) == ["round_1-0", "round_1-1", "round_1-2"]
    launcher.done |= {"round_1-0", "round_1-2"}
    assert ready(launcher) == ["round_1-1"]
    launcher.failed["round_1-1"] = 1
    assert ready(launcher) == ["merge_1"]
    launcher.done.add("merge_1")
    assert ready(launcher) == ["expert-0", "expert-2"], "expert 1 has nothing to go on with"
    launcher.done |= {"expert-0", "expert-2"}
    assert ready(launcher) == ["assemble"]


def test_here_too_few_experts_stop_the_merge(launcher: LocalLauncher) -> None:
    launcher.failed |= {"round_1-0": 1, "round_1-1": 1}
    launcher.done.add("round_1-2")
    assert ready(launcher) == []


def test_here_a_straggler_is_waited_for_no_longer_than_is_said(
    launcher: LocalLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    launcher.starts = {"round_1-0": now, "round_1-1": now, "round_1-2": now}
    launcher.done.add("round_1-0")
    monkeypatch.setattr(time, "monotonic", lambda: now + 601)
    assert "merge_1" not in ready(launcher), "two experts are needed"
    launcher.done.add("round_1-1")
    assert "merge_1" in ready(launcher)
    monkeypatch.setattr(time, "monotonic", lambda: now + 599)
    assert "merge_1" not in ready(launcher)
    launcher.done.add("merge_1")
    assert ready(launcher) == ["round_1-2", "expert-0", "expert-1"]
    launcher.done.add("round_1-2")
    assert ready(launcher) == ["expert-0", "expert-1", "expert-2"], "the late one joins"


def test_the_report_tells_what_rounds_cost(whole: Config) -> None:
    table = rounds_table(read_run(whole.output_dir))
    assert table is not None
    first, last = table.rows
    assert (first[:2], last[:2]) == (["1", "3 of 3"], ["2 (last)", "3 of 3"])
    merged = Run(whole).require("merge_1").manifest
    sizes = sum(Run(whole).require("round_1", k).entry(SHARED_NAME).size for k in range(3))
    assert merged.facts["bytes_read"] == sizes
    assert merged.facts["bytes_written"] == merged.files[SHARED_NAME].size
    assert "–" not in first
    parts = {part.name: part for part in parts_of(read_run(whole.output_dir))}
    assert [parts[name].steps for name in ("round_1-0", "expert-0")] == [5, 5]
    assert "round_2-0" not in parts


def test_what_is_known_before_and_after(whole: Config) -> None:
    text = describe(whole)
    shared_weights = sum(value.numel() for value in shared_of(Run(whole).require("expert", 0)).values())
    assert f"shared:     {shared_weights:,} parameters (embeddings, head, attention, norms)" in text
    read = 3 * 4 * shared_weights
    assert f"in 2 round(s); each of 1 merges reads {read:,} bytes and writes {4 * shared_weights:,}" in text
    card = Run(whole).require("assemble").read_bytes("README.md").decode()
    assert "Its attention, embeddings, norms are the mean of what each expert made of them." in card


def test_an_expert_without_a_run_has_one_round(whole: Config) -> None:
    run = Run(whole)
    trainer = ModuleTrainer(whole, run.url("backbone"), run.corpus.tokenizer)
    with pytest.raises(ConfigError, match=r"experts\.rounds must be 1 where an expert is trained without a run"):
        trainer.train(0, ["some text"], ["other text"], "nowhere")
