"""Calibration changes norms and router only, and never ships a worse model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import paths
from modularforge.calibration import calibrator
from modularforge.calibration.calibrator import Calibration, choose_parameters, split_documents
from modularforge.config import Config
from modularforge.config_files import to_yaml
from modularforge.data.token_files import TokenFile
from modularforge.experts.calibrated import own_entries
from modularforge.model import names
from modularforge.model.folder import load_model, read_tensors
from modularforge.pipeline import stage_url
from modularforge.run import Run
from modularforge.stage_outputs import Corpus
from modularforge.stages import calibrate, evaluate
from modularforge.training.distributed import World
from modularforge.training.job import Job
from tests.conftest import run_command
from tests.naive import naive_losses


def other_calibration(finished_run: Config, folder: Path, **changes: object) -> Config:
    """The finished run with another calibration in a folder of its own; everything else is shared."""
    for name in ("backbone", "experts", "assembled"):
        (folder / name).symlink_to(paths.local_path(finished_run.output_dir) / name)
    settings = finished_run.calibration.model_copy(update=changes)
    return finished_run.model_copy(
        update={"calibration": settings, "output_dir": str(folder), "data_dir": finished_run.data_url}
    )


def held_out_loss(config: Config, stage: str) -> float:
    corpus = Corpus(Run(config).require("prepare-data"))
    _, decide = split_documents(corpus.tokens("validation"), corpus.labels)
    model = load_model(Run(config).require(stage).local_folder())
    limits = config.evaluation.batch_size, config.evaluation.tokens_per_domain
    return naive_losses(model, decide, corpus.byte_lengths, *limits).mean_loss


def test_a_calibration_that_hurts_is_reported_and_not_shipped(finished_run: Config, tmp_path: Path) -> None:
    config = other_calibration(finished_run, tmp_path, peak_learning_rate=1000.0, warmup_steps=0, steps=3)
    calibrate.run(Run(config))
    artifact = Run(config).require("calibrate")
    assert artifact.manifest.facts["kept"] is False
    assert artifact.manifest.facts["loss_after"] > artifact.manifest.facts["loss_before"]
    assert list(artifact.manifest.files) == ["calibration.json"]
    assert evaluate.chosen_model(Run(config)).url == stage_url(config, "assemble")
    assert "calibrated" not in evaluate.find_models(Run(config))


def test_a_calibration_that_helps_is_shipped_and_its_report_is_true(finished_run: Config) -> None:
    facts = Run(finished_run).require("calibrate").manifest.facts
    assert facts["kept"] is True
    assert facts["loss_before"] == pytest.approx(held_out_loss(finished_run, "assemble"), abs=1e-6)
    assert facts["loss_after"] == pytest.approx(held_out_loss(finished_run, "calibrate"), abs=1e-6)
    assert facts["loss_after"] < facts["loss_before"]
    assert evaluate.chosen_model(Run(finished_run)).url == stage_url(finished_run, "calibrate")


@pytest.mark.parametrize(("norms", "router"), [(True, False), (False, True), (True, True)])
def test_only_what_is_asked_for_learns(norms: bool, router: bool, finished_run: Config) -> None:
    model = load_model(Run(finished_run).require("assemble").local_folder())
    settings = finished_run.calibration.model_copy(update={"norms": norms, "router": router})
    choose_parameters(model, finished_run.model_copy(update={"calibration": settings}))
    for name, weight in model.named_parameters():
        assert weight.requires_grad == ((norms and "norm" in name) or (router and "gate.weight" in name)), name


def test_the_calibrated_folder_differs_from_the_assembled_one_in_norms_and_router_only(finished_run: Config) -> None:
    before = read_tensors(Run(finished_run).require("assemble").local_folder())
    after = read_tensors(Run(finished_run).require("calibrate").local_folder())
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("norm" in name or "gate.weight" in name for name in changed)


def test_the_halves_share_no_document_and_a_lone_one_decides() -> None:
    lengths = [3, 4, 5, 6]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    file = TokenFile("v", np.arange(18), offsets, np.array([0, 0, 0, 1], dtype=np.uint16))
    fit_half, decide_half = split_documents(file, ["a", "b"])
    assert fit_half.keys() == {"a"}
    assert decide_half.keys() == {"a", "b"}
    assert set(fit_half["a"]).isdisjoint(decide_half["a"])
    assert len(fit_half["a"]) + len(decide_half["a"]) == 12


@pytest.fixture(scope="module")
def widened(finished_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The finished run's experts with an evidence router, whose channels lie in all shared matrices."""
    folder = tmp_path_factory.mktemp("widened")
    for name in ("backbone", "experts"):
        (folder / name).symlink_to(paths.local_path(finished_run.output_dir) / name)
    assembly = finished_run.assembly.model_copy(update={"router": "evidence"})
    shared = {"shared": True, "text": "training", "weight_decay": 0.1, "steps": 8, "peak_learning_rate": 3e-3}
    config = finished_run.model_copy(
        update={
            "assembly": assembly,
            "calibration": finished_run.calibration.model_copy(update=shared),
            "output_dir": str(folder),
            "data_dir": finished_run.data_url,
        }
    )
    Run(config).make("assemble")
    return config


