"""Rounds on an object store: merges read and write there, and experts go on from there, to the same bytes as here."""

from __future__ import annotations

from pathlib import Path

from checkpoints import open_artifact
from checkpoints.copying import copy_artifact
from modularforge.config import Config
from modularforge.run import Run
from tests.pipeline.test_rounds import in_rounds


def test_a_merge_and_the_round_after_it_have_the_same_bytes_as_here(
    s3: str, finished_run: Config, tmp_path: Path
) -> None:
    here = in_rounds(finished_run, tmp_path, experts={"outer": {"rate": 0.7, "momentum": 0.9}})
    for index in range(3):
        Run(here).make("round_1", index)
    there = here.model_copy(update={"output_dir": s3})
    for place in ("backbone", *(f"rounds/round_1-{index}" for index in range(3))):
        copy_artifact(open_artifact(f"{here.output_dir}/{place}"), f"{s3}/{place}", lambda _: None)
    found = []
    for config in (here, there):
        Run(config).make("merge_1")
        Run(config).make("expert", 1)
        found.append([Run(config).require(stage, k).manifest.files for stage, k in (("merge_1", None), ("expert", 1))])
    assert found[0] == found[1]
    assert "momentum.safetensors" in found[1][0]
    open_artifact(f"{s3}/rounds/merge_1").verify()
