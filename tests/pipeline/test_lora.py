"""LoRA experts: trained beside a frozen backbone, in phases, and the same numbers in PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from modularforge.config import Config
from modularforge.config_files import make_config
from modularforge.errors import ConfigError, Interrupted
from modularforge.experts.lora import training
from modularforge.experts.lora.phases import phase_at
from modularforge.model.folder import read_tensors
from modularforge.pipeline import ALL_BASELINES, stage_settings
from modularforge.run import Run
from modularforge.stage_outputs import Backbone
from modularforge.training import loop
from modularforge.training.checkpointing import Checkpointing
from modularforge.training.optimizer import AdamW
from tests.conftest import tiny_config, tiny_values
from tests.lora_runs import KIND_LORA, LORA, WEIGHTS, lora_config, made


@pytest.mark.parametrize("targets", ["attention", "mlp", "both", ["k_proj", "down_proj"]])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_expert_has_the_same_logits_in_peft(
    targets: str | list[str], rslora: bool, finished_run: Config, tmp_path: Path
) -> None:
    config = lora_config(finished_run, tmp_path, {**LORA, "targets": targets, "rslora": rslora})
    own, backbone = made(config), Run(config).backbone
    base = AutoModelForCausalLM.from_pretrained(backbone.artifact.local_folder())
    tokens_BT = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        plain = base(tokens_BT).logits
        theirs = PeftModel.from_pretrained(base, own.local_folder()).eval()(tokens_BT).logits
        ours = backbone.expert(own)(tokens_BT)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-3)
    found = {name.split(".")[-3] for name in load_file(own.local_file(WEIGHTS))}
    groups = {"attention": {"q_proj", "v_proj"}, "mlp": {"gate_proj", "up_proj", "down_proj"}}
    every = {*groups["attention"], *groups["mlp"], "k_proj", "o_proj"}
    assert found == ({**groups, "both": every}[targets] if isinstance(targets, str) else set(targets))


def test_the_backbone_keeps_its_bytes_its_type_and_gets_no_gradients(
    finished_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lora_config(finished_run, tmp_path)
    seen: dict[str, set[Any]] = {"frozen": set(), "adapters": set()}
    before = Backbone(Run(config).require("backbone")).tensors
    half = {name: tensor.bfloat16() for name, tensor in before.items()}
    monkeypatch.setattr("modularforge.model.folder.read_tensors", lambda _folder: dict(half))
    step = AdamW.step

    def watched(self: AdamW, *arguments: Any) -> Any:
        for name, weight in models[0].named_parameters():
            kind = "adapters" if ".lora_" in name else "frozen"
            seen[kind].add((weight.dtype, weight.grad is not None))
        return step(self, *arguments)

    models: list[nn.Module] = []
    prepare = training.adapters

    def remembered(model: Any, *arguments: Any) -> Any:
        models.append(model)
        return prepare(model, *arguments)

    monkeypatch.setattr(training, "adapters", remembered)
    monkeypatch.setattr(AdamW, "step", watched)
    made(config)
    assert seen == {"frozen": {(torch.bfloat16, False)}, "adapters": {(torch.float32, True)}}
    after = {name: weight for name, weight in models[0].named_parameters() if ".lora_" not in name}
    assert all(torch.equal(after[name], tensor) for name, tensor in half.items())


def moved(config: Config, monkeypatch: pytest.MonkeyPatch, index: int = 0) -> list[set[str]]:
    """Trains an expert; for each step, the parameters whose bytes it changed."""
    steps: list[set[str]] = []
    inner = loop._step

    def watched(trainer: Any, *arguments: Any) -> Any:
        before = {name: weight.detach().clone() for name, weight in trainer.trainable.parameters.items()}
        result = inner(trainer, *arguments)
        after = trainer.trainable.parameters
        steps.append({name for name, old in before.items() if not torch.equal(old, after[name])})
        return result

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_step", watched)
        made(config, index)
    return steps


def short(name: str) -> str:
    """`model.layers.1.mlp.up_proj.lora_A.weight` as `1.mlp`."""
    parts = name.split(".")
    return f"{parts[2]}.{'mlp' if parts[3] == 'mlp' else 'attn'}"


ATTENTION, MLP = {"0.attn", "1.attn"}, {"0.mlp", "1.mlp"}
GOLDEN: Mapping[str, list[set[str]]] = {
    "attn->mlp->both": [ATTENTION] * 2 + [MLP] * 2 + [ATTENTION | MLP] * 2,
    "both->mlp->attn": [ATTENTION | MLP] * 2 + [MLP] * 2 + [ATTENTION] * 2,
    "both->mlp->both": [ATTENTION | MLP] * 2 + [MLP] * 2 + [ATTENTION | MLP] * 2,
    "early->late": [{"0.attn", "0.mlp"}] * 3 + [{"1.attn", "1.mlp"}] * 3,
}
LISTED = [{"until": 1, "train": ["mlp"]}, {"until": 4, "train": ["attention"], "layers": [1]}, {"layers": "early"}]


@pytest.mark.parametrize("name", GOLDEN)
def test_only_the_adapters_of_a_phase_move(
    name: str, finished_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"steps": 6, "weight_decay": 0.1}
    config = lora_config(finished_run, tmp_path, {**LORA, "phases": name}, experts=with_lora(steps, phases=name))
    found = moved(config, monkeypatch)
    assert [{short(item) for item in step} for step in found] == GOLDEN[name]


def with_lora(experts: Mapping[str, Any], **lora: Any) -> dict[str, Any]:
    return {**KIND_LORA, "lora": {**LORA, **lora}, **experts}


def test_listed_phases_name_groups_and_layers(
    finished_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lora_config(finished_run, tmp_path, experts=with_lora({"steps": 6}, phases=LISTED))
    expected = [MLP] + [{"1.attn"}] * 3 + [{"0.attn", "0.mlp"}] * 2
    assert [{short(item) for item in step} for step in moved(config, monkeypatch)] == expected


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_an_expert_resumes_in_every_phase_bit_for_bit(
    step: int, finished_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = with_lora({"steps": 6, "weight_decay": 0.1}, dropout=0.3, phases="attn->mlp->both")
    whole = made(lora_config(finished_run, tmp_path / "whole", experts=experts))
    config = lora_config(finished_run, tmp_path / "again", experts=experts, training={"checkpoint_every": 100})
    with monkeypatch.context() as stopped:
        count = iter(range(1, 1000))
        stopped.setattr(Checkpointing, "agree_to_stop", lambda _self, _wants: next(count) == step)
        with pytest.raises(Interrupted):
            made(config)
    torch.manual_seed(99)  # what ran before does not matter
    begun: list[int] = []
    at = phase_at

    def watched(phases: Any, step: int) -> Any:
        begun.append(step)
        return at(phases, step)

    monkeypatch.setattr(training, "phase_at", watched)
    assert made(config).manifest.files == whole.manifest.files
    assert begun[1:] == list(range(step, 6)), "it goes on, and does not start over"


def test_dropout_changes_what_is_learned_and_nothing_of_a_finished_expert(finished_run: Config, tmp_path: Path) -> None:
    found: dict[float, dict[str, Tensor]] = {}
    for dropout in (0.0, 0.3):
        config = lora_config(finished_run, tmp_path / str(dropout), {**LORA, "dropout": dropout})
        found[dropout] = load_file(made(config).local_file(WEIGHTS))
    assert any(not torch.equal(found[0.0][name], found[0.3][name]) for name in found[0.0])
    model = Run(config).backbone.expert(Run(config).require("expert", 0))
    tokens_BT = torch.arange(2, 12).view(1, 10)
    assert torch.equal(model.eval()(tokens_BT), model.eval()(tokens_BT))
    assert read_tensors(Run(config).require("backbone").local_folder()).keys() >= {"model.norm.weight"}


@pytest.mark.parametrize(
    ("experts", "more", "message"),
    [
        ({"lora": {"rank": 4}}, {}, r"experts\.lora\.rank must be left out unless experts\.kind is lora"),
        ({}, {"assembly": {"lora": "fold"}}, r"assembly\.lora must be left out unless experts\.kind is lora"),
        ({**KIND_LORA, "anchored": True}, {}, r"experts\.anchored must be left out with experts\.kind lora"),
        ({**KIND_LORA, "init": "fresh"}, {}, r"experts\.init must be left out with experts\.kind lora"),
        (
            {**KIND_LORA, "lora": {"phases": "attn->mlp->both"}},
            {},
            r"experts\.lora\.phases must not be attn->mlp->both where experts\.lora\.targets are all of attention",
        ),
        (
            {**KIND_LORA, "lora": {"phases": [{"train": ["mlp"]}]}},
            {},
            r"experts\.lora\.phases\.0\.train must name adapters that experts\.lora\.targets have \(attention\)",
        ),
        (
            {**KIND_LORA, "lora": {"phases": [{"until": 5}, {"until": 3}]}},
            {},
            r"experts\.lora\.phases must end later and later, .* at \[5, 3\]",
        ),
        ({**KIND_LORA, "lora": {"phases": [{"until": 5}]}}, {}, r"must reach experts\.steps \(10\), but end at 5"),
        ({**KIND_LORA, "lora": {"phases": [{"layers": [2]}]}}, {}, r"must be numbers below model\.layers \(2\)"),
        ({**KIND_LORA, "lora": {"targets": "all"}}, {}, r"experts\.lora\.targets"),
        (
            {**KIND_LORA, "lora": {"targets": "both"}},
            {"assembly": {"lora": "fold", "router": "evidence"}},
            r"assembly\.lora must not be fold where experts\.lora\.targets have q_proj, k_proj, .*use adapters",
        ),
        (KIND_LORA, {"assembly": {"router": "data_stats"}}, r"assembly\.router must be evidence or uniform"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(
    experts: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(tiny_values("run", **{"assembly": {"router": "evidence"}, "experts": experts, **more}), "tests")


def test_settings_of_adapters_are_the_identity_of_lora_experts_alone() -> None:
    def of(stage: str, **lora: Any) -> set[str]:
        experts = {**KIND_LORA, "lora": lora} if lora else {}
        found = stage_settings(tiny_config("run", experts=experts, assembly={"router": "evidence"}), stage)
        return {name for name in found if name.startswith(("experts.lora", "assembly.lora"))}

    fields = ("rank", "alpha", "dropout", "targets", "rslora", "phases")
    assert of("expert", rank=4) == {f"experts.lora.{name}" for name in fields}
    assert of("joint_lora", rank=4) == of("joint_lora_wide", rank=4) == of("expert", rank=4)
    for stage in {"backbone", "assemble", *ALL_BASELINES} - {"joint_lora", "joint_lora_wide"}:
        assert of(stage, rank=4) == set(), stage
    assert of("expert") == set()


def test_moments_of_paused_adapters_wait_where_they_were(
    finished_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = with_lora({"steps": 6, "weight_decay": 0.1}, phases="attn->mlp->both")
    config = lora_config(finished_run, tmp_path, experts=experts)
    attention, mlp = (f"model.layers.0.{place}.lora_B.weight" for place in ("self_attn.q_proj", "mlp.up_proj"))
    counts: dict[str, list[int]] = {attention: [], mlp: []}
    means: list[Tensor] = []
    inner = loop._step

    def watched(trainer: Any, *arguments: Any) -> Any:
        result = inner(trainer, *arguments)
        states = {name: trainer.optimizer.state.get(trainer.trainable.parameters[name], {}) for name in counts}
        for name, state in states.items():
            counts[name].append(int(state.get("step", 0)))
        means.append(states[attention]["exp_avg"].clone())
        return result

    monkeypatch.setattr(loop, "_step", watched)
    made(config)
    assert counts == {attention: [1, 2, 2, 2, 3, 4], mlp: [0, 0, 1, 2, 3, 4]}
    assert torch.equal(means[1], means[3])
    assert not torch.equal(means[3], means[4])
