"""Every way to steer is trained apart and jointly, at its own rates, calibrated where asked, measured in a study."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from checkpoints import Artifact
from modularforge.config import Config
from modularforge.config_files import to_yaml
from modularforge.errors import ConfigError
from modularforge.experts.steering.training import SteeredLoss, calibrates, steered
from modularforge.pipeline import stage_settings
from modularforge.run import Run
from modularforge.speech.folder import load_speech
from modularforge.speech.gates import weight_facts
from modularforge.speech.low_rank import ALPHA_PER_RANK, LowRank
from modularforge.speech.model import SpeechModel
from modularforge.speech.steering import GateUsage, Steering, SteeringShape, likeness, unevenness
from modularforge.stages.evaluate_speech import run as evaluation
from modularforge.study.runs import Runs
from modularforge.study.study import run_study
from modularforge.study.study_file import VariantEntry, load_study
from modularforge.tasks.speech import SPEECH, MixedSpeech, arguments, held_out_speech
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.optimizer import build_optimizer, set_rate
from tests.speech.runs import PHASE, speech_config
from tests.speech.tiny import tiny_batch, tiny_model

CPU = torch.device("cpu")
Made = Callable[..., Run]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Data and a trained projector; tests must not change them."""
    folder = tmp_path_factory.mktemp("base")
    config = speech_config(folder / "run", folder / "sounds")
    for stage in ("prepare-data", "partition", "backbone"):
        Run(config).make(stage)
    return config


@pytest.fixture
def with_settings(base: Config, tmp_path: Path) -> Made:
    """A run on the same data and projector with other settings."""

    def made(has_own_backbone: bool = False, **changes: Any) -> Run:
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        if not has_own_backbone:
            (folder / "backbone").symlink_to(Path(base.output_dir) / "backbone")
        config = speech_config(folder, Path(base.output_dir).parent / "sounds", data_dir=base.data_url, **changes)
        run = Run(config)
        run.make("backbone")
        return run

    return made


def own_losses(run: Run, model: Any) -> dict[str, float]:
    held_out = held_out_speech(run.config, run.corpus)
    return {label: row["loss"] for label, row in SPEECH.metrics(model, held_out, CPU).items()}


def trained_size(model: SpeechModel) -> int:
    assert model.steering is not None
    return sum(weight.numel() for weight in model.steering.parameters() if weight.requires_grad)


@pytest.mark.parametrize("variant", ["lora", "hybrid"])
def test_experts_of_every_variant_learn_alone_and_together_they_are_each_of_them_if_forced(
    variant: str, with_settings: Made
) -> None:
    run = with_settings(steering={"variant": variant, "rank": 2}, experts={"steps": 10})
    for index in (1, 0):
        run.make("expert", index)
    run.make("assemble")
    run.make("joint")
    plain = own_losses(run, load_speech(run.require("backbone").local_folder()))
    together = load_speech(run.require("assemble").local_folder())
    assert together.steering is not None
    partitions = run.require("partition")
    for index, label in enumerate(("low", "high")):
        expert = run.require("expert", index)
        alone: SpeechModel = run.backbone.expert(expert)  # type: ignore[assignment]
        assert own_losses(run, alone)[label] < plain[label]
        inputs = arguments(next(SPEECH.part(run.config, partitions, 1 - index).batches()).tensors, CPU)
        with torch.no_grad():
            together.steering.forced = None
            mixed = together(*inputs)[0]
            together.steering.forced = index
            assert torch.allclose(together(*inputs)[0], alone(*inputs)[0], atol=1e-5)
            assert not torch.allclose(mixed, alone(*inputs)[0], atol=1e-5)
    together.steering.forced = None
    usage = together.steering.observed = GateUsage(together.steering.shape)
    batch = next(SPEECH.part(run.config, partitions, 1).batches()).tensors
    with torch.no_grad():
        together.encode(batch["features"], batch["frames"])
    assert usage.share_LK[-1, 1] > 0.6  # of an utterance of its domain
    joint = load_speech(run.require("joint").local_folder())
    sizes = [trained_size(one) for one in (joint, alone)]
    assert sizes[0] == 2 * sizes[1]


