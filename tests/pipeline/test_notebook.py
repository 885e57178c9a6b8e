"""The classes for notebooks do the whole thing on plain texts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from modularforge import Evaluator, LayerNormCalibrator, ModuleTrainer, SharedTrainer, StreamingAssembler, open_run
from modularforge.config import Config
from modularforge.config_files import to_yaml
from modularforge.data.tokenizer import train_tokenizer
from modularforge.errors import ConfigError
from modularforge.model.folder import load_model
from modularforge.run import Run
from modularforge.stored_tokens import token_file
from tests.conftest import tiny_config

TEXTS = {
    "letters": [" ".join("abcde"[(i + j) % 5] * 3 for j in range(80)) for i in range(12)],
    "numbers": [" ".join(str((i * j) % 97) for j in range(80)) for i in range(12)],
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    changes = {"experts": {"count": 2}, "backbone": {"steps": 10}, "partition": {"method": "random"}}
    return tiny_config(tmp_path / "unused", **changes)


def test_from_texts_to_an_evaluated_model(config: Config, tmp_path: Path) -> None:
    everything = [text for texts in TEXTS.values() for text in texts]
    tokenizer = train_tokenizer(everything, 300)
    ids = np.concatenate([found.ids for found in tokenizer.encode_batch(everything)])
    rows = torch.from_numpy(ids[: len(ids) // 65 * 65].astype(np.int64)).view(-1, 65)
    loader: DataLoader[torch.Tensor] = DataLoader(rows, batch_size=4)  # type: ignore[arg-type]  # any sequence will do

    shared = SharedTrainer(config, vocab_size=tokenizer.get_vocab_size())
    losses = shared.train(loader, [rows[:4]], str(tmp_path / "shared-run"))
    assert losses["validation_loss"] is not None
    shared.save(str(tmp_path / "shared"), tokenizer)

    trainer = ModuleTrainer(config, str(tmp_path / "shared"), tokenizer)
    experts = trainer.train_all(list(TEXTS.values()), everything, str(tmp_path / "experts"))
    assert [Path(expert.url).name for expert in experts] == ["expert-0", "expert-1"]

    assembled = StreamingAssembler(config).assemble(
        str(tmp_path / "shared"), [expert.url for expert in experts], str(tmp_path / "assembled")
    )
    assert load_model(assembled.local_folder()).vocab_size == tokenizer.get_vocab_size()

    result = LayerNormCalibrator(config, tokenizer).calibrate(assembled.url, everything, str(tmp_path / "calibrated"))
    assert result.kept == (result.after < result.before) == (tmp_path / "calibrated").exists()

    found = Evaluator(config, tokenizer).evaluate(assembled.url, TEXTS)
    assert found.domains.keys() == TEXTS.keys()
    assert 0 < found.mean_loss < np.log(tokenizer.get_vocab_size()) + 1


def test_saving_before_training_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="call train first"):
        SharedTrainer(config).save(str(tmp_path / "x"))


def test_what_a_notebook_made_of_a_partitions_texts_is_the_runs_own(finished_run: Config, tmp_path: Path) -> None:
    """The same settings and inputs have the same fingerprint, whoever trains: the pipeline goes on from there."""
    shutil.copytree(Path(finished_run.output_dir), tmp_path / "run")
    shutil.rmtree(tmp_path / "run/experts/expert-1")
    run = Run(finished_run.model_copy(update={"output_dir": str(tmp_path / "run")}))
    file = token_file(run.require("partition"), "partition-1")
    texts = [run.corpus.tokenizer.decode(file.document(index).tolist()) for index in range(file.num_documents)]
    trainer = ModuleTrainer(run.config, run.url("backbone"), run.corpus.tokenizer)
    made = trainer.train(1, texts, texts[:2], str(tmp_path / "run/experts"))
    found, theirs = run.require("expert", 1), Run(finished_run).require("expert", 1)
    assert found.url == made.url
    assert found.manifest.files["expert.safetensors"] == theirs.manifest.files["expert.safetensors"]
    paths_of = [run.url("expert", index) for index in range(3)]
    assembled = StreamingAssembler(run.config).assemble(run.url("backbone"), paths_of, str(tmp_path / "again"))
    assert assembled.manifest.fingerprint == Run(finished_run).require("assemble").manifest.fingerprint


def test_a_notebook_opens_a_run_of_a_settings_file(finished_run: Config, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(finished_run))
    run = open_run(str(path), {"evaluation.sample_tokens": 4})
    assert run.make("expert", 2).url == run.require("expert", 2).url
    assert run.backbone.model().vocab_size == run.corpus.vocab_size
    assert open_run(str(path), output_dir=str(tmp_path / "new")).artifact("backbone") is None
