"""Models made of LoRA experts in three forms: the same numbers, edited, routed, measured, and taken in from PEFT."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from checkpoints import open_artifact, paths
from modularforge import edit_experts
from modularforge.cli import app
from modularforge.config import Config
from modularforge.config_files import to_yaml
from modularforge.errors import ConfigError, DataError, MismatchError
from modularforge.evaluation.baselines import build_soup
from modularforge.evaluation.extras import read_texts
from modularforge.evaluation.generation import Sampling, continue_text, load_for_generation
from modularforge.evaluation.routes import routes_of, slot_names
from modularforge.info import describe
from modularforge.model import names
from modularforge.model.folder import fill, load_model, read_tensors
from modularforge.model.hub_config import TABLES_NAME
from modularforge.model.moe import restrict_routing
from modularforge.model.text_router import DECIDED_WITHIN
from modularforge.observe.report import report_runs
from modularforge.observe.routes import show_routes
from modularforge.pipeline import stage_url
from modularforge.run import Run
from modularforge.stored_models import stored_model
from modularforge.study.runs import Runs
from modularforge.study.study import run_study
from modularforge.study.study_file import load_study
from modularforge.taking import take_in
from tests.conftest import run_command, tiny_config
from tests.lora_runs import LORA, TOKENS_BT, WEIGHTS, assembled, logits, lora_config, made


@pytest.mark.parametrize("active", [1, 2, 4])
@pytest.mark.parametrize("mode", ["auto", "merge"])
def test_folded_experts_are_the_same_model_as_adapters_of_feed_forward_blocks(
    active: int, mode: str, finished_run: Config, tmp_path: Path
) -> None:
    settings = {"experts_per_token": active, "mode": mode}
    folded, beside = (
        assembled(finished_run, tmp_path / form, form, "mlp", **settings) for form in ("fold", "adapters")
    )
    # Folded, the router's channels ride in the residual stream, and shift the last digits of its norms.
    assert (logits(folded) - logits(beside)).abs().max() < 1e-4
    plain = Run(folded).backbone.model()(TOKENS_BT)
    assert not torch.allclose(logits(folded), plain, atol=1e-3)
    values = Run(folded).require("assemble").read_json("config.json")
    assert values["model_type"] == "mixtral"
    assert values["num_local_experts"] == folded.experts.count + 1


def test_folded_weights_are_those_of_the_backbone_and_the_product(finished_run: Config, tmp_path: Path) -> None:
    config = assembled(finished_run, tmp_path, "fold", ["up_proj", "down_proj"])
    run = Run(config)
    found, dense = read_tensors(run.require("assemble").local_folder()), run.backbone.tensors
    adapter = load_file(run.require("expert", 1).local_file(WEIGHTS))
    for layer in range(config.model.layers):
        for part, matrix in (("w3", "up_proj"), ("w2", "down_proj"), ("w1", "gate_proj")):
            wanted = dense[names.dense_ffn(layer, part)]
            stem = f"base_model.model.model.layers.{layer}.mlp.{matrix}"
            if matrix != "gate_proj":
                wanted = wanted + 16.0 * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            rows, columns = wanted.shape
            assert torch.allclose(found[names.expert_ffn(layer, 2, part)][:rows, :columns], wanted, atol=1e-6)


@pytest.mark.parametrize("targets", ["attention", "mlp", "both"])
def test_adapters_beside_a_backbone_are_linked_and_load_alone_in_peft(
    targets: str, finished_run: Config, tmp_path: Path
) -> None:
    config = assembled(finished_run, tmp_path, "adapters", targets, mode="link", experts_per_token=1)
    run = Run(config)
    artifact = run.require("assemble")
    folder = artifact.local_folder()
    same = (folder / "model.safetensors").samefile(run.require("backbone").local_file("model.safetensors"))
    assert same, "not a byte of the backbone is written"
    assert artifact.manifest.facts["bytes_written"] == 0
    base = AutoModelForCausalLM.from_pretrained(folder)
    theirs = PeftModel.from_pretrained(base, folder / "adapters" / "expert-001").eval()
    model = load_model(folder)
    restrict_routing(model, [2])  # behind the backbone alone, which is slot 0
    with torch.no_grad():
        assert torch.allclose(model(TOKENS_BT), theirs(TOKENS_BT).logits, atol=2e-5)
        restrict_routing(model, [0])
        assert torch.allclose(model(TOKENS_BT), run.backbone.model()(TOKENS_BT), atol=1e-6)
        restrict_routing(model, None)
        assert not torch.allclose(model(TOKENS_BT), run.backbone.model()(TOKENS_BT), atol=1e-4)
    loose = tmp_path / "copied"
    shutil.copytree(folder, loose)
    (loose / TABLES_NAME).unlink()
    with pytest.raises(DataError, match=r"must say how texts choose among the adapters, but is missing"):
        load_model(loose)


def test_the_average_is_one_adapter_that_adds_the_mean_of_the_products(finished_run: Config, tmp_path: Path) -> None:
    config = assembled(finished_run, tmp_path, "average", "both")
    run, tensors = Run(config), dict(Run(config).backbone.tensors)
    for index in range(config.experts.count):
        adapter = load_file(run.require("expert", index).local_file(WEIGHTS))
        for name in [name for name in adapter if name.endswith("lora_A.weight")]:
            matrix = name.removeprefix("base_model.model.").replace("lora_A.", "")
            b = adapter[name.replace("lora_A", "lora_B")]
            tensors[matrix] = tensors[matrix] + 16.0 * b @ adapter[name] / config.experts.count
    mean = fill(run.backbone.model(), tensors)
    base = AutoModelForCausalLM.from_pretrained(run.require("assemble").local_folder())
    theirs = PeftModel.from_pretrained(base, run.require("assemble").local_folder() / "adapters" / "average").eval()
    with torch.no_grad():
        expected = mean(TOKENS_BT)
        assert torch.allclose(logits(config), expected, atol=2e-5)
        assert torch.allclose(theirs(TOKENS_BT).logits, expected, atol=2e-5)
        soup = build_soup(config, run.backbone, run.require_each("expert"))
        assert torch.allclose(soup(TOKENS_BT), expected, atol=2e-5)


@pytest.mark.parametrize(("form", "targets"), [("adapters", "both"), ("fold", "mlp"), ("average", "attention")])
def test_every_form_calibrates_and_is_evaluated_generated_from_and_reported(
    form: str, targets: str, finished_run: Config, tmp_path: Path
) -> None:
    config = assembled(finished_run, tmp_path, form, targets)
    run = Run(config)
    run.make("calibrate")
    results = run.make("evaluate")
    models = results["models"]
    assert set(models) >= {"backbone", "expert-0", "oracle", "soup", "assembled"}
    losses = {name: row["mean_loss"] for name, row in models.items()}
    assert losses["assembled"] < losses["backbone"]
    assert abs(losses["soup"] - losses["assembled"]) < 1e-5 if form == "average" else True
    facts = run.require("assemble").manifest.facts
    assert models["assembled"]["parameters"] == facts["parameters"]
    assert models["assembled"]["active_parameters"] == facts["active_parameters"]
    # A small corpus fills less of the vocabulary than was wished, so the page is of the vocabulary that it has.
    size = config.data.model_copy(update={"vocab_size": run.corpus.vocab_size})
    said = describe(config.model_copy(update={"data": size}))
    assert f"{facts['parameters']:,} parameters, {facts['active_parameters']:,} active" in said
    assert ("assembled" in results["routing"]) == (form != "average")
    loaded = load_for_generation(stage_url(config, "assemble"))
    assert continue_text(loaded, "The", 5, Sampling(0.0))
    assert report_runs([config.output_dir], None)


def test_a_calibrated_model_keeps_its_adapters(finished_run: Config, tmp_path: Path) -> None:
    config = assembled(finished_run, tmp_path, "adapters", "both", mode="auto")
    config = config.model_copy(update={"calibration": config.calibration.model_copy(update={"steps": 20})})
    run = Run(config)
    calibrated = run.make("calibrate")
    assert calibrated.manifest.facts["kept"]
    found, before = (load_model(run.require(stage).local_folder()) for stage in ("calibrate", "assemble"))
    gains = {name for name, weight in before.named_parameters() if not torch.equal(weight, found.get_parameter(name))}
    assert gains
    assert all(names.is_norm(name) for name in gains)
    assert found.text_router is not None


@pytest.mark.parametrize(("form", "targets"), [("adapters", "both"), ("fold", "mlp"), ("average", "attention")])
def test_experts_are_removed_added_and_replaced_in_every_form(
    form: str, targets: str, finished_run: Config, tmp_path: Path
) -> None:
    config = assembled(finished_run, tmp_path, form, targets, experts_per_token=1)
    run, url = Run(config), stage_url(config, "assemble")
    whole = open_artifact(url)
    without = edit_experts.remove(url, 1, f"{tmp_path}/without")
    assert [member.index for member in edit_experts.members_of(without)] == [0, 2]
    again = edit_experts.add(without.url, stage_url(config, "expert", 1), f"{tmp_path}/again")
    assert again.manifest.files == whole.manifest.files, "the model that has it from the start"
    twice = edit_experts.replace(url, 0, stage_url(config, "expert", 0), f"{tmp_path}/twice")
    assert twice.manifest.files == whole.manifest.files
    for edited in (again, twice):
        assert edited.manifest.fingerprint == whole.manifest.fingerprint, "of the same settings and parts"
    weights = {name for name in whole.manifest.files if name.endswith(".safetensors") and "/" not in name}
    if form != "fold":
        assert again.manifest.facts["bytes_written"] == 0
        assert weights == {"model.safetensors"}
    assert not torch.equal(load_model(without.local_folder())(TOKENS_BT), logits(config))
    assert run.require("assemble").manifest.fingerprint == whole.manifest.fingerprint


def test_route_says_where_a_text_goes_and_why(
    finished_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = assembled(finished_run, tmp_path, "adapters", "both")
    model, run = stage_url(config, "assemble"), Run(config)
    text = "if (fd < 0) return -1; /* static int main(void) */ struct file *fp = NULL; for (i = 0; i < n; i++)"
    loaded = load_for_generation(model)
    found = routes_of(loaded, slot_names(stored_model(model), 4), text)
    names = ["expert-0 (c_code)", "expert-1 (english_novels)", "expert-2 (french_novels)"]
    assert [slot.name for slot in found.slots] == ["public", *names]
    assert sum(slot.visits for slot in found.slots) == pytest.approx(1)
    assert found.ranked[0].name == names[0]
    assert found.slots[1].evidence == max(slot.evidence or 0 for slot in found.slots)
    assert all(token in text and nats > 0 for token, nats in found.telling)
    done = CliRunner().invoke(app, ["route", "--model", model, "--prompt", text])
    assert done.exit_code == 0
    assert "It suits expert-0 (c_code) best. What speaks most for it against the next" in done.output
    with pytest.raises(DataError, match="must be a model that chooses among experts, but has none"):
        show_routes(run.url("backbone"), text)
    with pytest.raises(DataError, match="a prompt must be valid Unicode, but is not"):
        show_routes(model, "halves: \ud800")
    anchored = stage_url(finished_run, "assemble")  # routed by learned rows
    done = CliRunner().invoke(app, ["route", "--model", anchored, "--prompt", text])
    assert "Each layer routes by rows" in done.output


def test_one_adapter_trained_on_all_partitions_is_a_baseline(finished_run: Config, tmp_path: Path) -> None:
    wanted = {"baselines": ["joint_lora", "joint_lora_wide"]}
    lora = {**LORA, "targets": "mlp", "rank": 2, "phases": [{"until": 5, "layers": [0]}, {}]}
    config = lora_config(finished_run, tmp_path, lora, evaluation=wanted, experts={"steps": 6, "lora": lora})
    run = Run(config)
    results = run.make("joint_lora"), run.make("joint_lora_wide")
    for artifact, rank in zip(results, (2, 6), strict=True):
        values = artifact.read_json("adapters/joint/adapter_config.json")
        assert (values["r"], values["lora_alpha"]) == (rank, 6.0 * rank), "the same scale"
        assert artifact.manifest.facts["training_tokens"] == 3 * 6 * 4 * 64
        folder = artifact.local_folder()
        assert (folder / "model.safetensors").samefile(run.require("backbone").local_file("model.safetensors"))
        base = AutoModelForCausalLM.from_pretrained(folder)
        theirs = PeftModel.from_pretrained(base, folder / "adapters" / "joint").eval()
        assert torch.allclose(load_model(folder)(TOKENS_BT), theirs(TOKENS_BT).logits, atol=2e-5)
    models = run.make("evaluate")["models"]
    assert models["joint_lora"]["mean_loss"] < models["backbone"]["mean_loss"]
    assert models["joint_lora"]["training_tokens"] == models["joint_lora_wide"]["training_tokens"]
    added = [models[name]["parameters"] - models["backbone"]["parameters"] for name in wanted["baselines"]]
    assert added[1] == 3 * added[0] > 0
    with pytest.raises(ConfigError, match=r"baselines must not name joint_lora unless experts\.kind is lora"):
        tiny_config("run", evaluation=wanted)


def peft_adapter(config: Config, folder: Path, **changes: Any) -> Path:
    """An adapter made by PEFT on the run's backbone, with weights that change something."""
    base = AutoModelForCausalLM.from_pretrained(Run(config).require("backbone").local_folder())
    torch.manual_seed(5)
    wanted = {"r": 2, "lora_alpha": 9, "target_modules": ["v_proj", "up_proj"], "init_lora_weights": False}
    get_peft_model(base, LoraConfig(**{**wanted, **changes})).save_pretrained(folder)
    return folder


