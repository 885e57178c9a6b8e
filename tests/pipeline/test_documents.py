"""`data.packing: documents` through all stages: the same data, other models, every document on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modularforge.config import Config
from modularforge.config_files import make_config
from modularforge.data.token_files import ExampleTokens
from modularforge.errors import ConfigError
from modularforge.evaluation.scoring import even_loss, summed_losses
from modularforge.model.folder import load_model
from modularforge.pipeline import STAGES, stage_settings
from modularforge.run import Run
from modularforge.stages import evaluate
from modularforge.tasks.task import task_of
from tests.conftest import run_every_stage, tiny_config, tiny_values

CHANGES: dict[str, Any] = {
    "assembly": {"router": "evidence"},
    "experts": {"anchored": False},
    "evaluation": {"baselines": ["dense", "joint", "joint_evidence", "btx"]},
}


def config_of(folder: Path, packing: str = "documents", **changes: Any) -> Config:
    config = tiny_config(folder, **{**CHANGES, **changes})
    return config.model_copy(update={"data": config.data.model_copy(update={"packing": packing})})


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run."""
    config = config_of(tmp_path_factory.mktemp("documents") / "run")
    run_every_stage(config)
    return config


def test_what_trains_and_what_measures_has_another_identity_and_nothing_else(tmp_path: Path) -> None:
    stream, documents = (config_of(tmp_path, packing) for packing in ("stream", "documents"))
    changed = {name for name in STAGES if stage_settings(stream, name) != stage_settings(documents, name)}
    assert changed == {name for name, stage in STAGES.items() if stage.phase} | {"evaluate"}
    assert not any("data.packing" in stage_settings(stream, name) for name in STAGES)


def test_manifests_say_how_many_documents_were_cut(config: Config) -> None:
    run = Run(config)
    for stage, index in (("backbone", None), ("expert", 0)):
        facts = run.require(stage, index).manifest.facts["documents"]
        assert facts["pieces"] > facts["cut"] > 0
        assert 0.9 < facts["filled"] <= 1.0
    assert run.require("backbone").manifest.facts["documents"]["count"] == run.corpus.tokens("train").num_documents


@pytest.mark.parametrize(("stage", "name"), [("backbone", "backbone"), ("assemble", "assembled")])
def test_the_loss_of_a_domain_is_that_of_its_documents_each_alone(config: Config, stage: str, name: str) -> None:
    """Of an assembled model too, whose router's evidence is of one document alone."""
    run = Run(config)
    results = evaluate.run(run)
    model = load_model(run.require(stage).local_folder())
    label, stream = next(iter(run.corpus.domains("test", config.evaluation.tokens_per_domain).items()))
    assert isinstance(stream, ExampleTokens)
    total, count, room = 0.0, 0, config.model.context_length
    for first, end in zip(stream.offsets[:-1], stream.offsets[1:], strict=True):
        for start in range(int(first), int(end) - 1, room):
            ids = torch.tensor(stream.tokens[start : min(start + room + 1, int(end))].astype(np.int64))[None]
            with torch.no_grad():
                total += float(model(ids[:, :-1], targets_BT=ids[:, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    row = results["models"][name]["domains"][label]
    assert row["tokens"] == count
    assert row["loss"] == pytest.approx(total / count, abs=1e-5)
    limit = config.evaluation.tokens_per_domain
    sums = summed_losses(model, {label: stream}, room, 4, limit + 1)
    assert even_loss(sums) == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_a_mixture_trains_backbone_and_experts_on_other_shares(packing: str, config: Config, tmp_path: Path) -> None:
    labels = [source.name for source in config.data.sources]
    mix = [{"source": labels[0], "weight": 4.0}]
    values = tiny_values(tmp_path / packing, **CHANGES, data_dir=config.data_url)
    values["data"] |= {"packing": packing, "mix": mix}
    values["partition"] = {"method": "domain", "overlap_ratio": 0.5}
    mixed, plain = make_config(values, "tests"), config_of(tmp_path, packing)
    changed = {name for name in STAGES if stage_settings(plain, name) != stage_settings(mixed, name)}
    assert changed == {name for name, stage in STAGES.items() if stage.phase} | {"partition", "centres", "assign"}
    run = Run(mixed.model_copy(update={"data_dir": str(tmp_path / packing / "data")}))
    for stage, index in (("prepare-data", None), ("partition", None), ("backbone", None), ("expert", 1)):
        run.make(stage, index)
    drawn = run.require("backbone").manifest.facts["mixture"]
    phase = mixed.backbone
    assert sum(item["windows"] for item in drawn.values()) == phase.steps * phase.batch_size
    assert drawn[labels[0]]["epochs"] > 2 * drawn[labels[1]]["epochs"]
    beside = run.require("expert", 1).manifest.facts["mixture"]
    assert beside[labels[0]]["share"] > 0, "text of another source beside the domain's own"
    mixture = task_of(mixed).mixture(mixed, run.require("partition"), "joint", mixed.baseline_phase("joint"))
    assert next(iter(mixture.batches())).position > 0


def test_documents_are_packed_under_text_alone(tmp_path: Path) -> None:
    values = tiny_values(tmp_path, task="instruction")
    values["data"]["packing"] = "documents"
    with pytest.raises(ConfigError, match=r"data\.packing must be left out under task instruction"):
        make_config(values, "tests")
