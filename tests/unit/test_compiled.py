"""Which jobs are compiled, where the settings leave it open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from modularforge.config import Config, ModelConfig, PhaseConfig, TrainingConfig
from modularforge.config_files import to_yaml
from modularforge.model.backbone import Decoder, build_backbone
from modularforge.training import compiled
from modularforge.training.compiled import LONG, is_compiled
from modularforge.training.job import Job
from tests.conftest import ROOT

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def job(steps: int, **training: object) -> Job:
    return Job("job", PhaseConfig(steps=steps), TrainingConfig(**training))  # type: ignore[arg-type]


@pytest.fixture
def decoder() -> Decoder:
    return build_backbone(ModelConfig(width=8, layers=1, heads=1, kv_heads=1, ffn_width=8, context_length=8), 9)


@pytest.fixture
def has_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton and a compiler of C, wherever this runs."""
    monkeypatch.setattr(compiled, "_can_build_kernels", lambda: True)


def test_long_jobs_of_language_models_are_compiled_on_a_gpu(decoder: Decoder, has_tools: None) -> None:
    assert is_compiled(job(LONG), decoder, GPU)
    assert not is_compiled(job(LONG - 1), decoder, GPU)
    assert not is_compiled(job(LONG), decoder, CPU)
    assert not is_compiled(job(LONG), nn.Linear(2, 2), GPU)  # as a speech model, whose inputs have many shapes


def test_a_setting_outranks_what_suits(decoder: Decoder, has_tools: None) -> None:
    assert is_compiled(job(1, compile=True), decoder, CPU)
    assert not is_compiled(job(LONG, compile=False), decoder, GPU)


def test_without_a_compiler_of_c_or_kernels_by_rule_nothing_is_compiled_unasked(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert not is_compiled(job(LONG), decoder, GPU)
    monkeypatch.setattr(compiled, "_can_build_kernels", lambda: True)
    monkeypatch.setattr(compiled, "_chooses_by_rule", lambda: False)
    assert not is_compiled(job(LONG), decoder, GPU)


def test_kernels_of_what_is_compiled_are_chosen_by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config, "deterministic", False)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    compiled.compiled(nn.Linear(2, 2))
    assert config.deterministic


def test_a_job_that_compiles_nothing_starts_without_torchs_compiler(finished_run: Config, tmp_path: Path) -> None:
    """Importing torch._dynamo takes as long as torch itself."""
    training = finished_run.training.model_copy(update={"compile": False})
    config = finished_run.model_copy(
        update={"output_dir": str(tmp_path), "data_dir": finished_run.data_url, "training": training}
    )
    (tmp_path / "settings.yaml").write_text(to_yaml(config))
    program = (
        "import sys; from modularforge.run import Run; from modularforge.config_files import load_config; "
        "run = Run(load_config(sys.argv[1])); run.make('backbone'); run.make('expert', 0); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "settings.yaml")], cwd=ROOT, check=True)