def test_an_adapter_that_peft_trained_is_taken_in_as_an_expert(finished_run: Config, tmp_path: Path) -> None:
    config = assembled(finished_run, tmp_path, "adapters", "both")
    folder = peft_adapter(config, tmp_path / "peft")
    url = stage_url(config, "assemble")
    with pytest.raises(ConfigError, match=r"--text must name files of the domain"):
        edit_experts.add(url, str(folder))
    done = CliRunner().invoke(
        app, ["experts", "add", url, str(folder), "--text", "sample:law/train.jsonl.gz", "--output", f"{tmp_path}/m"]
    )
    assert done.exit_code == 0, done.output
    more = open_artifact(f"{tmp_path}/m")
    members = edit_experts.members_of(more)
    assert [member.index for member in members] == [0, 1, 2, 3]
    assert members[3].url == f"{config.output_dir}/experts/taken-3"
    base = AutoModelForCausalLM.from_pretrained(Run(config).require("backbone").local_folder())
    theirs = PeftModel.from_pretrained(base, folder).eval()(TOKENS_BT).logits
    alone = Run(config).backbone.expert(open_artifact(members[3].url))
    assert torch.allclose(alone(TOKENS_BT), theirs, atol=2e-5)
    model = load_model(more.local_folder())
    restrict_routing(model, [4])
    assert torch.allclose(model(TOKENS_BT), theirs, atol=2e-5)
    text = read_texts(["sample:law/test.jsonl.gz"])["test"][0][:600]
    found = routes_of(load_for_generation(more.url), [str(slot) for slot in range(5)], text)
    assert found.ranked[0].name == "4", "its texts send such text to it"