def test_an_adapted_encoder_is_what_folded_adapters_compute() -> None:
    adapted, plain, batch = tiny_model("lora"), tiny_model("static"), tiny_batch()
    plain.load_state_dict({name: value for name, value in adapted.state_dict().items() if "steering" not in name})
    assert isinstance(adapted.steering, LowRank)
    names = {name.replace("-", ".") for name in adapted.steering.adapters}
    modules = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
    assert names == {f"layers.{layer}.{name}" for layer in range(3) for name in modules}
    with torch.no_grad():
        same = adapted(*arguments(batch, CPU))[0], plain(*arguments(batch, CPU))[0]
        assert torch.equal(*same)  # B begins as zeros
        for name, adapter in adapted.steering.adapters.items():
            adapter.lora_B.normal_()  # type: ignore[operator]
            matrix = plain.encoder.get_submodule(name.replace("-", "."))
            matrix.weight += 2 * adapter.lora_B @ adapter.lora_A  # type: ignore[operator]
        found, expected = adapted(*arguments(batch, CPU))[0], plain(*arguments(batch, CPU))[0]
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, same[0], atol=1e-2)


def test_every_part_learns_at_a_rate_and_within_a_limit_of_its_own(base: Config) -> None:
    backbone = Run(base).require("backbone")
    norms: list[float] = []

    def rates(clip_norm: float, **settings: Any) -> dict[str, float]:
        chosen = base.steering.model_copy(update={"clip_norm": clip_norm, **settings})
        trained = steered(chosen, backbone, 2, SPEECH.loss, chosen.joint_projector)
        phase = base.experts.model_copy(update={"steps": 1, "warmup_steps": 0, "peak_learning_rate": 1e-3})
        optimizer = build_optimizer(trained.groups, phase, base.training)
        set_rate(optimizer, 1e-3)
        found = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}

        def see(stepped: Any, *_: object) -> None:
            for group in trained.groups:
                norms.append(float(torch.stack([weight.grad.norm() for weight in group.parameters.values()]).norm()))  # type: ignore[union-attr]

        hook = register_optimizer_step_pre_hook(see)
        fit(
            trained,
            SPEECH.part(base, Run(base).require("partition"), 0),
            Job("x", phase, base.training),
            lambda: 0.0,
            World(),
        )
        hook.remove()
        return {name: found[id(weight)] for name, weight in trained.parameters.items()}

    found = rates(1e-6, joint_projector=True)
    assert found["steering.vectors"] == found["steering.scale"] == pytest.approx(1e-2)
    assert found["steering.gate_weight"] == found["steering.gate_bias"] == pytest.approx(1e-3)
    assert found["projector.fc1.weight"] == pytest.approx(1e-4)
    assert "projector.fc1.weight" not in rates(1e-6)
    assert all(rate == pytest.approx(1e-3) for rate in rates(1e-6, variant="lora").values())
    assert len(norms) == 3 + 2 + 1
    assert all(0 < norm < 1.01e-6 for norm in norms)
    rates(1e9)
    assert max(norms[6:]) > 5e-5  # without the limit


def test_ids_of_all_ranks_and_pieces_weigh_alike_however_long_their_answers_are(base: Config) -> None:
    run = Run(base)
    model = load_speech(run.require("backbone").local_folder())
    model.projector.requires_grad_(True)
    parts = [SPEECH.part(base, run.require("partition"), index) for index in range(2)]
    ends = np.cumsum(1 + np.arange(parts[0].file.count) % 3)  # answers of one to three ids, which are of two
    tokens = replace(parts[0].file.tokens, offsets=np.concatenate([[0], ends]))
    parts = [replace(part, file=replace(part.file, tokens=tokens)) for part in parts]
    mixed = MixedSpeech(parts, 8, 4, seed=3)

    def learned(batches: Sequence[Mapping[str, torch.Tensor]]) -> tuple[float, torch.Tensor]:
        """Mean loss of these pieces of a batch, and the gradient of one weight."""
        losses = [SPEECH.loss(model, tensors) / len(batches) for tensors in batches]
        (gradient,) = torch.autograd.grad(sum(losses, torch.zeros(())), [model.projector.fc2.weight])
        return float(sum(losses)), gradient

    for examples in (parts[0], mixed):
        whole = next(examples.batches()).tensors
        lengths_B = (whole["answer"] >= 0).sum(dim=1)
        assert len({*lengths_B.tolist()}) > 1, "else the test cannot fail"
        ranks = [next(examples.batches(0, rank, 2)).tensors for rank in range(2)]
        pieces = [{name: tensor.chunk(4)[index] for name, tensor in whole.items()} for index in range(4)]
        loss, gradient = learned([whole])
        assert loss == learned([{name: tensor for name, tensor in whole.items() if name != "whole"}])[0]
        for found in (learned(ranks), learned(pieces)):
            assert found[0] == pytest.approx(loss, abs=1e-5)
            assert torch.allclose(found[1], gradient, atol=1e-6)


