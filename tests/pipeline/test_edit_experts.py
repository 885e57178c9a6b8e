"""Models as parts: links, changed membership, the evidence router, and what does not belong together."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import (
    Artifact,
    ArtifactExistsError,
    CorruptArtifactError,
    open_artifact,
    paths,
    plain_folder,
    write_artifact,
)
from checkpoints.urls import MANIFEST_NAME
from modularforge import edit_experts
from modularforge.assembly.assemble import assemble
from modularforge.config import Config
from modularforge.errors import DataError, MismatchError
from modularforge.experts.ffn import EXPERT_NAME
from modularforge.model.backbone import Decoder
from modularforge.model.folder import load_model, read_tensors
from modularforge.model.hub_config import TABLES_NAME, model_config_of
from modularforge.model.moe import moe_layers, observe_routing, restrict_routing
from modularforge.observe.report import write_report
from modularforge.observe.run import read_run
from modularforge.pipeline import stage_url
from modularforge.routing import evidence
from modularforge.routing.kernel import angles_of, bell
from modularforge.routing.statistics import ROUTER_NAME, STATISTICS_NAME, load_statistics
from modularforge.routing.text_evidence import TIE, texts_of
from modularforge.run import Run
from modularforge.stage_outputs import Backbone
from modularforge.stages import assemble as assemble_stage
from modularforge.stages import calibrate as calibrate_stage
from tests.conftest import run_command


def parts_of(run: Config) -> tuple[Artifact, list[Artifact]]:
    return Run(run).require("backbone"), [Run(run).require("expert", index) for index in range(run.experts.count)]


def with_assembly(run: Config, **changes: object) -> Config:
    return run.model_copy(update={"assembly": run.assembly.model_copy(update=changes)})


def copy_of_run(run: Config, folder: Path, **changes: object) -> Config:
    """Backbone, experts and data of the finished run in a new run folder, in which the model can be changed."""
    for name in ("backbone", "experts", "data"):
        shutil.copytree(paths.local_path(run.output_dir) / name, folder / name)
    return with_assembly(run, **changes).model_copy(update={"output_dir": str(folder)})


def test_a_report_says_that_the_evaluation_is_of_the_old_model(finished_run: Config, tmp_path: Path) -> None:
    shutil.copytree(paths.local_path(finished_run.output_dir), tmp_path / "run")
    assert not any("evaluation" in problem for problem in read_run(str(tmp_path / "run")).problems)
    edit_experts.remove(str(tmp_path / "run" / "assembled"), 1)
    run = read_run(str(tmp_path / "run"))
    assert any("evaluation is of an assembled model that has been replaced" in problem for problem in run.problems)
    assert run.config["experts"]["count"] == 3
    write_report(str(tmp_path / "run"))


def weights(url: str) -> dict[str, bytes]:
    """Bytes of all files but the manifest."""
    return {path.name: path.read_bytes() for path in Path(url).iterdir() if path.name != MANIFEST_NAME}


@pytest.mark.parametrize("router", ["ridge", "evidence", "trained"])
@pytest.mark.parametrize("mode", ["auto", "merge"])
def test_a_removed_expert_leaves_the_model_that_never_had_it(
    router: str, mode: str, finished_run: Config, tmp_path: Path
) -> None:
    run = copy_of_run(finished_run, tmp_path / "run", router=router, mode=mode)
    assemble_stage.run(Run(run))
    url = stage_url(run, "assemble")
    backbone, experts = parts_of(run)
    (tmp_path / "without").mkdir()
    assemble(run, backbone, [experts[0], experts[2]], plain_folder(tmp_path / "without"))
    changed = edit_experts.remove(url, 1)
    assert weights(url) == weights(str(tmp_path / "without"))
    assert [member.index for member in edit_experts.members_of(changed)] == [0, 2]
    edit_experts.add(url, stage_url(run, "expert", 1))
    (tmp_path / "whole").mkdir()
    assemble(run, backbone, experts, plain_folder(tmp_path / "whole"))
    assert weights(url) == weights(str(tmp_path / "whole"))


def test_only_what_changes_is_written(finished_run: Config, tmp_path: Path) -> None:
    """The experts in front of a removed one keep their files, those behind it move to other slots."""
    run = copy_of_run(finished_run, tmp_path / "run", router="evidence")
    assemble_stage.run(Run(run))
    url = stage_url(run, "assemble")
    before = {path.name: path.stat().st_ino for path in Path(url).iterdir()}
    changed = edit_experts.remove(url, 2)
    after = {path.name: path.stat().st_ino for path in Path(url).iterdir()}
    same = {name for name in after if name.startswith("expert-")}
    assert same == {"expert-000.safetensors", "expert-001.safetensors", "expert-002.safetensors"}
    assert all(before[name] == after[name] for name in same)
    facts = changed.manifest.facts
    assert facts["bytes_linked"] == sum(changed.manifest.files[name].size for name in same)
    changed.verify()


def test_parts_that_are_written_are_split_above_the_limit_and_linked_ones_stay_whole(
    finished_run: Config, tmp_path: Path
) -> None:
    limit = 60_000
    run = copy_of_run(finished_run, tmp_path / "run", router="ridge", max_shard_bytes=limit)
    assemble_stage.run(Run(run))
    calibrate_stage.run(Run(run))
    for stage in ("assemble", "calibrate"):
        artifact = Run(run).require(stage)
        files = {name: entry for name, entry in artifact.manifest.files.items() if name.endswith(".safetensors")}
        assert {f"expert-{slot:03d}.safetensors" for slot in (1, 2, 3)} <= set(files), "larger, but linked"
        written = set(files) - {f"expert-{slot:03d}.safetensors" for slot in (1, 2, 3)}
        assert {"backbone-00001-of-00002.safetensors", "expert-000-00001-of-00002.safetensors"} <= written
        shards = {name: load_file(artifact.local_file(name)) for name in written}
        assert all(len(one) == 1 or sum(t.nbytes for t in one.values()) <= limit for one in shards.values())
        assert set(json.loads(artifact.read_bytes("model.safetensors.index.json"))["weight_map"].values()) == set(files)
    whole, split = (read_tensors(Path(stage_url(one, "assemble"))) for one in (finished_run, run))
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[name], split[name]) for name in whole if "gate.weight" not in name)
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoModelForCausalLM.from_pretrained(stage_url(run, "assemble")) is not None
    (tmp_path / "two").mkdir()
    old, (backbone, experts) = Run(run).require("assemble"), parts_of(run)
    assemble(run, backbone, [experts[0], experts[2]], plain_folder(tmp_path / "two"), old)
    for name in ("backbone-00001-of-00002.safetensors", "backbone-00002-of-00002.safetensors"):
        assert os.path.samefile(tmp_path / "two" / name, old.local_file(name)), "shards are taken over too"


def test_linked_experts_are_the_experts_files(finished_run: Config) -> None:
    assembled = Run(finished_run).require("assemble")
    for index in range(3):
        expert = Run(finished_run).require("expert", index)
        linked = assembled.local_file(f"expert-{index + 1:03d}.safetensors")
        assert os.path.samefile(linked, expert.local_file(EXPERT_NAME))
        assert assembled.manifest.files[linked.name] == expert.manifest.files[EXPERT_NAME]


def test_a_model_keeps_as_many_experts_as_each_token_visits(finished_run: Config, tmp_path: Path) -> None:
    run = copy_of_run(finished_run, tmp_path / "run", experts_per_token=3)
    assemble_stage.run(Run(run))
    url = stage_url(run, "assemble")
    edit_experts.remove(url, 1)
    with pytest.raises(MismatchError, match=r"must keep 3 experts, .*, but without 2 it has 2; add another one first"):
        edit_experts.remove(url, 2)
    assert [member.index for member in edit_experts.members_of(open_artifact(url))] == [0, 2]


def test_a_plain_experts_file_is_linked_too(tmp_path: Path, finished_run: Config) -> None:
    from tests.conftest import run_every_stage, tiny_config

    config = tiny_config(
        tmp_path / "plain", experts={"anchored": False, "count": 3}, assembly={"router": "ridge", "mode": "link"}
    )
    run_every_stage(config)
    assembled = Run(config).require("assemble")
    expert = Run(config).require("expert", 1)
    assert os.path.samefile(assembled.local_file("expert-001.safetensors"), expert.local_file(EXPERT_NAME))


def test_link_mode_refuses_another_disk_and_auto_copies(
    finished_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, experts = parts_of(finished_run)
    monkeypatch.setattr("checkpoints.folder.FolderStore.copy_inside", lambda *_: False)
    for name in ("link", "auto"):
        (tmp_path / name).mkdir()
    with pytest.raises(MismatchError, match="on one file system that has hard links"):
        assemble(with_assembly(finished_run, mode="link"), backbone, experts, plain_folder(tmp_path / "link"))
    assemble(with_assembly(finished_run, mode="auto"), backbone, experts, plain_folder(tmp_path / "auto"))
    assert weights(str(tmp_path / "auto")) == weights(stage_url(finished_run, "assemble"))


def test_a_hard_link_is_never_written_through(finished_run: Config, tmp_path: Path) -> None:
    """An interrupted link, then another plan at the same place: the expert's own file must stay as it is."""
    expert = Run(finished_run).require("expert", 0)
    before = expert.read_bytes(EXPERT_NAME)
    writer = plain_folder(tmp_path)
    entry = expert.manifest.files[EXPERT_NAME]
    assert writer.link("x.safetensors", expert.file_url(EXPERT_NAME), entry)
    writer.write_known("x.safetensors", [b"other bytes"], 11, lambda: entry)
    assert (tmp_path / "x.safetensors").read_bytes() == b"other bytes"
    assert expert.read_bytes(EXPERT_NAME) == before


