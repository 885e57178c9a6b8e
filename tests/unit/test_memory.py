"""What a training is said to need of a GPU, and which jobs are refused before they are queued."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from launcher.preflight import _memory_problems, fingerprint_of
from modularforge.calibration import calibrator
from modularforge.calibration.calibrator import calibrate_by
from modularforge.config import Config, ExpertsConfig, ModelConfig, TrainingConfig
from modularforge.config_files import load_config
from modularforge.errors import ConfigError
from modularforge.experts.ffn.training import expert_model
from modularforge.experts.trainable import trainable
from modularforge.memory import gpu_counts, job_memory, memory_table, smallest, too_large, trained_stages
from modularforge.model import names
from modularforge.model.backbone import build_backbone
from modularforge.model.hub_config import backbone_config
from modularforge.model.moe import build_moe
from modularforge.pipeline import STAGES
from modularforge.tasks.text import TEXT, TextExamples
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.sharding import shard
from tests.conftest import ROOT

LARGE: dict[str, Any] = {
    "model.width": 4096,
    "model.layers": 32,
    "model.heads": 32,
    "model.kv_heads": 8,
    "model.ffn_width": 14336,
}
LARGE |= {"data.vocab_size": 128256, "model.context_length": 4096, "training.recompute": "blocks"}  # Llama 3 8B


def config_of(**changes: Any) -> Config:
    return load_config(str(ROOT / "configs/cluster.yaml"), [*changes.items()])


def large(**changes: Any) -> Config:
    sizes = {"backbone.batch_size": 64, "backbone.accumulation_steps": 1, "experts.batch_size": 64}
    return config_of(**{**LARGE, **sizes, **changes})


def test_one_gpu_holds_sixteen_bytes_of_each_weight_and_many_their_share() -> None:
    config = config_of()
    weights = sum(weight.numel() for weight in build_backbone(config.model, config.data.vocab_size).parameters())
    one = job_memory(config, STAGES["backbone"], 1, "ddp")
    assert (one.weights, one.gradients, one.moments) == (4 * weights, 4 * weights, 8 * weights)
    eight = job_memory(config, STAGES["backbone"], 8, "fsdp")
    assert 8 * eight.weights == one.weights
    assert 8 * eight.moments == one.moments
    assert eight.gathered > 0
    assert one.gathered == 0
    assert one.total == sum(one.parts.values())


def test_pieces_that_wait_for_the_last_of_a_batch_keep_gradients_whole_with_fsdp_alone() -> None:
    config = config_of(**{"backbone.accumulation_steps": 2})
    whole = job_memory(config, STAGES["backbone"], 1, "ddp").gradients
    assert job_memory(config, STAGES["backbone"], 8, "fsdp").gradients == whole
    assert job_memory(config, STAGES["backbone"], 8, "hsdp", shards=4).gradients == whole / 4


def test_a_plain_expert_has_moments_of_its_blocks_and_an_adapter_hardly_any() -> None:
    ffn, lora = (job_memory(large(**{"experts.kind": kind}), STAGES["expert"], 1, "ddp") for kind in ("ffn", "lora"))
    assert ffn.moments == 8 * 32 * 3 * 4096 * 14336
    assert lora.moments < ffn.moments / 500
    assert lora.weights > ffn.weights


def test_the_smallest_number_that_fits_is_named_and_what_cannot_fit_is_refused() -> None:
    config = large(**{"cluster.gpu_memory_gb": 80, "cluster.backbone": {"nodes": 1, "gpus": 1}})
    found = smallest(config, STAGES["backbone"], 72e9)
    assert found is not None
    assert found[1] == "fsdp"
    assert job_memory(config, STAGES["backbone"], *found).total <= 72e9
    assert job_memory(config, STAGES["backbone"], found[0] // 2, "fsdp").total > 72e9
    problems = list(_memory_problems(config, "run", []))
    assert "backbone must fit into 90 % of cluster.gpu_memory_gb (80), but needs about" in problems[0]
    assert f"fsdp on {found[0]} would do" in problems[0]
    many = {"cluster.backbone": {"nodes": found[0], "gpus": 1}, "training.parallel": "fsdp"}
    assert too_large(large(**{"cluster.gpu_memory_gb": 80, **many}), STAGES["backbone"]) is None
    assert fingerprint_of(config) != fingerprint_of(config_of(**{"cluster.gpu_memory_gb": 80}))
    assert list(_memory_problems(large(), "run", [])) == []


def test_where_only_blocks_that_are_computed_again_would_fit_that_is_named() -> None:
    """A model of 70 B parameters: activations of 4,096 tokens fit on no GPU of 80 GB."""
    shape = {"width": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "ffn_width": 28672, "context_length": 4096}
    changes = {f"model.{name}": value for name, value in shape.items()} | {"backbone.batch_size": 64}
    gpus = {"cluster.gpu_memory_gb": 80, "cluster.backbone": {"nodes": 8, "gpus": 8}, "training.parallel": "fsdp"}
    why = too_large(large(**changes, **gpus, **{"training.recompute": "none"}), STAGES["backbone"])
    assert why is not None
    assert why.endswith("; fsdp with training.recompute blocks on 64 would do")
    for recompute in ("blocks", "auto"):
        assert too_large(large(**changes, **gpus, **{"training.recompute": recompute}), STAGES["backbone"]) is None


def test_a_calibration_that_cannot_fit_is_refused_and_counts_bf16_for_what_is_frozen() -> None:
    sizes = {"cluster.gpu_memory_gb": 80, "cluster.other": {"nodes": 1, "gpus": 8}, "calibration.batch_size": 16}
    why = too_large(large(**sizes), STAGES["calibrate"])
    assert why is not None
    assert why.startswith("calibrate must fit into 90 % of cluster.gpu_memory_gb (80), but needs about ")
    assert "on each of 1 GPU with training.parallel ddp; fsdp on " in why  # ddp calibrates in one process
    assert too_large(large(**sizes, **{"training.parallel": "fsdp"}), STAGES["calibrate"]) is None
    whole = job_memory(large(), STAGES["calibrate"], 1, "ddp")
    pretrained = large().model.model_copy(update={"pretrained": "given"})
    half = job_memory(large().model_copy(update={"model": pretrained}), STAGES["calibrate"], 1, "ddp")
    assert whole.moments == half.moments < whole.weights / 100
    assert half.weights < 0.51 * whole.weights


def test_info_says_it_for_the_numbers_that_are_asked_for() -> None:
    lines = memory_table(large(**{"cluster.gpu_memory_gb": 80}), [1, 8])
    assert [line for line in lines if line.startswith("memory:     backbone on 8 GPUs, fsdp: ")]
    assert sum("fits into 80 GB on: " in line for line in lines) == len(trained_stages(large()))
    assert memory_table(large(), []) == []


def test_info_names_no_way_in_which_a_job_cannot_run() -> None:
    """More GPUs than they can share a batch, and calibration by ddp, which is one process."""
    lines = memory_table(large(), [8, 48])
    assert sum("backbone on 48 GPUs: cannot be, as they cannot share its " in line for line in lines) == 1
    assert not [line for line in lines if "48 GPUs, " in line]
    assert [line.split(", ")[1].split(":")[0] for line in lines if "calibrate on 8 GPUs, " in line] == ["fsdp"]


def test_hsdp_is_named_where_it_needs_something_else_than_fsdp_and_chosen_where_it_alone_fits() -> None:
    """Over nodes of 8 it holds more; where a batch is accumulated it keeps gradients in pieces, which fsdp does not."""

    def rows(config: Config, gpus: int) -> list[str]:
        table = memory_table(config, [gpus])
        return [line.split(", ")[1].split(":")[0] for line in table if line.startswith("memory:     backbone on ")]

    plain = large()
    assert rows(plain, 8) == ["ddp", "fsdp"]
    assert rows(plain, 64) == ["ddp", "fsdp", "hsdp over 8"]
    assert rows(large(**{"cluster.backbone": {"nodes": 16, "gpus": 4}}), 64)[2] == "hsdp over 4"
    wide = {"training.parallel": "hsdp", "training.shard_ranks": 16}
    assert rows(large(**wide), 64)[2] == "hsdp over 16"
    assert rows(large(**wide | {"training.shard_ranks": 24}), 64) == ["ddp", "fsdp"]  # cannot be
    accumulated = large(**{"backbone.batch_size": 128, "backbone.accumulation_steps": 16})
    assert rows(accumulated, 8) == ["ddp", "fsdp", "hsdp over 8"]
    whole, pieces = (job_memory(accumulated, STAGES["backbone"], 8, way, 8).total for way in ("fsdp", "hsdp"))
    found = smallest(accumulated, STAGES["backbone"], (whole + pieces) / 2)
    assert found == (8, "hsdp")
    few = large(**{"backbone.batch_size": 512, "backbone.accumulation_steps": 16, "cluster.backbone.gpus": 4})
    least = job_memory(few, STAGES["backbone"], 32, "hsdp", 4).total
    assert least < job_memory(few, STAGES["backbone"], 32, "fsdp").total
    assert smallest(few, STAGES["backbone"], least) == (32, "hsdp with training.shard_ranks 4")


def test_a_number_of_gpus_that_is_none_is_refused() -> None:
    assert gpu_counts("1, 8,64") == [1, 8, 64]
    assert gpu_counts("") == []
    for text in ("1,x", "0", "1,,2"):
        with pytest.raises(ConfigError, match="--gpus must be numbers of 1 or more with commas between"):
            gpu_counts(text)


@pytest.mark.parametrize("anchored", [False, True], ids=["plain", "anchored"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_is_frozen_may_stay_in_bf16_and_the_expert_is_the_same_bit_for_bit(anchored: bool, family: Any) -> None:
    """Under autocast, which multiplies in bf16 whatever frozen matrices are stored in."""
    torch.manual_seed(0)
    shape = ModelConfig(width=32, layers=2, heads=4, kv_heads=2, ffn_width=48, context_length=16, family=family)
    stored = {name: tensor.bfloat16() for name, tensor in build_backbone(shape, 64).state_dict().items()}
    stored = {name: tensor for name, tensor in stored.items() if not (shape.tied_head and name == "lm_head.weight")}
    values, directions = backbone_config(shape, 64), [torch.ones(32)] * 2 if anchored else None
    settings, tokens = ExpertsConfig(anchored=anchored), torch.randint(0, 64, (4, 16))
    found, before = [], {name: tensor.clone() for name, tensor in stored.items()}
    for keeps_types in (False, True):
        model = expert_model(stored, values, settings, directions, keeps_types).whole()
        shard(trainable(model, TEXT.loss), TrainingConfig(), World())
        learns = [weight for weight in model.parameters() if weight.requires_grad]
        frozen = {weight.dtype for weight in model.parameters() if not weight.requires_grad}
        assert {weight.dtype for weight in learns} == {torch.float32}
        assert frozen == {torch.bfloat16 if keeps_types else torch.float32}
        optimizer = torch.optim.AdamW(learns, lr=1e-2)
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                loss = TEXT.loss(model, {"inputs": tokens, "targets": tokens})
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([loss.detach(), model(tokens).detach(), *(weight.detach() for weight in learns)])
    assert all(torch.equal(stored[name], before[name]) for name in before)  # training has not reached them
    plain, kept = found
    assert all(torch.equal(one, other) for one, other in zip(plain[2:], kept[2:], strict=True))
    assert torch.equal(plain[0], kept[0])
    assert torch.allclose(plain[1], kept[1].float(), atol=0.1)  # here float32, and there in bf16 by itself


@pytest.mark.parametrize("shared", [False, True], ids=["gains", "shared"])
def test_a_calibration_beside_what_stays_in_bf16_is_the_same_bit_for_bit(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU has it; of what was measured, losses alone differ here, where float32 is not autocast."""
    shape = ModelConfig(width=32, layers=2, heads=4, kv_heads=2, ffn_width=48, context_length=16)
    phase = {"steps": 4, "batch_size": 4, "shared": shared, "warmup_steps": 0}
    config = config_of(calibration=phase, **{"training.precision": "bf16", "training.validate_every": 2})
    ids = np.random.default_rng(0).integers(0, 64, 2000).astype(np.uint16)
    job, found = Job("calibrate", config.calibration, config.training), []
    for keeps in (False, True):
        monkeypatch.setattr(calibrator, "keeps_types", lambda *_, keeps=keeps: keeps)
        torch.manual_seed(0)
        model = build_moe(shape, 64, 3, 2)
        for name, weight in model.named_parameters():
            weight.data = weight.data if names.is_gate(name) else weight.data.bfloat16()
        result = calibrate_by(TextExamples(ids, 16, 4, 3), model, config, lambda: 0.0, job, World())
        frozen = {weight.dtype for weight in model.parameters() if not weight.requires_grad}
        assert frozen == {torch.bfloat16 if keeps else torch.float32}
        found.append(result.tensors)
    assert {tensor.dtype for name, tensor in found[0].items() if "norm" in name} == {torch.bfloat16}
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(bool(tensor.any()) for name, tensor in found[0].items() if names.is_gate(name))  # they began at zero