def test_shared_weights_learn_and_what_the_evidence_router_reads_stays(widened: Config) -> None:
    run = Run(widened)
    calibrated = run.make("calibrate")
    assert calibrated.manifest.facts["kept"], calibrated.manifest.facts
    before, after = (read_tensors(run.require(name).local_folder()) for name in ("assemble", "calibrate"))
    backbone, learned = run.backbone.tensors, set()
    for name, old in before.items():
        if (part := names.shared_part(name)) in ("embeddings", "attention"):
            rows, columns = backbone[name].shape
            own = after[name][:rows, :columns] != old[:rows, :columns]
            assert own.float().mean() > 0.3, name  # of embeddings, those of tokens that occur
            around = (after[name] != old).clone()
            around[:rows, :columns] = False
            assert not around.any(), name
            learned.add(part)
        elif not part and "gate.weight" not in name:
            assert torch.equal(after[name], old), name
    assert learned == {"embeddings", "attention"}
    assert b"embeddings, attention and head were fitted on training text" in calibrated.read_bytes("README.md")


def test_shared_weights_are_kept_only_if_a_switch_is_no_worse(widened: Config) -> None:
    facts = Run(widened).make("calibrate").manifest.facts
    assert set(facts["beside"]) == {"switch"}
    before, after = facts["beside"]["switch"]
    assert after <= before
    worse = Calibration(3.0, 2.9, {}, {"switch": (3.0, 3.0), "general": (3.0, 3.1)})
    assert not worse.kept
    assert Calibration(3.0, 2.9, {}, {"switch": (3.0, 3.0)}).kept
    assert not Calibration(3.0, 3.0, {}).kept


def test_a_widened_matrix_is_told_from_what_lies_around_it(widened: Config) -> None:
    model = load_model(Run(widened).require("assemble").local_folder())
    backbone, seen = Run(widened).backbone.tensors, model.model.norm.weight != 0
    for name, weight in model.named_parameters():
        if names.shared_part(name) in ("embeddings", "attention"):
            mask, (rows, columns) = own_entries(name, weight, seen), backbone[name].shape
            assert mask[:rows, :columns].all(), name
            assert int(mask.sum()) == rows * columns, name


def test_text_of_the_partitions_comes_after_that_of_the_experts(
    widened: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(calibrator, "calibrate_on", lambda examples, *_: asked.append(examples))
    run = Run(widened)
    model = load_model(run.require("assemble").local_folder())
    calibrator.calibrate_as_set(model, widened, run.corpus, run.require("partition"), Job("c", *(None,) * 2), World())  # type: ignore[arg-type]
    assert asked[0].first_window == widened.experts.steps * widened.experts.batch_size
    wanted = widened.calibration.steps * widened.calibration.batch_size
    assert len(list(asked[0].batches())) >= widened.calibration.steps
    assert asked[0].windows_each * 3 >= wanted


@pytest.mark.parametrize(
    "layout", ["2-fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("4-hsdp", "2-ddp"))]
)
def test_a_calibration_on_several_ranks_is_that_of_one_process(layout: str, widened: Config, tmp_path: Path) -> None:
    """With the masks of shared matrices, whose rows lie on several ranks, and losses beside the held-out one."""
    alone, (ranks, parallel) = Run(widened).make("calibrate"), layout.split("-")
    for name in ("backbone", "experts"):
        (tmp_path / name).symlink_to((Path(widened.output_dir) / name).resolve())
    training = widened.training.model_copy(update={"parallel": parallel, "shard_ranks": 2 if ranks == "4" else None})
    config = widened.model_copy(update={"training": training, "output_dir": str(tmp_path)})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    run_command("tests.shard_ranks", str(tmp_path / "config.yaml"), ranks, "assemble", "calibrate")
    shared = Run(config).require("calibrate")
    assert shared.manifest.fingerprint == alone.manifest.fingerprint
    facts, expected = shared.manifest.facts, alone.manifest.facts
    for name in ("loss_before", "loss_after"):
        assert facts[name] == pytest.approx(expected[name], abs=2e-5)
    assert facts["beside"]["switch"] == pytest.approx(expected["beside"]["switch"], abs=2e-5)
    one, other = (read_tensors(artifact.local_folder()) for artifact in (alone, shared))
    assert one.keys() == other.keys()
    before = read_tensors(Run(widened).require("assemble").local_folder())
    assert all(torch.equal(one[name] == before[name], other[name] == before[name]) for name in one)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-3  # a step moves a weight by 3e-3