def test_an_adapter_of_another_base_or_kind_is_refused_in_one_sentence(finished_run: Config, tmp_path: Path) -> None:
    config = assembled(finished_run, tmp_path, "average", "mlp")
    url, folder = stage_url(config, "assemble"), peft_adapter(config, tmp_path / "peft")
    weights, settings = folder / WEIGHTS, folder / "adapter_config.json"
    tensors, values = load_file(weights), json.loads(settings.read_text())
    wider = {name: torch.cat([t, t], dim=1) if "lora_A" in name else t for name, t in tensors.items()}
    save_file(wider, weights)
    with pytest.raises(MismatchError, match=r"must be an adapter of rank 2 for this backbone, but for .* it has"):
        edit_experts.add(url, str(folder))
    save_file({**tensors, "base_model.model.model.norm.weight": torch.ones(2)}, weights)
    with pytest.raises(MismatchError, match=r"must hold A and B of adapters on projections of a decoder, but has"):
        edit_experts.add(url, str(folder))
    save_file(tensors, weights)
    for change, message in (
        ({"use_dora": True}, "its use_dora is True"),
        ({"peft_type": "IA3"}, "its peft_type is 'IA3'"),
        ({"rank_pattern": {"v_proj": 4}}, "its rank_pattern is"),
        ({"r": "many"}, "its r is 'many'"),
        ({"use_rslora": "false"}, "its use_rslora 'false'"),
        ({"init_lora_weights": "pissa"}, "its init_lora_weights is 'pissa'"),
    ):
        settings.write_text(json.dumps({**values, **change}))
        with pytest.raises(DataError, match=message):
            edit_experts.add(url, str(folder))
    settings.write_text(json.dumps({**values, "base_model_name_or_path": "somebody/other"}))
    monkey = {"hub": "somebody/this", "identity": "x"}
    backbone = Run(config).require("backbone")
    named = replace(
        backbone, manifest=replace(backbone.manifest, facts={**backbone.manifest.facts, "pretrained": monkey})
    )
    with pytest.raises(
        MismatchError, match=r"must be an adapter of somebody/this, as the backbone is, but was trained on"
    ):
        take_in(str(folder), config, named, 7, [], f"{tmp_path}/x")
    settings.write_text(json.dumps(values))
    assert edit_experts.add(url, str(folder), f"{tmp_path}/more").manifest.facts["lora_form"] == "average"