def test_the_rows_of_the_evidence_router_read_a_mean_over_the_text_in_which_recent_tokens_weigh_more(
    finished_run: Config, tmp_path: Path
) -> None:
    run = with_assembly(finished_run, router="evidence", router_temperature=0.5, token_pairs=0)
    backbone, experts = parts_of(run)
    assemble(run, backbone, experts, plain_folder(tmp_path))
    model, shape = load_model(tmp_path), model_config_of(backbone.read_json("config.json"))
    assert model.text_router is None
    tokens_BT = torch.randint(4, 500, (2, 33), generator=torch.Generator().manual_seed(1))
    observe_routing(model)
    streams: list[torch.Tensor] = []
    norm = model.blocks[1].post_attention_layernorm
    norm.register_forward_pre_hook(lambda _m, arguments: streams.append(arguments[0]))
    with torch.no_grad():
        model(tokens_BT)
    back_TT = (torch.arange(33)[:, None] - torch.arange(33)).clamp(min=0)
    pairs, angles = bell(angles_of(shape), shape.positions), angles_of(shape)
    assert pairs
    recent_TT = torch.stack([a * ((float(angles[pair]) * back_TT).cos() - 1) for pair, a in pairs.items()]).sum(0).exp()
    means_TT = [weight.tril() / weight.tril().sum(dim=1, keepdim=True) for weight in (recent_TT, torch.ones(33, 33))]
    weight_TT = (1 - evidence.LONG_SHARE) * means_TT[0] + evidence.LONG_SHARE * means_TT[1]
    evidence_VE = torch.from_numpy(texts_of(backbone, experts).token_VE).float()
    mean_BTE = weight_TT @ evidence_VE[tokens_BT]
    rms_BT1 = streams[0][..., : shape.width].square().mean(dim=-1, keepdim=True).sqrt()
    typical = np.mean([load_statistics(item.local_file(STATISTICS_NAME)).inverse_rms_L[1] for item in experts])
    logits = moe_layers(model)[1].observed_logits
    assert logits is not None
    found = logits.view(2, 33, 4) * 0.5 * rms_BT1 * typical
    assert (found[..., :1] - TIE).abs().max() < 0.1 * TIE  # the public expert, before all ties
    # A single token's evidence has 1/64 of the weight of the mean, over the stream's rms; ties are less than that.
    assert (found[..., 1:] - mean_BTE).abs().max() < 0.1 * mean_BTE.abs().max()
    assert torch.corrcoef(torch.stack([found[..., 1:].flatten(), mean_BTE.flatten()]))[0, 1] > 0.995


