"""`partition.everywhere`: each expert trains on its own domain and on general text, and is known by its own alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modularforge.config import Config
from modularforge.data.token_files import open_token_file
from modularforge.routing.text_counts import COUNTS_NAME, count_text, load_counts
from modularforge.run import Run
from tests.conftest import tiny_config


def config_of(folder: Path, packing: str) -> Config:
    general = tiny_config(folder).data.sources[0].name
    return tiny_config(
        folder,
        data={"packing": packing, "temperature": None, "mix": [{"source": general, "weight": 0.5}]},
        partition={"method": "domain", "everywhere": [general]},
        experts={"count": 2, "anchored": False, "counted_pairs": 0},
        assembly={"router": "evidence"},
    )


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_an_expert_draws_general_text_and_is_known_by_its_own(packing: str, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", packing)
    run = Run(config)
    for stage in ("prepare-data", "partition", "backbone"):
        run.make(stage)
    expert = run.make("expert", 0)
    run.make("expert", 1)
    drawn = expert.manifest.facts["mixture"]
    own, general = config.data.sources[1].name, config.data.sources[0].name
    assert drawn.keys() == {own, general}
    assert drawn[general]["share"] == pytest.approx(1 / 3, abs=0.1)
    file = open_token_file(run.require("partition").local_folder(), "partition-0")
    ids = np.concatenate([file.document(int(index)) for index in np.flatnonzero(file.labels == 1)])
    found = load_counts(expert.local_file(COUNTS_NAME))
    expected = count_text(ids, len(found.tokens_V), [], 10**9, 0).tokens_V
    assert np.array_equal(found.tokens_V[4:], expected[4:]), "but for special tokens"
    assert found.tokens_V.sum() > 0
    run.make("assemble")