def test_two_adapters_are_taken_in_side_by_side_for_models_elsewhere(finished_run: Config, tmp_path: Path) -> None:
    config = assembled(finished_run, tmp_path, "average", "mlp")
    url, names = stage_url(config, "assemble"), ("one", "two", "one")
    folders = {name: peft_adapter(config, tmp_path / name, r=rank) for name, rank in (("one", 2), ("two", 3))}
    models = [edit_experts.add(url, str(folders[name]), f"{tmp_path}/with-{name}") for name in names]
    taken = [edit_experts.members_of(model)[3] for model in models]
    assert [member.index for member in taken] == [3, 4, 3]
    assert [member.url for member in taken] == [f"{config.output_dir}/experts/taken-{index}" for index in (3, 4, 3)]
    for member, name in zip(taken, names, strict=True):
        assert open_artifact(member.url).read_bytes(WEIGHTS) == (folders[name] / WEIGHTS).read_bytes()


def test_the_choice_for_a_sequence_is_made_by_its_beginning_and_stays(finished_run: Config, tmp_path: Path) -> None:
    config = assembled(finished_run, tmp_path, "adapters", "both", lora_choice="sequence")
    model = load_model(Run(config).require("assemble").local_folder())
    router = model.text_router
    assert router is not None
    end = int(router.get_buffer("ends")[0])
    tokens_BT = torch.randint(4, 500, (2, 100), generator=torch.Generator().manual_seed(0))
    tokens_BT[1, 60] = end
    held_BTR, state = router(tokens_BT)
    router.holds = False
    free_BTR, _ = router(tokens_BT)
    router.holds = True
    first = DECIDED_WITHIN
    assert torch.equal(held_BTR[:, :first], free_BTR[:, :first])
    assert torch.equal(held_BTR[0, first:], free_BTR[0, first - 1].expand(100 - first, -1))
    assert torch.equal(held_BTR[1, first:61], free_BTR[1, first - 1].expand(61 - first, -1))
    assert torch.equal(held_BTR[1, 61 : 61 + first], free_BTR[1, 61 : 61 + first]), "another document begins"
    assert torch.equal(held_BTR[1, 61 + first :], free_BTR[1, 60 + first].expand(39 - first, -1))
    for cuts in ([10, 50, 70], [1, 2, 31, 32, 33, 61, 62, 92]):  # read piece by piece, as in generation
        found, state = [], None
        for piece_BT in tokens_BT.tensor_split(cuts, dim=1):
            logits_BTR, state = router(piece_BT, state)
            found.append(logits_BTR)
        assert torch.allclose(torch.cat(found, dim=1), held_BTR, atol=1e-5)


