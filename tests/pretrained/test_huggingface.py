"""Phases of LoRA and norms of gradients in the real Trainer, with real PEFT."""

from __future__ import annotations

import copy
import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from modularforge.errors import ConfigError
from modularforge.huggingface import (
    DynamicLoRACallback,
    GradientMeasuringTrainer,
    GradientNormCallback,
    create_layerwise_lora_config,
    create_phased_lora_config,
    measure_gradient_norms,
)
from tests.conftest import ROOT, run_command

LAYERS, STEPS = 4, 6
IDS = [(7 * place + place * place) % 40 for place in range(12)]


def llama() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=40, num_hidden_layers=LAYERS, tie_word_embeddings=False, **shape)
    return transformers.LlamaForCausalLM(config)


def adapted(phases: Any = "attn->mlp->both") -> Any:
    model = llama()
    torch.manual_seed(1)
    return peft.get_peft_model(model, create_phased_lora_config(phases, dropout=0.0))


class Same(torch.utils.data.Dataset[dict[str, list[int]]]):
    """One example again and again, so that its order does not matter."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": IDS, "labels": IDS}


def arguments(folder: Path, **changes: Any) -> Any:
    values = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 0.01, "weight_decay": 0.1,
        "save_strategy": "no", "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **{**values, **changes})


class Moved(transformers.TrainerCallback):  # type: ignore[misc]
    """Which adapters each step moved."""

    def __init__(self) -> None:
        self.steps: list[set[str]] = []
        self.before: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.before = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        named = model.named_parameters()
        self.steps.append({name for name, weight in named if not torch.equal(weight, self.before[name])})


def kinds(names: set[str]) -> set[str]:
    return {"attention" if "self_attn" in name else "mlp" for name in names}


EARLY_LATE = [{"until": 2, "layers": "early"}, {"until": None, "train": ["mlp"], "layers": [3]}]
BOTH, ALL = {"attention", "mlp"}, set(range(LAYERS))
TABLE: list[tuple[Any, list[tuple[set[str], set[int]]]]] = [
    ("attn->mlp->both", [({"attention"}, ALL)] * 2 + [({"mlp"}, ALL)] * 2 + [(BOTH, ALL)] * 2),
    ("both->mlp->attn", [(BOTH, ALL)] * 2 + [({"mlp"}, ALL)] * 2 + [({"attention"}, ALL)] * 2),
    ("both->mlp->both", [(BOTH, ALL)] * 2 + [({"mlp"}, ALL)] * 2 + [(BOTH, ALL)] * 2),
    ("early->late", [(BOTH, {0, 1})] * 3 + [(BOTH, {2, 3})] * 3),
    (EARLY_LATE, [(BOTH, {0, 1})] * 2 + [({"mlp"}, {3})] * 4),
]  # fmt: skip


@pytest.mark.parametrize(("phases", "expected"), TABLE, ids=[str(phases)[:20] for phases, _ in TABLE])
def test_adapters_learn_in_their_phases_and_stay_elsewhere(phases: Any, expected: Any, tmp_path: Path) -> None:
    """Weight decay moves what has a gradient of zero, but not what is paused."""
    model, moved = adapted(phases), Moved()
    callbacks = [DynamicLoRACallback(phases), moved]
    transformers.Trainer(model, arguments(tmp_path), train_dataset=Same(), callbacks=callbacks).train()
    assert len(moved.steps) == STEPS
    for number, (names, (groups, layers)) in enumerate(zip(moved.steps, expected, strict=True)):
        assert all("lora_" in name for name in names)
        assert kinds(names) == groups, number
        assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == layers, number
    assert all(weight.requires_grad for name, weight in model.named_parameters() if "lora_" in name)


def test_a_resumed_training_is_in_the_phase_of_its_step(tmp_path: Path) -> None:
    def train(folder: Path, **changes: Any) -> tuple[Any, Moved]:
        model, moved = adapted(), Moved()
        options = arguments(folder, save_strategy="steps", save_steps=3, **changes)
        callbacks = [DynamicLoRACallback("attn->mlp->both"), moved, GradientNormCallback(every=1)]
        trainer = transformers.Trainer(model, options, train_dataset=Same(), callbacks=callbacks)
        checkpoint = folder / "checkpoint-3"
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint.is_dir() else None)
        return model, moved

    whole, _ = train(tmp_path)
    again, moved = train(tmp_path)
    assert [kinds(names) for names in moved.steps] == [{"mlp"}, BOTH, BOTH]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [(row["attention"] == 0, row["mlp"] == 0) for row in rows[::2]] == [
        (False, True),
        (True, False),
        (False, False),
    ]
    assert {row["embedding"] for row in rows} == {"nan"}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "gradient_norms" / "norms.jsonl").read_text().splitlines()]


def by_autograd() -> dict[str, float]:
    """Norms of the first step, which is of one example."""
    model, ids = llama(), torch.tensor([IDS])
    model(input_ids=ids, labels=ids).loss.backward()
    parts = {"attention": "self_attn", "mlp": ".mlp.", "embedding": "embed_tokens", "head": "lm_head", "total": ""}
    squares = {name: float(weight.grad.square().sum()) for name, weight in model.named_parameters()}
    return {
        group: math.sqrt(sum(value for name, value in squares.items() if part in name)) for group, part in parts.items()
    }


@pytest.mark.parametrize("pieces", [1, 2])
def test_the_measuring_trainer_measures_the_whole_batch_before_clipping(pieces: int, tmp_path: Path) -> None:
    options = arguments(tmp_path, max_grad_norm=1e-3, gradient_accumulation_steps=pieces)
    trainer = GradientMeasuringTrainer(llama(), options, train_dataset=Same(), norms_every=1)
    trainer.train()
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {group: rows[0][group] for group in by_autograd()} == pytest.approx(by_autograd(), rel=1e-4)
    logged = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert [row["total"] for row in rows] == pytest.approx(logged, rel=1e-4)
    table = list(csv.DictReader((tmp_path / "gradient_norms" / "group_norms.csv").open()))
    assert len(table) == STEPS
    assert json.loads((tmp_path / "gradient_norms" / "summary.json").read_text())["measurements"] == STEPS


@pytest.mark.slow
def test_two_processes_go_through_the_phases_and_measure_their_common_gradient(tmp_path: Path) -> None:
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.pretrained.trainer_job"]
    run_command(*command, str(tmp_path / "two"))
    options, callbacks = arguments(tmp_path / "one"), [DynamicLoRACallback("attn->mlp->both")]
    GradientMeasuringTrainer(adapted(), options, train_dataset=Same(), callbacks=callbacks, norms_every=1).train()
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row["step"] for row in two] == list(range(1, STEPS + 1))
    for group in ("attention", "mlp", "total"):
        assert [row[group] for row in two] == pytest.approx([row[group] for row in one], rel=1e-3), group


def test_the_page_works_as_it_stands(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(code, {"model": llama(), "arguments": arguments(tmp_path), "data": Same()})
    assert [row["step"] for row in rows_of(tmp_path)] == [STEPS]


def test_the_callback_measures_what_the_optimizer_takes(tmp_path: Path) -> None:
    for limit, folder in ((0.0, tmp_path / "plain"), (1e-3, tmp_path / "clipped")):
        callback = GradientNormCallback(every=4)
        options = arguments(folder, max_grad_norm=limit)
        transformers.Trainer(llama(), options, train_dataset=Same(), callbacks=[callback]).train()
        assert [row["step"] for row in rows_of(folder)] == [4, STEPS], "every fourth, and the last"
    plain, clipped = (rows_of(tmp_path / name)[0] for name in ("plain", "clipped"))
    assert clipped["total"] == pytest.approx(1e-3, rel=1e-3)
    assert plain["total"] > 0.1


def test_norms_are_measured_of_any_model_after_backward() -> None:
    model, ids = adapted(), torch.tensor([IDS])
    model(input_ids=ids, labels=ids).loss.backward()
    found = measure_gradient_norms(model)
    squares = [weight.grad.square().sum() for weight in model.parameters() if weight.grad is not None]
    assert found["total"] == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-5)
    assert found["total"] == pytest.approx(math.hypot(found["attention"], found["mlp"]), rel=1e-5)
    assert math.isnan(found["head"])
    assert [norm > 0 for norm in found["layers"]["mlp"]] == [True] * LAYERS


def test_settings_are_those_of_peft() -> None:
    found = create_phased_lora_config("both->mlp->both", rank=2, bias="none")
    modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (found.r, found.lora_alpha, found.target_modules) == (2, 32.0, modules)
    only = create_phased_lora_config([{"until": 3, "train": ["mlp"], "layers": "early"}, {"train": ["mlp"]}])
    assert only.target_modules == {"gate_proj", "up_proj", "down_proj"}
    layered = peft.get_peft_model(llama(), create_layerwise_lora_config([1, 3], "attention"))
    names = {name for name, weight in layered.named_parameters() if weight.requires_grad}
    assert {name.split(".layers.")[1][0] for name in names} == {"1", "3"}
    assert {name.split(".")[-4] for name in names} == {"q_proj", "v_proj"}


def test_mistakes_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"phases .*must be .*attn->mlp->both"):
        DynamicLoRACallback("mlp->attn")
    with pytest.raises(ConfigError, match="rank"):
        create_layerwise_lora_config([0], rank=0)
    for phases, message in (
        ([{"until": 5}, {"until": 2}, {}], "must end later and later"),
        ([{"until": 2, "layers": [7]}, {}], "phase 0 trains none"),
    ):
        adapted = peft.get_peft_model(llama(), create_phased_lora_config(phases))
        trainer = transformers.Trainer(
            adapted, arguments(tmp_path), train_dataset=Same(), callbacks=[DynamicLoRACallback(phases)]
        )
        with pytest.raises(ConfigError, match=message):
            trainer.train()
    trainer = transformers.Trainer(
        llama(), arguments(tmp_path), train_dataset=Same(), callbacks=[DynamicLoRACallback("early->late")]
    )
    with pytest.raises(ConfigError, match="must have a model with LoRA adapters in its layers, but it has none"):
        trainer.train()


def test_without_transformers_the_extra_is_named() -> None:
    program = "import sys; sys.modules['transformers'] = None\ntry:\n import modularforge.huggingface\n"
    program += "except Exception as error: print(type(error).__name__, error)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("ConfigError modularforge.huggingface must have transformers, peft and accelerate")
    assert "pip install 'modularforge[transformers]'" in done.stdout


def test_a_model_is_not_changed_by_being_measured() -> None:
    model, ids = llama(), torch.tensor([IDS])
    model(input_ids=ids, labels=ids).loss.backward()
    gradients: list[Any] = [weight.grad for weight in model.parameters()]
    before = copy.deepcopy(gradients)
    measure_gradient_norms(model)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients, strict=True))