def observed_logits(model: Decoder) -> Iterator[torch.Tensor]:
    """Router logits of the last forward pass, layer by layer."""
    for layer in moe_layers(model):
        assert layer.observed_logits is not None
        yield layer.observed_logits


def test_the_tables_outrank_the_rows_here_and_are_no_weights_elsewhere(finished_run: Config, tmp_path: Path) -> None:
    run = with_assembly(finished_run, router="evidence")
    backbone, experts = parts_of(run)
    facts = assemble(run, backbone, experts, plain_folder(tmp_path))
    model, tokens_BT = load_model(tmp_path), torch.randint(4, 500, (2, 33))
    assert model.text_router is not None
    assert facts["token_pairs"] == len(model.text_router.get_buffer("keys_P")) > 1000
    assert not [name for name in model.state_dict() if "text_router" in name]
    observe_routing(model)
    with torch.no_grad():
        model(tokens_BT)
    routed = model.text_router(tokens_BT)[0].flatten(0, 1)
    assert all(torch.equal(logits, routed) for logits in observed_logits(model))
    model.text_router = None
    with torch.no_grad():
        model(tokens_BT)
    assert not any(torch.equal(logits, routed) for logits in observed_logits(model))
    (tmp_path / TABLES_NAME).write_bytes(b"")
    with pytest.raises(DataError, match="delete it to route by the model's own rows"):
        load_model(tmp_path)


