"""The classes for notebooks do the whole thing on plain texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from modularforge import Evaluator, LayerNormCalibrator, ModuleTrainer, SharedTrainer, StreamingAssembler
from modularforge.config import Config
from modularforge.data.tokenizer import train_tokenizer
from modularforge.errors import ConfigError
from modularforge.model.folder import load_model
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
    loader = torch.utils.data.DataLoader(rows, batch_size=4)

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