def test_the_joint_baseline_trains_the_projector_only_where_asked(with_settings: Made) -> None:
    fixed, along = with_settings(), with_settings(steering={"joint_projector": True})
    for run in (fixed, along):
        run.make("joint")
    first, *others = (
        load_file(artifact.local_file("model.safetensors"))
        for artifact in (fixed.require("backbone"), fixed.require("joint"), along.require("joint"))
    )
    same = [
        all(torch.equal(first[name], one[name]) for name in first if name.startswith("projector")) for one in others
    ]
    assert same == [True, False]
    for stage, counts in (("expert", False), ("joint", True), ("assemble", False)):
        assert (stage_settings(fixed.config, stage) != stage_settings(along.config, stage)) is counts, stage


def test_lengths_of_low_rank_adapters_are_those_of_their_products() -> None:
    torch.manual_seed(0)
    model = tiny_model("lora", experts=2)
    assert isinstance(model.steering, LowRank)
    for adapter in model.steering.adapters.values():
        torch.nn.init.normal_(adapter.lora_B)  # type: ignore[arg-type]
    shape, expected = model.steering.shape, torch.zeros(model.steering.shape.sites, 2)
    for name, adapter in model.steering.adapters.items():
        layer, rank = int(name.split("layers-")[1].split("-")[0]), model.shape.rank
        for k in range(2):
            own = slice(k * rank, (k + 1) * rank)
            product = ALPHA_PER_RANK * adapter.lora_B[:, own] @ adapter.lora_A[own]  # type: ignore[index]
            expected[layer, k] += product.detach().square().sum()
    assert torch.allclose(model.steering.lengths_LE(), expected.sqrt(), rtol=1e-4)
    assert len(weight_facts(model.steering)["norm_per_layer_and_vector"]) == shape.sites