def test_experts_of_older_versions_without_pairs_are_routed_by_tokens(finished_run: Config, tmp_path: Path) -> None:
    run = with_assembly(finished_run, router="evidence")
    backbone, experts = parts_of(run)
    older = []
    for number, expert in enumerate(experts):
        with write_artifact(str(tmp_path / str(number)), "expert", expert.manifest.fingerprint) as writer:
            for name in (EXPERT_NAME, ROUTER_NAME, STATISTICS_NAME):
                shutil.copyfile(expert.local_file(name), writer.folder / name)
            older.append(writer.commit(expert.manifest.facts))
    (tmp_path / "model").mkdir()
    assert assemble(run, backbone, older, plain_folder(tmp_path / "model"))["token_pairs"] == 0
    assert load_model(tmp_path / "model").text_router is None


def test_widths_and_heads_are_what_servers_want(finished_run: Config, tmp_path: Path) -> None:
    run = with_assembly(finished_run, router="evidence", width_multiple=64, head_multiple=4, token_pairs=0)
    backbone, experts = parts_of(run)
    assemble(run, backbone, experts, plain_folder(tmp_path))
    model, old = load_model(tmp_path), model_config_of(backbone.read_json("config.json"))
    assert model.config.width % 64 == 0
    assert model.config.kv_heads % 4 == 0
    assert model.config.heads // model.config.kv_heads == old.heads // old.kv_heads
    tokens_BT = torch.randint(4, 500, (2, 17))
    own = Backbone(backbone).model()
    restrict_routing(model, (0,))
    with torch.no_grad():
        assert (model(tokens_BT) - own(tokens_BT)).abs().max() < 2e-4  # the public expert alone is the backbone


