"""Runs of LoRA experts on the finished run's backbone, for the tests of experts and of models made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints import Artifact, paths
from modularforge.config import Config
from modularforge.pipeline import stage_url
from modularforge.run import Run
from modularforge.stages import assemble, expert
from modularforge.stored_models import stored_model
from tests.conftest import tiny_config

WEIGHTS = "adapter_model.safetensors"
KIND_LORA = {"kind": "lora", "anchored": False}
LORA: Mapping[str, Any] = {"rank": 3, "alpha": 12, "dropout": 0.1, "targets": "both"}


def lora_config(finished_run: Config, folder: Path, lora: Mapping[str, Any] = LORA, **changes: Any) -> Config:
    """A new run of LoRA experts on the backbone and the data of the finished one."""
    own: dict[str, Any] = {"experts": {**KIND_LORA, "lora": dict(lora)}, "assembly": {"router": "evidence"}}
    wanted = {name: {**own.get(name, {}), **changes.get(name, {})} for name in {*own, *changes}}
    config = tiny_config(folder / "run", data_dir=finished_run.data_url, **wanted)
    target = paths.local_path(stage_url(config, "backbone"))
    target.parent.mkdir(parents=True)
    target.symlink_to(paths.local_path(stage_url(finished_run, "backbone")))
    return config


def made(config: Config, index: int = 0) -> Artifact:
    return expert.run(Run(config), index)


def assembled(finished_run: Config, folder: Path, form: str, targets: Any, **settings: Any) -> Config:
    """A run of LoRA experts, trained and assembled."""
    lora = {**LORA, "targets": targets, "alpha": 48}
    assembly = {"router": "evidence", "lora": form, **settings}
    config = lora_config(finished_run, folder, lora, assembly=assembly)
    for index in range(config.experts.count):
        made(config, index)
    assemble.run(Run(config))
    return config


TOKENS_BT = torch.arange(2, 50).view(2, 24)


def logits(config: Config) -> Tensor:
    with torch.no_grad():
        return stored_model(stage_url(config, "assemble")).load()(TOKENS_BT)
