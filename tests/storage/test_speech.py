"""A speech run on S3, with its recordings there too, gives the same bytes and rates as one on a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from checkpoints import paths
from modularforge.run import Run
from modularforge.stages.evaluate_speech import measure_folder
from tests.speech.runs import speech_config

MADE = [("prepare-data", None), ("partition", None), ("backbone", None), ("expert", 1)]


def test_recordings_and_features_on_s3_train_and_measure_as_those_in_a_folder(s3: str, tmp_path: Path) -> None:
    sounds = tmp_path / "sounds"
    here = speech_config(tmp_path / "run", sounds, evaluation={"baselines": []})
    for path in sounds.glob("*/*"):
        paths.replace_bytes(f"{s3}/sounds/{path.parent.name}/{path.name}", path.read_bytes())
    places = {source.name: f"{s3}/sounds/{source.name}/metadata.jsonl" for source in here.data.sources}
    sources = [source.model_copy(update={"train": places[source.name]}) for source in here.data.sources]
    data = here.data.model_copy(update={"sources": sources})
    there = here.model_copy(update={"output_dir": f"{s3}/run", "data": data})
    for config in (here, there):
        for stage, index in MADE:
            Run(config).make(stage, index)
    for stage, index in MADE[2:]:
        files = [Run(config).require(stage, index).manifest.files for config in (here, there)]
        assert files[0] == files[1], stage
    shutil.rmtree(tmp_path / "cache")  # as another machine, which fetches features and models again
    found, expected = (
        measure_folder(Run(config), Run(config).require("expert", 1).url)["models"]["expert-1"]
        for config in (there, here)
    )
    assert found == expected
