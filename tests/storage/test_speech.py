"""A speech run on S3, with its recordings there too, gives the same bytes and rates as one on a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from checkpoints import paths
from modularforge.run import Run
from modularforge.stages.evaluate_speech import measure_folder
from tests.speech.runs import speech_config

MADE = [("prepare-data", None), ("partition", None), ("backbone", None), ("expert", 1)]


def test_recordings_and_features_on_s3_train_and_measure_as_those_in_a_folder(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[str, int, int]] = []
    original = paths.read_bytes

    def read(url: str, *span: int) -> bytes:
        if url.endswith(".features.bin"):
            fetched.append((url.rpartition("/")[2], *span))  # type: ignore[arg-type]
        return original(url, *span)

    monkeypatch.setattr(paths, "read_bytes", read)
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
            fetched.clear()
            Run(config).make(stage, index)
    whole = Run(there).require("prepare-data").manifest.files["train.features.bin"].size
    of_training = {span for span in fetched if span[0] == "train.features.bin"}
    partition = json.loads(Run(there).require("partition").read_bytes("partitions.json"))["partitions"][1]
    assert 0 < len(of_training) <= partition["documents"], "an expert fetches its own utterances"
    assert sum(end - start for _, start, end in of_training) < 0.7 * whole
    assert len(fetched) == len({*fetched}), "each of them once"
    for stage, index in MADE[2:]:
        files = [Run(config).require(stage, index).manifest.files for config in (here, there)]
        assert files[0] == files[1], stage
    shutil.rmtree(tmp_path / "cache")  # as another machine, which fetches features and models again
    found, expected = (
        measure_folder(Run(config), Run(config).require("expert", 1).url)["models"]["expert-1"]
        for config in (there, here)
    )
    assert found == expected
    assert not [*(tmp_path / "cache").rglob("*.features.bin")], "no file of features is fetched as a whole"
