"""A study shares work, continues after a kill, and its numbers are those of the stages and of naive computations."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from checkpoints import find_artifact, open_artifact, paths, plain_folder
from modularforge.assembly.assemble import assemble as put_together
from modularforge.calibration.calibrator import split_documents
from modularforge.config_files import to_yaml
from modularforge.data.loader import IGNORED_TARGET, evaluation_batches
from modularforge.errors import ConfigError
from modularforge.evaluation.baselines import build_btx, solved_router
from modularforge.evaluation.probes import position_ranges
from modularforge.model import names
from modularforge.model.folder import load_model, read_tensors
from modularforge.model.moe import load_balance_loss, observe_routing
from modularforge.model.upcycling import joint_mixture
from modularforge.run import Run
from modularforge.stage_outputs import Backbone, Corpus
from modularforge.stages import assemble, calibrate, evaluate
from modularforge.stages.baselines import choose_trained
from modularforge.study.runs import Runs
from modularforge.study.study import collect, run_study
from modularforge.study.study_file import load_study, variants_of
from modularforge.study.table import make_table
from modularforge.tasks.task import Examples
from modularforge.tasks.text import TEXT
from tests.conftest import ROOT, run_command, tiny_config
from tests.naive import naive_losses

RIDGE = {"assembly.router": "ridge"}
STUDY: dict[str, Any] = {
    "name": "tiny",
    "seeds": [0, 1],
    "validation_tokens_per_domain": 700,
    "reference": "plain",
    "recipes": {
        "plain": {"experts.anchored": False},
        "anchored": {"experts.anchored": True},
        "frozen": {"experts.anchored": False, "joint.freeze_shared": True},
        "random": {"experts.anchored": False, "partition.method": "random"},
        "longer": {"experts.anchored": False, "experts.steps": 12},
        "fewer": {"experts.anchored": False, "experts.steps": 8, "btx.steps": 2, "btx.batch_size": 12},
    },
    "variants": {
        "backbone": {"kind": "backbone"},
        "dense": {"kind": "dense"},
        "wide": {"kind": "dense_wide"},
        "soup": {"kind": "soup"},
        "experts": {"kind": "experts", "recipe": ["plain", "anchored"]},
        "uniform": {"kind": "ensemble_uniform"},
        "posterior": {"kind": "ensemble_posterior"},
        "joint": {"kind": "joint", "recipe": ["plain", "frozen"]},
        "together": {"kind": "joint_evidence", "seeds": [0]},
        "btx": {"kind": "btx", "set": RIDGE},
        "btx_trained": {"kind": "btx_trained", "recipe": "fewer", "seeds": [0]},
        "ridge": {
            "kind": "assembled",
            "recipe": ["plain", "anchored"],
            "removal": True,
            "set": {**RIDGE, "assembly.experts_per_token": [1, "all"]},
        },
        "evidence": {"kind": "assembled", "without": True, "set": {"assembly.router": "evidence"}},
        "calibrated": {"kind": "assembled", "calibrate": True, "set": RIDGE, "final": False},
        "random": {"kind": "assembled", "recipe": "random", "set": RIDGE, "seeds": [0]},
        "longer": {"kind": "assembled", "recipe": "longer", "set": RIDGE, "seeds": [0]},
    },
}


def write_study(folder: Path, **changes: Any) -> Path:
    base = folder / "base.yaml"
    base.write_text(to_yaml(tiny_config(folder / "unused", assembly={"router": "ridge"})))
    path = folder / "study.yaml"
    (folder / "readme.txt").write_text("A text of no domain, such as how to build it: make install. " * 20)
    texts = {"validation": [str(folder / "readme.txt")]}
    path.write_text(
        yaml.safe_dump(
            {**STUDY, "texts": texts, "base": str(base), "output_dir": str(folder / "out"), **changes}, sort_keys=False
        )
    )
    return path


@pytest.fixture(scope="module")
def finished_study(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(load_study(str(write_study(tmp_path_factory.mktemp("study")))))
    run_study(runs, "validation")
    run_study(runs, "test", only=["backbone", "experts", "ridge", "calibrated"], seeds=[0])
    return runs


def table_of(runs: Runs, split: str = "validation") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(paths.read_bytes(f"{runs.root}/table-{split}.json"))
    return found


def result_of(runs: Runs, variant: str, seed: int = 0, split: str = "validation") -> dict[str, Any]:
    found: dict[str, Any] = open_artifact(f"{runs.root}/results/{split}/seed-{seed}/{variant}").read_json("result.json")
    return found


def test_the_table_has_every_variant_with_the_mean_of_its_seeds(finished_study: Runs) -> None:
    table = table_of(finished_study)
    assert list(table["rows"]) == [
        "backbone", "dense", "wide", "soup", "plain-experts: best expert", "plain-experts: oracle",
        "anchored-experts: best expert", "anchored-experts: oracle", "uniform", "posterior", "plain-joint",
        "frozen-joint", "together", "btx", "btx_trained", "plain-ridge-experts_per_token_1",
        "plain-ridge-experts_per_token_all",
        "anchored-ridge-experts_per_token_1", "anchored-ridge-experts_per_token_all", "evidence",
        "evidence: without own expert", "calibrated", "random", "longer",
    ]  # fmt: skip
    row, found = table["rows"]["uniform"], [result_of(finished_study, "uniform", seed) for seed in (0, 1)]
    losses = [item["rows"][""]["mean_loss"] for item in found]
    assert row["mean_loss"] == pytest.approx(statistics.fmean(losses), abs=1e-12)
    assert row["standard_deviation"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5, abs=1e-12)
    for label in table["domains"]:
        each = [item["rows"][""]["domains"][label]["loss"] for item in found]
        assert row["domains"][label] == pytest.approx(statistics.fmean(each), abs=1e-12)
    assert list(table["rows"]["random"]["losses"]) == ["0"]
    page = paths.read_bytes(f"{finished_study.root}/table-validation.md").decode()
    assert f"| uniform | 2 | {row['mean_loss']:.4f} |" in page
    assert paths.read_bytes(f"{finished_study.root}/table-validation.png").startswith(b"\x89PNG")


def test_gains_compare_rows_of_one_seed_and_of_the_same_tokens(finished_study: Runs) -> None:
    table = table_of(finished_study)
    shares, worst = [], []
    for seed in (0, 1):
        backbone, oracle, mine = (
            result_of(finished_study, name, seed)["rows"][row]
            for name, row in (("backbone", ""), ("plain-experts", "oracle"), ("anchored-ridge-experts_per_token_1", ""))
        )
        gain = backbone["mean_loss"] - oracle["mean_loss"]
        shares.append((backbone["mean_loss"] - mine["mean_loss"]) / gain)
        worst += [mine["domains"][label]["loss"] - backbone["domains"][label]["loss"] for label in mine["domains"]]
    row = table["rows"]["anchored-ridge-experts_per_token_1"]
    assert row["kept"] == pytest.approx(statistics.fmean(shares))
    assert row["worst_domain"]["change"] == pytest.approx(max(worst))
    assert table["rows"]["plain-experts: oracle"]["kept"] == pytest.approx(1)
    assert table["rows"]["random"]["kept"] is not None
    assert table["rows"]["longer"]["kept"] is None, "no oracle and no dense model got as many tokens"


def test_rows_say_how_many_bytes_training_left_and_how_long_it_took(finished_study: Runs) -> None:
    rows, folder = table_of(finished_study)["rows"], Path(finished_study.config(0, "plain").output_dir)
    assert rows["backbone"]["trained_bytes"] == rows["backbone"]["processor_seconds"] == 0
    experts = [open_artifact(str(folder / f"experts/expert-{index}")).manifest for index in range(3)]
    for name in ("plain-experts: oracle", "uniform", "plain-ridge-experts_per_token_1"):
        assert rows[name]["trained_bytes"] == sum(file.size for one in experts for file in one.files.values())
        seconds = sum(one.facts["processor_seconds"] for one in experts)
        assert rows[name]["processor_seconds"] == pytest.approx(seconds)
        assert seconds > 0
    dense = (folder / "baselines/dense/model.safetensors").stat().st_size
    assert dense <= rows["dense"]["trained_bytes"] < 1.1 * dense, "tokenizer and the like are the backbone's"


def test_shared_work_is_done_once(finished_study: Runs) -> None:
    root = Path(finished_study.root)
    trained = {path.relative_to(root).as_posix() for path in root.glob("seed-*/*/metrics/*.jsonl")}
    plain = {
        "backbone",
        "dense",
        "dense_wide",
        "joint",
        *(f"{kind}-{k}" for kind in ("expert", "branch") for k in range(3)),
    }
    expected = {f"seed-{seed}/plain/metrics/{job}.jsonl" for seed in (0, 1) for job in plain}
    expected |= {f"seed-{seed}/anchored/metrics/expert-{k}.jsonl" for seed in (0, 1) for k in range(3)}
    expected |= {f"seed-{seed}/frozen/metrics/joint.jsonl" for seed in (0, 1)}
    expected |= {f"seed-0/{recipe}/metrics/expert-{k}.jsonl" for recipe in ("random", "longer") for k in range(3)}
    expected.add("seed-0/plain/metrics/joint_evidence.jsonl")
    expected |= {"seed-0/fewer/metrics/btx.jsonl", *(f"seed-0/fewer/metrics/branch-{k}.jsonl" for k in range(3))}
    assert trained == expected
    corpora = [find_artifact(str(folder)) for folder in (root / "data").iterdir()]
    assert len(corpora) == 2, "one data folder for each way of dividing the documents"
    assert len({artifact.manifest.fingerprint for artifact in corpora if artifact}) == 1


def test_a_finished_study_does_nothing_again_and_a_changed_variant_alone_is_measured(
    finished_study: Runs, tmp_path: Path
) -> None:
    def manifests() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in Path(finished_study.root).rglob("manifest.json")}

    before = manifests()
    run_study(finished_study, "validation")
    assert manifests() == before
    hotter = Runs(finished_study.study, changes=("assembly.ridge_penalty=0.5",))
    run_study(hotter, "validation", only=["btx"], seeds=[0])
    changed = {path for path, moment in manifests().items() if before.get(path) != moment}
    assert changed == {Path(finished_study.root) / "results/validation/seed-0/btx/manifest.json"}
    run_study(finished_study, "validation", only=["btx"])


@pytest.mark.parametrize("recipe", ["plain", "anchored"])
def test_an_assembled_variant_has_the_losses_of_the_folder_that_the_stage_writes(
    finished_study: Runs, recipe: str, tmp_path: Path
) -> None:
    config = finished_study.config(0, recipe, {**RIDGE, "assembly.experts_per_token": "all"})
    assemble.run(Run(config))
    name = f"{recipe}-ridge-experts_per_token_all"
    written = evaluate.measure_folder(Run(config), f"{config.output_dir}/assembled")["models"]["assembled"]
    measured = result_of(finished_study, name, split="test")["rows"][""]
    assert measured["mean_loss"] == pytest.approx(written["mean_loss"], abs=1e-6)
    assert measured["active_parameters"] == written["active_parameters"]


def test_a_calibrated_variant_has_the_losses_that_the_stage_decides_by(finished_study: Runs, tmp_path: Path) -> None:
    config = finished_study.config(0, "plain", RIDGE)
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("backbone", "experts"):
        (folder / name).symlink_to(Path(config.output_dir) / name)
    limited = config.evaluation.model_copy(update={"tokens_per_domain": 700})
    config = config.model_copy(update={"output_dir": str(folder), "evaluation": limited})
    assemble.run(Run(config))
    calibrate.run(Run(config))
    facts = open_artifact(str(folder / "calibrated")).manifest.facts
    result = result_of(finished_study, "calibrated")
    assert facts["kept"] is True
    assert result["calibration"] == {key: facts[key] for key in ("kept", "loss_before", "loss_after")}
    assert result["rows"][""]["mean_loss"] == pytest.approx(facts["loss_after"], abs=1e-6)


def test_each_expert_has_the_losses_that_every_other_model_is_measured_by(finished_study: Runs) -> None:
    config = finished_study.config(0, "anchored")
    corpus, backbone = Corpus(Run(config).require("prepare-data")), Backbone(Run(config).require("backbone"))
    limits = config.evaluation.batch_size, config.evaluation.tokens_per_domain
    result = result_of(finished_study, "anchored-experts", split="test")
    best: dict[str, float] = {}
    for index in range(3):
        model = backbone.expert(Run(config).require("expert", index))
        found = naive_losses(model, corpus.domains("test"), corpus.byte_lengths, *limits)
        row = result["experts"][f"expert-{index}"]
        assert row["mean_loss"] == pytest.approx(found.mean_loss, abs=1e-6)
        assert row["bits_per_byte"] == pytest.approx(found.mean_bits_per_byte, abs=1e-6)
        for label, loss in found.losses.items():
            best[label] = min(loss, best.get(label, loss))
    oracle = result["rows"]["oracle"]
    assert oracle["mean_loss"] == pytest.approx(statistics.fmean(best.values()), abs=1e-6)


def test_losses_by_position_add_up_to_the_loss(finished_study: Runs) -> None:
    config = finished_study.config(0, "plain")
    streams = Corpus(Run(config).require("prepare-data")).domains("test", config.evaluation.tokens_per_domain)
    assert position_ranges(100) == [(0, 16), (16, 32), (32, 64), (64, 100)]
    row = result_of(finished_study, "backbone", split="test")["rows"][""]
    for label, tokens in streams.items():
        context = config.model.context_length
        targets = [batch for _, batch in evaluation_batches(tokens, context, 4, config.evaluation.tokens_per_domain)]
        kept = torch.cat(targets) != IGNORED_TARGET
        counts = {f"{first}-{end - 1}": int(kept[:, first:end].sum()) for first, end in position_ranges(context)}
        item = row["domains"][label]
        assert item["positions"].keys() == counts.keys()
        total = sum(counts[name] * loss for name, loss in item["positions"].items())
        assert total / sum(counts.values()) == pytest.approx(item["loss"], abs=1e-9)
    kept_shares = table_of(finished_study)["rows"]["plain-experts: oracle"]["kept_by_position"]
    assert list(kept_shares.values()) == pytest.approx([1.0] * len(kept_shares))


def test_a_domain_without_its_expert_is_measured_by_the_model_of_the_others(finished_study: Runs) -> None:
    config = finished_study.config(0, "plain", {"assembly.router": "evidence"})
    experts = [Run(config).require("expert", index) for index in range(3)]
    corpus = Corpus(Run(config).require("prepare-data"))
    _, decide = split_documents(corpus.tokens("validation"), corpus.labels)
    found = result_of(finished_study, "evidence")["rows"]
    row, whole = found["without own expert"], found[""]
    for index, label in enumerate(table_of(finished_study)["domains"]):
        others = [expert for place, expert in enumerate(experts) if place != index]
        with tempfile.TemporaryDirectory() as folder:
            put_together(config, Run(config).require("backbone"), others, plain_folder(Path(folder)))
            model = load_model(Path(folder))
        limits = config.evaluation.batch_size, finished_study.study.validation_tokens_per_domain
        alone = naive_losses(model, {label: decide[label]}, corpus.byte_lengths, *limits)
        assert row["domains"][label]["loss"] == pytest.approx(alone.mean_loss, abs=1e-6)
        assert row["domains"][label]["loss"] != pytest.approx(whole["domains"][label]["loss"], abs=1e-6)
    held = table_of(finished_study)["rows"]["evidence: without own expert"]["differences"]["backbone"]["text"]
    backbones = [result_of(finished_study, "backbone", seed)["rows"][""] for seed in (0, 1)]
    mine = [result_of(finished_study, "evidence", seed)["rows"]["without own expert"] for seed in (0, 1)]
    changes = [a["mean_loss"] - b["mean_loss"] for a, b in zip(mine, backbones, strict=True)]
    assert held["difference"] == pytest.approx(statistics.fmean(changes), abs=1e-6)
    assert held["seed_error"] == pytest.approx(statistics.stdev(changes) / 2**0.5, abs=1e-6)


def test_rows_are_held_against_others_on_every_probe(finished_study: Runs) -> None:
    rows = table_of(finished_study)["rows"]
    held = rows["evidence"]["differences"]
    assert list(held) == ["backbone", "dense", "joint"]
    assert list(held["dense"]) == ["text", "switch", "mixed", "general"]
    for probe in ("switch", "mixed", "general"):
        mine, other = (
            statistics.fmean(
                result_of(finished_study, name, seed)["rows"][""]["probes"][probe]["mean_loss"] for seed in (0, 1)
            )
            for name in ("evidence", "dense")
        )
        assert rows["evidence"]["probes"][probe]["mean_loss"] == pytest.approx(mine, abs=1e-9)
        assert held["dense"][probe]["difference"] == pytest.approx(mine - other, abs=1e-5)
    assert "backbone" not in rows["backbone"]["differences"]
    assert list(rows["evidence"]["probes"]["general"]["domains"]) == ["readme"]
    page = paths.read_bytes(f"{finished_study.root}/table-validation.md").decode()
    assert "| variant | text | behind a switch | mixed passages | no domain |" in page
    chosen = make_table("t", "validation", collect(finished_study, "validation"), "plain", ["posterior"])
    assert list(chosen["rows"]["evidence"]["differences"]) == ["posterior"]
    assert chosen["rows"]["posterior"]["differences"] == {}


def test_removal_reports_the_domains_of_the_other_experts(finished_study: Runs) -> None:
    removal = result_of(finished_study, "plain-ridge-experts_per_token_all")["removal"]
    labels = table_of(finished_study)["domains"]
    others = [removal["changes"][f"expert-{k}"][label] for k in range(3) for d, label in enumerate(labels) if d != k]
    assert removal["others"] == pytest.approx(max(others, key=abs))
    assert removal["others_mean"] == pytest.approx(statistics.fmean(others))


def test_a_killed_study_continues_and_ends_with_the_same_table(finished_study: Runs, tmp_path: Path) -> None:
    path = write_study(
        tmp_path, seeds=[0], variants={name: STUDY["variants"][name] for name in ("backbone", "dense", "ridge")}
    )
    command = [sys.executable, "-m", "modularforge", "study", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stderr=subprocess.DEVNULL)
    experts = tmp_path / "out" / "seed-0" / "plain" / "experts" / "expert-1" / "manifest.json"
    deadline = time.monotonic() + 120
    while not experts.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert experts.exists()
    moment = experts.stat().st_mtime_ns
    run_command("modularforge", "study", str(path))
    assert experts.stat().st_mtime_ns == moment
    rows = json.loads((tmp_path / "out" / "table-validation.json").read_text())["rows"]
    for name, row in rows.items():
        assert row["losses"]["0"] == table_of(finished_study)["rows"][name]["losses"]["0"], name


def test_frozen_shared_parts_stay_the_backbones_and_others_learn(finished_study: Runs) -> None:
    root = Path(finished_study.root) / "seed-0"
    backbone = read_tensors(root / "frozen" / "backbone")
    frozen, free = (read_tensors(root / recipe / "baselines" / "joint") for recipe in ("frozen", "plain"))
    shared = [name for name in backbone if names.is_shared(name)]
    assert all(torch.equal(frozen[name], backbone[name]) for name in shared)
    assert all(not torch.equal(free[name], backbone[name]) for name in shared)
    for name in frozen.keys() - set(shared):
        assert not torch.equal(frozen[name], free[name]), name


def test_the_joint_model_starts_as_the_backbone_and_its_balance_loss_is_one_when_even(finished_study: Runs) -> None:
    backbone = Backbone(open_artifact(f"{finished_study.root}/seed-0/plain/backbone"))
    model = joint_mixture(backbone.tensors, backbone.values, 3, 3, freeze_shared=False).whole()
    tokens_BT = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT), backbone.model()(tokens_BT), atol=1e-5, rtol=1e-5)
        observe_routing(model)
        model(tokens_BT)
        assert float(load_balance_loss(model)) == pytest.approx(1.0)
        uneven = joint_mixture(backbone.tensors, backbone.values, 3, 1, freeze_shared=False).whole()
        for layer in range(model.config.layers):
            uneven.get_parameter(names.gate(layer))[0] *= 1000
        observe_routing(uneven)
        uneven(tokens_BT)
        assert float(load_balance_loss(uneven)) > 1.05


def test_only_the_channels_make_the_widened_model_larger_than_a_wide_dense_one(finished_study: Runs) -> None:
    evidence, wide, joint = (
        result_of(finished_study, name)["rows"][""] for name in ("evidence", "wide", "plain-joint")
    )
    assert evidence["active_parameters"] - evidence["routing_parameters"] == wide["active_parameters"]
    assert joint["active_parameters"] - joint["routing_parameters"] == wide["active_parameters"]
    assert evidence["routing_parameters"] > joint["routing_parameters"] > wide["routing_parameters"] == 0
    page = paths.read_bytes(f"{finished_study.root}/table-validation.md").decode()
    assert re.search(
        r"Of the active parameters, these carry nothing but routing: .*\bplain-joint \d.*\bevidence \d", page
    )


def test_btx_of_equal_branches_is_that_branch_and_shared_tensors_are_the_mean(finished_study: Runs) -> None:
    config = finished_study.config(0, "plain", RIDGE)
    backbone = Backbone(open_artifact(f"{config.output_dir}/backbone"))
    branches = [open_artifact(f"{config.output_dir}/baselines/branches/branch-{k}") for k in range(3)]
    tokens_BT = torch.arange(40).view(2, 20)
    with torch.no_grad():
        same = build_btx(config, backbone, [branches[1]] * 3)
        own = load_model(branches[1].local_folder())
        torch.testing.assert_close(same(tokens_BT), own(tokens_BT), atol=1e-4, rtol=1e-4)
    merged, each = build_btx(config, backbone, branches), [read_tensors(b.local_folder()) for b in branches]
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"):
        torch.testing.assert_close(merged.get_parameter(name).data, torch.stack([t[name] for t in each]).mean(0))
    down = merged.get_parameter(names.expert_ffn(1, 2, "w2")).data
    assert torch.equal(down, each[2][names.dense_ffn(1, "w2")])


def test_the_trained_btx_merge_starts_from_the_merge_and_keeps_the_ffns(finished_study: Runs) -> None:
    config = finished_study.config(0, "fewer")
    backbone = Backbone(open_artifact(f"{config.output_dir}/backbone"))
    branches = [open_artifact(f"{config.output_dir}/baselines/branches/branch-{k}") for k in range(3)]
    merged = build_btx(solved_router(config), backbone, branches)
    trained = load_model(Path(config.output_dir) / "baselines" / "btx")
    moved = {name for name, weight in merged.named_parameters() if not torch.equal(weight, trained.get_parameter(name))}
    experts = {name for name, _ in merged.named_parameters() if names.expert_position(name)}
    assert moved == {name for name, _ in merged.named_parameters()} - experts, "all but the FFNs, as btx.trains says"
    for trains, left in (("router", {name for name in moved if names.is_gate(name)}), ("all", moved | experts)):
        choose_trained(merged, trains)
        assert {name for name, weight in merged.named_parameters() if weight.requires_grad} == left


def test_the_trained_btx_merge_has_the_tokens_of_the_others_and_is_compared_with_them(finished_study: Runs) -> None:
    trained, plain = (result_of(finished_study, name) for name in ("btx_trained", "btx"))
    assert trained["tokens"] == plain["tokens"]
    assert trained["rows"][""]["training_tokens"] == plain["rows"][""]["training_tokens"]
    rows = table_of(finished_study)["rows"]
    dense = result_of(finished_study, "dense")["rows"][""]["mean_loss"]
    assert rows["btx_trained"]["minus_dense"] == pytest.approx(rows["btx_trained"]["mean_loss"] - dense)


def test_its_second_phase_reads_on_where_the_branches_stopped(finished_study: Runs) -> None:
    """Branches of 8 steps of 4 windows, and 8 windows more of each partition: what jobs of 10 steps see."""
    config = finished_study.config(0, "fewer")
    partitions = Run(config).require("partition")
    rest = TEXT.mixture(config, partitions, "btx", config.btx_phase, 32)
    longer = config.model_copy(update={"experts": config.experts.model_copy(update={"steps": 10})})
    whole = TEXT.mixture(longer, partitions, "joint", longer.baseline_phase("joint"))
    branch = TEXT.mixture(config, partitions, "joint", config.baseline_phase("joint"))

    def windows(examples: Examples) -> list[tuple[int, ...]]:
        return sorted(tuple(row.tolist()) for batch in examples.batches() for row in batch.tensors["inputs"])

    assert len(windows(rest)) == 24
    assert sorted(windows(branch) + windows(rest)) == windows(whole)


def test_collected_results_follow_the_file(finished_study: Runs) -> None:
    assert list(collect(finished_study, "validation")) == [
        variant.name for variant in variants_of(finished_study.study)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipes": {"plain": {}}}, "variants.experts.recipe must be one of the recipes (plain), but is anchored"),
        ({"variants": {"a": {"kind": "assembled", "set": {"experts.steps": 3}}}}, "belongs into a recipe"),
        (
            {"variants": {"a": {"kind": "dense", "calibrate": True}}},
            "a.calibrate must be false for kind dense",
        ),
        (
            {"variants": {"a": {"kind": "assembled", "calibrate": True, "without": True}}},
            "a.without must be false but for kind assembled without calibrate",
        ),
        ({"variants": {"a": {"kind": "dense", "seeds": [7]}}}, "variants.a.seeds must be among the study's ([0, 1])"),
        ({"variants": {"a": {"kind": "sparse"}}}, "variants.a.kind must be 'backbone', 'dense'"),
        ({"variants": {"a b": {"kind": "dense"}}}, "'a b' must be letters"),
        ({"colour": "red"}, "colour is no part of a study file"),
    ],
)
def test_a_mistake_in_a_study_file_is_one_sentence(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_study(str(write_study(tmp_path, **change)))
    assert message in str(caught.value)


def test_a_setting_that_does_not_exist_names_its_recipe(tmp_path: Path) -> None:
    runs = Runs(load_study(str(write_study(tmp_path, recipes={**STUDY["recipes"], "plain": {"experts.step": 3}}))))
    with pytest.raises(ConfigError, match=r"(?s)recipe plain.*did you mean experts\.steps"):
        runs.config(0, "plain")
    with pytest.raises(ConfigError, match="--seed must be one of"):
        run_study(runs, "validation", seeds=[9])
    with pytest.raises(ConfigError, match="--only must name a variant"):
        run_study(runs, "validation", only=["nothing"])
