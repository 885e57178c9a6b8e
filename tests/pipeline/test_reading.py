"""Loading an assembled model maps its files, and experts that no token visits are never read: told by the kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints import open_artifact, write_artifact
from checkpoints.errors import CorruptArtifactError
from modularforge.config import Config, ModelConfig
from modularforge.errors import MismatchError
from modularforge.evaluation.scoring import measure
from modularforge.model import names
from modularforge.model.folder import backbone_tensors, load_model, save_tensors
from modularforge.model.hub_config import moe_config, write_json
from modularforge.model.moe import build_moe, moe_layers
from modularforge.pipeline import stage_url
from modularforge.stored_models import StoredModel, stored_model
from tests.conftest import ROOT

EXPERTS, ACTIVE = 16, 2
LARGE = ModelConfig(width=256, layers=2, heads=4, kv_heads=4, ffn_width=1024, context_length=32)
EXPERT_BYTES = LARGE.layers * 3 * LARGE.width * LARGE.ffn_width * 4
VOCABULARY = 500

MEASURE = """
import json, resource, sys
import torch
from modularforge.model.folder import load_model
from modularforge.model.moe import moe_layers
from modularforge.stored_models import stored_model

folder, how = sys.argv[1:]
tokens = torch.arange(64).reshape(2, 32)

def resident():
    mapped = anonymous = 0
    for line in open("/proc/self/smaps"):
        if line[0].islower() or line[0].isdigit():
            is_weights = line.rstrip().endswith(".safetensors")
        elif line.startswith("Rss:") and is_weights:
            mapped += int(line.split()[1]) * 1024
        elif line.startswith("Anonymous:"):
            anonymous += int(line.split()[1]) * 1024
    return mapped, anonymous

from modularforge.config import ModelConfig
from modularforge.model.moe import build_moe

small = ModelConfig(width=16, layers=1, heads=2, kv_heads=2, ffn_width=16, context_length=32)
with torch.device("meta"):  # modules that torch loads late, and threads, are there before anything is measured
    build_moe(small, 16, 3, 2)
with torch.inference_mode():
    build_moe(small, 500, 3, 2)(tokens)
before = resident()
model = stored_model(folder).load() if how == "on demand" else load_model(__import__("pathlib").Path(folder))
loaded = resident()
with torch.inference_mode():
    logits = model(tokens)
after = resident()
print(json.dumps({"mapped_loaded": loaded[0], "mapped": after[0], "anonymous": after[1] - before[1],
                  "logits": float(logits.double().sum())}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A committed model of 105 MB whose routers send every token to the experts 3 and 5."""
    folder = tmp_path_factory.mktemp("large") / "assembled"
    torch.manual_seed(0)
    model = build_moe(LARGE, VOCABULARY, EXPERTS, ACTIVE)
    with torch.no_grad():
        model.model.embed_tokens.weight.abs_()  # so that the mean of a router's input is far from zero
        for layer in moe_layers(model):
            rows_ED = layer.gate.get_parameter("weight")
            rows_ED[3], rows_ED[5] = 1.0, 0.9
    with write_artifact(str(folder), "assembled", "test") as writer:
        save_tensors(backbone_tensors(model), writer.folder / "model.safetensors")
        write_json(writer.folder / "config.json", moe_config(LARGE, VOCABULARY, EXPERTS, ACTIVE))
        writer.commit()
    return folder


def in_a_process(folder: Path, how: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), how], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("how", "slack"), [("on demand", 0.5), ("whole folder", 1.0)])
def test_only_visited_experts_are_in_memory_and_nothing_is_copied(large: Path, how: str, slack: float) -> None:
    size = (large / "model.safetensors").stat().st_size
    shared = size - EXPERTS * EXPERT_BYTES
    found = in_a_process(large, how)
    assert size > 100e6
    assert found["mapped_loaded"] < shared + EXPERT_BYTES
    # Two of sixteen experts were visited; `slack` experts are left for pages that the kernel maps around a fault.
    assert ACTIVE * EXPERT_BYTES < found["mapped"] < shared + (ACTIVE + slack) * EXPERT_BYTES
    assert found["anonymous"] < EXPERT_BYTES


def test_both_ways_of_loading_give_the_same_logits(large: Path) -> None:
    assert in_a_process(large, "on demand")["logits"] == in_a_process(large, "whole folder")["logits"]


def test_losses_and_routing_are_the_same_on_demand(finished_run: Config) -> None:
    stored = stored_model(stage_url(finished_run, "assemble"))
    assert stored.artifact is not None
    tokens = {"all": torch.randint(4, 400, (600,), generator=torch.Generator().manual_seed(1)).numpy()}
    lengths = torch.ones(512, dtype=torch.int32)
    found = [
        measure(model, tokens, lengths, 4, 500, 64)
        for model in (stored.load(), load_model(stored.artifact.local_folder()))
    ]
    assert found[0].domains == found[1].domains
    assert (found[0].routing["all"].visits_LE == found[1].routing["all"].visits_LE).all()


def damaged(large: Path, folder: Path, name: str) -> StoredModel:
    """A copy of the model with one changed byte in a tensor."""
    artifact = open_artifact(str(large))
    folder.mkdir()
    for file in (*artifact.manifest.files, "manifest.json"):
        (folder / file).write_bytes((large / file).read_bytes())
    content = bytearray((folder / "model.safetensors").read_bytes())
    length = int.from_bytes(content[:8], "little")
    start = json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    content[8 + length + start] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    return stored_model(str(folder))


def test_a_damaged_expert_is_refused_when_it_is_visited(large: Path, tmp_path: Path) -> None:
    visited, other = names.expert_ffn(1, 5, "w2"), names.expert_ffn(1, 6, "w2")
    tokens = torch.arange(32)[None]
    with torch.inference_mode():
        damaged(large, tmp_path / "other", other).load()(tokens)
        model = damaged(large, tmp_path / "visited", visited).load()
        with pytest.raises(CorruptArtifactError, match=rf"{visited} in .* must have the hash"):
            model(tokens)


def test_damage_of_the_shared_part_is_refused_at_once(large: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifactError, match=r"model\.norm\.weight in .* must have the hash"):
        damaged(large, tmp_path / "shared", names.FINAL_NORM).load()


def test_missing_experts_are_named_at_once(large: Path, tmp_path: Path) -> None:
    with write_artifact(str(tmp_path / "more"), "assembled", "test") as writer:
        (writer.folder / "model.safetensors").write_bytes((large / "model.safetensors").read_bytes())
        write_json(writer.folder / "config.json", moe_config(LARGE, VOCABULARY, EXPERTS + 1, ACTIVE))
        writer.commit()
    with pytest.raises(MismatchError, match=r"experts\.16\.w1\.weight is missing \(6 tensors differ\)"):
        stored_model(str(tmp_path / "more")).load()