def test_a_widened_model_forced_to_an_expert_is_that_expert(finished_run: Config, tmp_path: Path) -> None:
    run = with_assembly(finished_run, router="evidence", public_expert=False)
    backbone, experts = parts_of(run)
    assemble(run, backbone, experts, plain_folder(tmp_path))
    model = load_model(tmp_path)
    tokens_BT = torch.randint(4, 500, (2, 17), generator=torch.Generator().manual_seed(0))
    for index, expert in enumerate(experts):
        plain = replace(expert, manifest=replace(expert.manifest, facts={"anchored": False}))
        own = Backbone(backbone).expert(plain)
        restrict_routing(model, (index,))
        with torch.no_grad():
            assert (model(tokens_BT) - own(tokens_BT)).abs().max() < 2e-4  # the channels move the norms a little


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_transformers_computes_the_same_with_a_widened_model(dtype: str, finished_run: Config, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run = with_assembly(finished_run, router="evidence", dtype=dtype)
    assemble(run, *parts_of(run), plain_folder(tmp_path))
    kinds = {tensor.dtype for tensor in read_tensors(tmp_path).values()}
    assert kinds == {torch.float32 if dtype == "fp32" else torch.bfloat16}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == next(iter(kinds))
    ours, theirs = load_model(tmp_path).float(), theirs.float().eval()
    ours.text_router = None  # transformers routes by the rows
    tokens_BT = torch.randint(4, 500, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(tokens_BT).logits - ours(tokens_BT)).abs().max() < 1e-4


def damaged(expert: Artifact, folder: Path, change: object) -> Artifact:
    """The expert again, committed with changed tensors."""
    tensors = load_file(expert.local_file(EXPERT_NAME))
    change(tensors)  # type: ignore[operator]
    with write_artifact(str(folder), "expert", "changed") as writer:
        save_file(tensors, writer.folder / EXPERT_NAME, metadata={"format": "pt"})
        for name in ("router.safetensors", STATISTICS_NAME):
            shutil.copyfile(expert.local_file(name), writer.folder / name)
        return writer.commit(expert.manifest.facts)


def first_key(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(first_key(t)), r"slot 1, layer 0, w1 must be in its weight file, but is missing"),
        (lambda t: t.update({first_key(t): torch.zeros(3, 4)}), r"but is F32 \(3, 4\)"),
        (lambda t: t.update({first_key(t): t[first_key(t)].half()}), r"but is F16 "),
    ],
)
def test_experts_that_do_not_fit_are_refused_by_name(
    change: object, message: str, finished_run: Config, tmp_path: Path
) -> None:
    backbone, experts = parts_of(finished_run)
    wrong = damaged(experts[0], tmp_path / "expert", change)
    (tmp_path / "out").mkdir()
    with pytest.raises(MismatchError, match=message):
        assemble(finished_run, backbone, [wrong, *experts[1:]], plain_folder(tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_the_same_expert_twice_and_one_of_another_backbone_are_refused(finished_run: Config, tmp_path: Path) -> None:
    backbone, experts = parts_of(finished_run)
    with pytest.raises(MismatchError, match="each slot must hold another expert"):
        assemble(finished_run, backbone, [experts[0], experts[0]], plain_folder(tmp_path))
    facts = json.loads(json.dumps(experts[1].manifest.facts))
    facts["shared_tensors"][min(facts["shared_tensors"])] = "0" * 64
    stranger = replace(experts[1], manifest=replace(experts[1].manifest, facts=facts))
    with pytest.raises(MismatchError, match="must have been trained on the backbone"):
        assemble(finished_run, backbone, [experts[0], stranger], plain_folder(tmp_path))


class Killed(BaseException):
    """Stands for a process that ends here."""


def test_what_an_interrupted_assembly_wrote_of_an_older_expert_is_not_taken_over(
    finished_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert that is trained again has the same fingerprint, and on another machine perhaps other bytes."""
    run = copy_of_run(finished_run, tmp_path / "run", mode="merge", max_shard_bytes=100_000)
    with monkeypatch.context() as patch:
        patch.setattr("modularforge.stages.assemble.commit", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            assemble_stage.run(Run(run))
    assert list((tmp_path / "run").glob(".assembled.attempt-*/model-*")), "all weight files were finished"
    old = Run(run).require("expert", 1)
    tensors = load_file(old.local_file(EXPERT_NAME))
    manifest = old.manifest
    with write_artifact(
        str(tmp_path / "again"), "expert", manifest.fingerprint, manifest.settings, manifest.inputs
    ) as writer:
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, writer.folder / EXPERT_NAME)
        for name in ("router.safetensors", STATISTICS_NAME):
            shutil.copyfile(old.local_file(name), writer.folder / name)
        writer.commit(manifest.facts)
    shutil.rmtree(paths.local_path(old.url))
    (tmp_path / "again").rename(paths.local_path(old.url))
    assemble_stage.run(Run(run))
    written = read_tensors(paths.local_path(stage_url(run, "assemble")))
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor + 1), name


def test_a_truncated_expert_is_refused_before_anything_is_written(finished_run: Config, tmp_path: Path) -> None:
    run = copy_of_run(finished_run, tmp_path / "run")
    victim = tmp_path / "run/experts/expert-1" / EXPERT_NAME
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(CorruptArtifactError, match=r"expert-1/expert.safetensors must have .* bytes, .*truncated"):
        assemble_stage.run(Run(run))
    assert not Path(stage_url(run, "assemble")).exists()


def test_the_command_lists_and_changes_members_and_says_what_is_wrong(finished_run: Config, tmp_path: Path) -> None:
    run = copy_of_run(finished_run, tmp_path / "run", router="ridge")
    assemble_stage.run(Run(run))
    url = stage_url(run, "assemble")
    listed = json.loads(run_command("modularforge", "experts", "list", url, "--json").stdout)
    assert [(entry["slot"], entry["index"]) for entry in listed] == [(1, 0), (2, 1), (3, 2)]
    output = str(tmp_path / "two")
    run_command("modularforge", "experts", "remove", url, "1", "--output", output)
    assert [member.index for member in edit_experts.members_of(open_artifact(output))] == [0, 2]
    assert len(edit_experts.members_of(open_artifact(url))) == 3
    wrong = run_command("modularforge", "experts", "remove", url, "7", check=False)
    assert wrong.returncode == 2
    assert "must have an expert 7, but has 0, 1, 2" in wrong.stderr
    wrong = run_command("modularforge", "experts", "add", url, stage_url(run, "backbone"), check=False)
    assert "must be an expert, but is of kind backbone" in wrong.stderr
    wrong = run_command("modularforge", "experts", "add", url, str(tmp_path), check=False)
    assert "must be a trained expert (with manifest.json) or, for a model of adapters, PEFT's folder" in wrong.stderr
    twice = run_command("modularforge", "experts", "add", url, stage_url(run, "expert", 0), check=False)
    assert "each slot must hold another expert" in twice.stderr
    assert not list((tmp_path / "run").glob(".*")), "what was refused leaves nothing behind"


def test_a_chosen_membership_is_kept_when_the_pipeline_runs_again(finished_run: Config, tmp_path: Path) -> None:
    run = copy_of_run(finished_run, tmp_path / "run", router="ridge")
    assemble_stage.run(Run(run))
    edit_experts.remove(stage_url(run, "assemble"), 0)
    assemble_stage.run(Run(run))
    assert [member.index for member in edit_experts.members_of(Run(run).require("assemble"))] == [1, 2]


def test_a_replaced_expert_may_come_from_another_run(finished_run: Config, tmp_path: Path) -> None:
    run = copy_of_run(finished_run, tmp_path / "run", router="ridge")
    assemble_stage.run(Run(run))
    newer = damaged(Run(run).require("expert", 1), tmp_path / "newer", lambda t: t[first_key(t)].add_(1))
    changed = edit_experts.replace(stage_url(run, "assemble"), 1, newer.url, str(tmp_path / "new-model"))
    assert changed.manifest.files["expert-002.safetensors"] == newer.manifest.files[EXPERT_NAME]
    old = Run(run).require("assemble").manifest.files
    assert changed.manifest.files["expert-001.safetensors"] == old["expert-001.safetensors"]
    with pytest.raises((MismatchError, ArtifactExistsError)):
        edit_experts.replace(stage_url(run, "assemble"), 2, newer.url, str(tmp_path / "new-model"))


def test_of_experts_with_the_same_index_one_is_named_by_its_place(finished_run: Config, tmp_path: Path) -> None:
    run = copy_of_run(finished_run, tmp_path / "run", router="ridge")
    assemble_stage.run(Run(run))
    url = stage_url(run, "assemble")
    newer = damaged(Run(run).require("expert", 1), tmp_path / "newer", lambda t: t[first_key(t)].add_(1))
    edit_experts.add(url, newer.url)
    with pytest.raises(MismatchError, match=r"1 must name one expert .*, but names .*expert-1, .*newer; write one"):
        edit_experts.remove(url, 1)
    changed = edit_experts.remove(url, stage_url(run, "expert", 1))
    assert [member.url for member in edit_experts.members_of(changed) if member.index == 1] == [newer.url]


def test_info_counts_the_widened_model_exactly(finished_run: Config, tmp_path: Path) -> None:
    from modularforge.info import describe

    run = with_assembly(finished_run, router="evidence")
    assemble(run, *parts_of(run), plain_folder(tmp_path))
    model = load_model(tmp_path)
    vocab_size = model.vocab_size
    parameters = sum(weight.numel() for weight in model.parameters())
    sized = run.model_copy(update={"data": run.data.model_copy(update={"vocab_size": vocab_size})})
    assert f"assembled:  {parameters:,} parameters" in describe(sized)
