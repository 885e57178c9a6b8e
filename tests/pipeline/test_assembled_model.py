"""What the assembled model owes its parts: forced routing, transformers' logits, and the bytes of a naive merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoints import open_artifact, paths, plain_folder
from checkpoints.safetensors import read_spans
from modularforge.assembly.assemble import assemble
from modularforge.assembly.plan import output_tensors, plan_merge
from modularforge.assembly.stream import execute
from modularforge.config import Config, RouterKind
from modularforge.model.folder import load_model, read_tensors
from modularforge.model.moe import restrict_routing
from modularforge.pipeline import stage_url
from modularforge.routing.solvers import router_rows
from modularforge.routing.text_evidence import texts_of
from modularforge.run import Run
from modularforge.stage_outputs import Backbone

TOLERANCE = 1e-5


def merged_in_one_file(config: Config, folder: Path) -> Path:
    """The finished run's model again, as a single weight file."""
    folder.mkdir()
    settings = config.assembly.model_copy(update={"mode": "merge"})
    experts = [Run(config).require("expert", index) for index in range(config.experts.count)]
    parts = (Run(config).require("backbone"), experts, plain_folder(folder))
    assemble(config.model_copy(update={"assembly": settings}), *parts)
    return folder


@pytest.fixture
def tokens_BT() -> torch.Tensor:
    return torch.randint(4, 500, (2, 17), generator=torch.Generator().manual_seed(0))


def test_routing_forced_to_an_expert_gives_that_experts_own_logits(
    finished_run: Config, tokens_BT: torch.Tensor
) -> None:
    backbone = Backbone(Run(finished_run).require("backbone"))
    assembled = load_model(Run(finished_run).require("assemble").local_folder())
    for index in range(finished_run.experts.count):
        own = backbone.expert(Run(finished_run).require("expert", index))
        restrict_routing(assembled, (0, index + 1))
        with torch.no_grad():
            assert (assembled(tokens_BT) - own(tokens_BT)).abs().max() < TOLERANCE


def test_routing_forced_to_the_public_expert_gives_the_backbones_logits(
    finished_run: Config, tokens_BT: torch.Tensor
) -> None:
    backbone = load_model(Run(finished_run).require("backbone").local_folder())
    assembled = load_model(Run(finished_run).require("assemble").local_folder())
    restrict_routing(assembled, (0,))
    with torch.no_grad():
        assert (assembled(tokens_BT) - backbone(tokens_BT)).abs().max() < TOLERANCE


def test_experts_differ_from_the_backbone_and_from_each_other(finished_run: Config, tokens_BT: torch.Tensor) -> None:
    backbone = Backbone(Run(finished_run).require("backbone"))
    with torch.no_grad():
        logits = [backbone.model()(tokens_BT)]
        logits += [backbone.expert(Run(finished_run).require("expert", index))(tokens_BT) for index in range(3)]
    for first in range(4):
        for second in range(first):
            assert (logits[first] - logits[second]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("stage", ["backbone", "assemble", "calibrate"])
def test_plain_transformers_gives_the_same_logits(stage: str, finished_run: Config, tokens_BT: torch.Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    folder = open_artifact(stage_url(finished_run, stage)).local_folder()
    if not (folder / "config.json").exists():
        pytest.skip("the calibration was not kept")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        difference = (theirs(tokens_BT).logits - load_model(folder)(tokens_BT)).abs().max()
    assert difference < TOLERANCE
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The law of 1901 – « été ».")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 2
    assert ids[-1] != tokenizer.eos_token_id == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The law of 1901 – « été »."


def test_the_assembled_file_equals_a_naive_merge_byte_for_byte(finished_run: Config, tmp_path) -> None:
    folder = merged_in_one_file(finished_run, tmp_path / "merged")
    naive: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(paths.local_path(stage_url(finished_run, "backbone")) / "model.safetensors").items():
        parts = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        if ".mlp." in name:
            prefix, _, part = name.removesuffix(".weight").partition(".mlp.")
            name = f"{prefix}.block_sparse_moe.experts.0.{parts[part]}.weight"
        naive[name] = tensor
    rows: dict[str, list[torch.Tensor]] = {}
    for index in range(3):
        expert = Run(finished_run).require("expert", index)
        naive.update(load_file(expert.local_file("expert.safetensors")))
        for name, row in load_file(expert.local_file("router.safetensors")).items():
            rows.setdefault(name, [torch.zeros_like(row)]).append(row)
    naive.update({name: torch.cat(parts) for name, parts in rows.items()})
    save_file(naive, tmp_path / "naive.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "naive.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_shards_hold_the_same_tensors_and_an_index(finished_run: Config, tmp_path) -> None:
    whole = merged_in_one_file(finished_run, tmp_path / "merged") / "model.safetensors"
    plan = plan_merge(output_tensors(read_spans(str(whole))), max_shard_bytes=50_000)
    execute(plan, plain_folder(tmp_path))
    assert len(plan.files) > 2
    assert plan.index is not None
    merged = {}
    for file in plan.files:
        assert (tmp_path / file.name).stat().st_size == file.size
        merged.update(load_file(tmp_path / file.name))
    original = load_file(whole)
    assert merged.keys() == original.keys() == plan.index["weight_map"].keys()
    assert all(torch.equal(merged[name], original[name]) for name in original)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(plan.index))
    (tmp_path / "config.json").write_bytes((whole.parent / "config.json").read_bytes())
    tokens = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(tokens), load_model(whole.parent)(tokens))


@pytest.mark.parametrize("router", get_args(RouterKind))
def test_the_solved_router_is_what_the_assembled_file_holds(router: str, finished_run: Config, tmp_path: Path) -> None:
    settings = finished_run.assembly.model_copy(update={"router": router})
    config = finished_run.model_copy(update={"assembly": settings})
    experts = [Run(finished_run).require("expert", index) for index in range(3)]
    assemble(config, Run(finished_run).require("backbone"), experts, plain_folder(tmp_path))
    written = read_tensors(tmp_path)
    texts = texts_of(Run(finished_run).require("backbone"), experts)
    for name, rows in router_rows(config, experts, finished_run.model, texts).items():
        np.testing.assert_array_equal(written[name].numpy(), rows)


def test_router_choices_differ_and_have_a_row_per_expert(finished_run: Config) -> None:
    experts = [Run(finished_run).require("expert", index) for index in range(3)]
    found = {}
    for router in ("trained", "means", "ridge", "random", "uniform"):
        assembly = finished_run.assembly.model_copy(update={"router": router})
        config = finished_run.model_copy(update={"assembly": assembly})
        rows = router_rows(config, experts, finished_run.model)
        found[router] = rows["model.layers.1.block_sparse_moe.gate.weight"]
        assert found[router].shape == (4, finished_run.model.width)
        assert np.isfinite(found[router]).all()
    assert not found["uniform"].any()
    assert not np.allclose(found["trained"], found["ridge"])


def test_weight_files_are_readable_by_safetensors_with_metadata(finished_run: Config) -> None:
    assembled = Run(finished_run).require("assemble")
    files = [name for name in assembled.manifest.files if name.endswith(".safetensors")]
    assert len(files) == 2 + 4
    for name in files:
        with safe_open(assembled.local_file(name), framework="np") as file:
            assert file.metadata() == {"format": "pt"}