def test_gates_are_computed_in_float32_under_bf16_and_experts_learn_so(with_settings: Made) -> None:
    torch.manual_seed(0)
    steering = Steering(SteeringShape(1, 8, 5))
    u_BTD, mask_BT = torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    expected = steering(0, u_BTD, mask_BT)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(steering(0, u_BTD, mask_BT), expected)
    run = with_settings(has_own_backbone=True, training={"precision": "bf16"})
    run.make("expert", 0)
    tensors = load_file(run.require("expert", 0).local_file("steering.safetensors"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    plain = own_losses(run, load_speech(run.require("backbone").local_folder()))
    assert own_losses(run, run.backbone.expert(run.require("expert", 0)))["low"] < plain["low"]


def test_manifests_and_tables_say_what_was_heard(with_settings: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    patience = {"patience": 1, "validate_every": 1}
    projectors = iter([3.0, 2.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr("modularforge.stages.speech.mean_loss", lambda *_: next(projectors))
    run = with_settings(has_own_backbone=True, training=patience)
    facts = run.require("backbone").manifest.facts
    assert (facts["best_step"], facts["steps"], facts["validation_loss"]) == (3, 4, 1.0)
    losses = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr("modularforge.experts.job.mean_loss", lambda *_: next(losses))
    run.make("expert", 1)
    facts, config = run.require("expert", 1).manifest.facts, run.config
    assert (facts["best_step"], facts["steps"]) == (2, 3)
    examples = SPEECH.part(config, run.require("partition"), 1)
    batches = [*islice(examples.batches(), facts["steps"])]
    assert facts["training_tokens"] == sum(int((batch.tensors["answer"] >= 0).sum()) for batch in batches)
    assert facts["audio_seconds"] == pytest.approx(sum(batch.units for batch in batches), abs=0.01)
    assert facts["training_seconds"] > 0
    row = evaluation(run)["models"]["expert-1"]
    own = run.require("backbone").manifest.facts
    assert row["training_tokens"] == facts["training_tokens"] + own["training_tokens"]
    mixed = SPEECH.mixture(config, run.require("partition"), "dense", config.baseline_phase("dense"))
    steps = config.baseline_phase("dense").steps
    heard = sum(int((batch.tensors["answer"] >= 0).sum()) for batch in islice(mixed.batches(), steps))
    assert mixed.taken(steps)["training_tokens"] == heard  # type: ignore[attr-defined]


def test_even_gates_and_orthogonal_vectors_cost_least_and_training_finds_them() -> None:
    assert float(unevenness(torch.full((2, 4), 0.25))) == pytest.approx(1.0)
    assert float(unevenness(torch.eye(4)[:1])) == pytest.approx(4.0)
    assert float(likeness(torch.eye(4)[None])) == pytest.approx(0.0)
    assert float(likeness(torch.ones(1, 3, 5))) == pytest.approx(1.0)
    assert float(likeness(torch.ones(1, 1, 5))) == 0.0
    batch = tiny_batch()
    ends = {}
    for name, weights in (("plain", (0.0, 0.0)), ("both", (10.0, 10.0))):
        model = tiny_model()
        assert isinstance(model.steering, Steering)
        with torch.no_grad():
            model.steering.gate_bias[:, 0] = 2.0
            model.steering.vectors[:, 1] = model.steering.vectors[:, 0]
        loss, optimizer = (
            SteeredLoss(model, SPEECH.loss, *weights),
            torch.optim.AdamW(model.steering.parameters(), 2e-2),
        )
        for _ in range(15):
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        usage = model.steering.observed = GateUsage(model.steering.shape)
        model.encode(batch["features"], batch["frames"])
        ends[name] = float(unevenness(usage.share_LE)), float(likeness(model.steering.vectors))
        assert model.steering.mean_gates is None
    assert ends["both"][0] < 1.05 < 1.2 < ends["plain"][0]
    assert ends["both"][1] < 0.5 * ends["plain"][1]


@pytest.fixture
def assembled(with_settings: Made) -> Run:
    """Experts that are assembled without a router that knows them."""
    steering, calibration = {"calibrates": True}, {**PHASE, "steps": 12, "peak_learning_rate": 3e-2}
    run = with_settings(assembly={"router": "uniform"}, steering=steering, calibration=calibration)
    for index in (0, 1):
        run.make("expert", index)
    run.make("assemble")
    return run


def folder_tensors(artifact: Artifact) -> dict[str, torch.Tensor]:
    names = [name for name in artifact.manifest.files if name.endswith(".safetensors")]
    return {key: value for name in names for key, value in load_file(artifact.local_file(name)).items()}


def test_a_calibration_trains_router_and_scales_and_is_kept_where_it_helps(assembled: Run) -> None:
    assembled.make("calibrate")
    found = assembled.require("calibrate")
    facts = found.manifest.facts
    assert facts["kept"]
    assert facts["loss_after"] < facts["loss_before"]
    before, after = folder_tensors(assembled.require("assemble")), folder_tensors(found)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"steering.router_weight", "steering.router_bias", "steering.scale"}
    results = evaluation(assembled)
    assert results["chosen"] == "calibrated"
    assert [*results["models"]][-2:] == ["assembled", "calibrated"]
    tokens = {name: row["training_tokens"] for name, row in results["models"].items()}
    assert tokens["calibrated"] == tokens["assembled"] + facts["training_tokens"]
    assert results["calibration"]["kept"] is True


def test_a_calibration_that_does_not_help_leaves_no_model(assembled: Run) -> None:
    config = assembled.config
    calibration = config.calibration.model_copy(update={"peak_learning_rate": 100.0})
    run = Run(config.model_copy(update={"calibration": calibration}))
    run.make("calibrate")
    found = run.require("calibrate")
    assert found.manifest.facts["kept"] is False
    assert not any(name.endswith(".safetensors") for name in found.manifest.files)
    assert evaluation(run)["chosen"] == "assembled"


def test_what_a_calibration_may_touch_follows_the_settings(base: Config) -> None:
    model, settings = tiny_model(experts=2), base.calibration
    every = calibrates(model, settings)
    assert every.keys() == {"steering.router_weight", "steering.router_bias", "steering.scale"}
    assert calibrates(model, settings.model_copy(update={"router": False})).keys() == {"steering.scale"}
    with pytest.raises(ConfigError, match="calibration must train router rows or scales"):
        calibrates(tiny_model("lora"), settings)


def test_a_run_of_speech_needs_no_setting_but_its_task() -> None:
    values = {"task": "speech", "data": {"sources": [{"name": "a", "train": "a.jsonl"}]}}
    config = Config.model_validate({**values, "experts": {"count": 2}})
    assert (config.experts.kind, config.assembly.router) == ("steering", "ridge")
    assert config.evaluation.baselines == ["dense", "joint"]
    chosen = Config.model_validate({**values, "assembly": {"router": "means"}, "evaluation": {"baselines": []}})
    assert (chosen.assembly.router, chosen.evaluation.baselines) == ("means", [])
    assert Config.model_validate({**values, "task": "text"}).assembly.router == "evidence"


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ({"variant": "prompt"}, "speech.data.prompt_field must name the column of prompts"),
        ({"variant": "lora", "active": 2}, "steering.active must be left out with steering.variant lora"),
        ({"vectors": None}, "steering.vectors must be a number with steering.variant layerwise, but is null"),
    ],
    ids=["prompt", "lora", "vectors"],
)
def test_settings_of_variants_that_cannot_be_get_one_sentence(
    steering: dict[str, Any], message: str, base: Config, tmp_path: Path
) -> None:
    sounds = Path(base.output_dir).parent / "sounds"
    with pytest.raises(ValueError, match=message):
        speech_config(tmp_path, sounds, steering=steering)
    assert speech_config(tmp_path, sounds, steering={"variant": "lora", "vectors": None}).steering.vectors is None


def test_a_study_measures_every_variant_once_with_error_rates(base: Config, tmp_path: Path) -> None:
    settings = base.model_copy(update={"output_dir": "unused", "data_dir": None})
    (tmp_path / "base.yaml").write_text(to_yaml(settings))
    few = {"backbone.steps": 3, "experts.steps": 3, "calibration.steps": 3, "calibration.batch_size": 4}
    study = {
        "name": "speech",
        "base": str(tmp_path / "base.yaml"),
        "output_dir": str(tmp_path / "study"),
        "set": {**few, "steering.rank": 2},
        "recipes": {
            "layerwise": {},
            "lora": {"steering.variant": "lora"},
            "prompt": {"steering.variant": "prompt", "speech.data.prompt_field": "split"},
        },
        "variants": {
            "projector": {"kind": "backbone"},
            "static": {"kind": "dense"},
            "joint": {"kind": "joint", "recipe": ["layerwise", "lora"]},
            "experts": {"kind": "experts", "recipe": ["layerwise", "lora"]},
            "assembled": {"kind": "assembled", "recipe": ["layerwise", "lora", "prompt"]},
            "calibrated": {"kind": "assembled", "calibrate": True},
        },
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    runs = Runs(load_study(str(path)))
    run_study(runs, "validation")
    table = json.loads((tmp_path / "study/table-validation.json").read_text())
    assert list(table["rows"]) == [
        "projector", "static", "layerwise-joint", "lora-joint", "layerwise-experts: best expert",
        "layerwise-experts: oracle", "lora-experts: best expert", "lora-experts: oracle", "layerwise-assembled",
        "lora-assembled", "prompt-assembled", "calibrated",
    ]  # fmt: skip
    for row in table["rows"].values():
        assert row["wer"] == pytest.approx(sum(item["wer"] for item in row["rates"].values()) / 2)
        assert row["training_tokens"] > 0
    page = (tmp_path / "study/table-validation.md").read_text()
    assert "| WER % | CER % |" in page
    assert "Word error rate by domain" in page
    backbones = [
        artifact.manifest.fingerprint
        for artifact in (runs.run(0, name).obtain("backbone") for name in study["recipes"])
    ]
    assert backbones[0] == backbones[1] != backbones[2]
    bench = runs.run(0, "lora")
    folder = bench.obtain("joint").local_folder()
    held_out = held_out_speech(bench.config, bench.corpus, "validation")
    expected = SPEECH.metrics(load_speech(folder), held_out, CPU)
    assert table["rows"]["lora-joint"]["domains"]["low"] == pytest.approx(expected["low"]["loss"])
    before = (tmp_path / "study/table-validation.json").read_bytes()
    run_study(runs, "validation")
    assert (tmp_path / "study/table-validation.json").read_bytes() == before
    wrong = replace(runs, study=runs.study.model_copy(update={"variants": {"soup": VariantEntry(kind="soup")}}))
    with pytest.raises(
        ConfigError, match=r"variants.soup.kind must be one of backbone, dense, joint, experts, assembled"
    ):
        run_study(wrong, "validation")
