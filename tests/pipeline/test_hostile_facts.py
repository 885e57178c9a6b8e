"""Facts in manifests that somebody else wrote: every stage that reads them says what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints import UserError, open_artifact
from modularforge import edit_experts
from modularforge.assembly.assemble import check_same_backbone
from modularforge.assembly.card import model_card
from modularforge.assembly.parts import parts_of
from modularforge.config import Config
from modularforge.experts.ffn import FFN
from modularforge.facts import KINDS, fact
from modularforge.run import Run
from modularforge.stages import assemble
from tests.mutation import FUZZ_INPUTS, values
from tests.pipeline.test_edit_experts import copy_of_run
from tests.storage.test_hostile_artifacts import signed

PARTS = ("backbone", "experts/expert-0", "assembled")


def test_facts_of_an_ordinary_run_are_as_their_stages_record_them(finished_run: Config) -> None:
    seen = set()
    for name in PARTS:
        artifact = open_artifact(f"{finished_run.output_dir}/{name}")
        for known in KINDS.keys() & artifact.manifest.facts.keys():
            assert fact(artifact, known) == artifact.manifest.facts[known]
            seen.add(known)
    elsewhere = {"gguf_sha256", "frozen", "partition_tokens", "rank", "steering", "variant"}  # of files, rounds, speech
    assert seen >= KINDS.keys() - {"pretrained", "training_tokens", *elsewhere}


@pytest.mark.parametrize("part", PARTS)
def test_hostile_facts_end_in_a_sentence(part: str, finished_run: Config, tmp_path: Path) -> None:
    run = copy_of_run(finished_run, tmp_path / "run", router="ridge")
    assemble.run(Run(run))
    path = Path(run.output_dir) / part / "manifest.json"
    good: dict[str, Any] = json.loads(path.read_bytes())
    card_facts = open_artifact(f"{run.output_dir}/assembled").manifest.facts
    for number, changed in enumerate(values(good["facts"], FUZZ_INPUTS // 4)):
        try:
            path.write_bytes(signed({**good, "facts": changed}))
        except (ValueError, TypeError):  # not JSON at all
            continue
        try:
            backbone, expert, assembled = (open_artifact(f"{run.output_dir}/{name}") for name in PARTS)
            edit_experts.members_of(assembled)
            parts_of(assembled)
            check_same_backbone(FFN, backbone, [expert])
            assert model_card(run, backbone, [expert], card_facts, "A model.")
            if number % 100 == 0:
                edit_experts.remove(f"{run.output_dir}/assembled", 1, str(tmp_path / f"without-{number}"))
        except UserError:
            continue
    path.write_bytes(signed(good))
    edit_experts.members_of(open_artifact(f"{run.output_dir}/assembled"))