def test_without_a_router_every_token_visits_all_adapters_alike(finished_run: Config, tmp_path: Path) -> None:
    """Of matrices whose output is linear in them, that is the average."""
    even, mean = (
        assembled(finished_run, tmp_path / form, form, "attention", router=router)
        for form, router in (("adapters", "uniform"), ("average", "evidence"))
    )
    assert torch.allclose(logits(even), logits(mean), atol=2e-5)
    assert Run(even).require("assemble").manifest.facts["experts_per_token"] == 3


def test_a_study_measures_all_forms_beside_their_baselines(tmp_path: Path) -> None:
    base, file = tmp_path / "base.yaml", tmp_path / "study.yaml"
    lora = {"anchored": False, "kind": "lora", "lora": {"targets": "mlp", "rank": 2}}
    base.write_text(to_yaml(tiny_config(tmp_path / "unused", assembly={"router": "evidence"}, experts=lora)))
    forms = {"assembly.lora": ["adapters", "fold", "average"]}
    variants: dict[str, Any] = {
        "backbone": {"kind": "backbone"},
        "experts": {"kind": "experts"},
        "soup": {"kind": "soup"},
        "one": {"kind": "joint_lora"},
        "wide": {"kind": "joint_lora_wide"},
        "lora": {"kind": "assembled", "set": forms},
        "removal": {"kind": "assembled", "removal": True, "without": True, "carry": True},
        "calibrated": {"kind": "assembled", "calibrate": True},
        "ffn": {"kind": "assembled", "recipe": "ffn"},
    }
    recipes: dict[str, Any] = {"plain": {}, "ffn": {"experts.kind": "ffn", "experts.lora": None}}
    values: dict[str, Any] = {
        "name": "tiny",
        "base": str(base),
        "output_dir": str(tmp_path / "out"),
        "recipes": recipes,
    }
    values |= {"validation_tokens_per_domain": 700, "variants": variants}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    runs = Runs(load_study(str(file)))
    run_study(runs, "validation")
    rows = json.loads(paths.read_bytes(f"{runs.root}/table-validation.json"))["rows"]
    losses = {name: row["mean_loss"] for name, row in rows.items()}
    assert losses["lora-lora_fold"] == pytest.approx(losses["lora-lora_adapters"], abs=1e-4)
    assert losses["lora-lora_average"] == pytest.approx(losses["soup"], abs=1e-5)
    assert losses["experts: oracle"] <= losses["experts: best expert"]
    assert rows["lora-lora_average"]["parameters"] == rows["wide"]["parameters"] > rows["one"]["parameters"]
    assert rows["lora-lora_fold"]["active_parameters"] > rows["lora-lora_adapters"]["active_parameters"]
    assert rows["ffn"]["trained_bytes"] > rows["lora-lora_fold"]["trained_bytes"] > rows["one"]["trained_bytes"] > 0
    assert {"removal: without own expert", "removal: carried over windows", "calibrated"} <= rows.keys()


def test_two_ranks_train_adapters_in_phases_as_one_process_does(finished_run: Config, tmp_path: Path) -> None:
    lora = {**LORA, "dropout": 0.0, "phases": "early->late"}
    alone, two = (lora_config(finished_run, tmp_path / name, lora) for name in ("alone", "two"))
    expected, file = load_file(made(alone).local_file(WEIGHTS)), tmp_path / "two.yaml"
    file.write_text(to_yaml(two))
    run_command("tests.shard_ranks", str(file), "2", "expert-0")
    found = load_file(Run(two).require("expert", 0).local_file(WEIGHTS))
    assert all(torch.allclose(found[name], tensor, atol=1e-4) for name, tensor in expected.items())
