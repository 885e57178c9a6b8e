"""docs/kinds.md works as it stands: its files, installed, make a run with the kind and the task that it adds."""

from __future__ import annotations

import os
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from modularforge.model import names
from tests.conftest import ROOT, run_command

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE = (ROOT / "docs" / "kinds.md").read_text(encoding="utf-8")


def blocks(language: str) -> str:
    """The code of all blocks of one language, one after another."""
    return "\n\n".join(re.findall(rf"```{re.escape(language)}\n(.*?)```", PAGE, flags=re.DOTALL))


def install(folder: Path, suffix: str = "") -> None:
    """What pip leaves of a package of one module: the module, and its entry points."""
    project = tomllib.loads(blocks(f"toml{suffix}"))["project"]
    (folder / f"{project['name']}.py").write_text(blocks(f"python{suffix}"))
    information = folder / f"{project['name']}-{project['version']}.dist-info"
    information.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (information / "METADATA").write_text(metadata)
    points = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in table.items())
        for group, table in project["entry-points"].items()
    ]
    (information / "entry_points.txt").write_text("\n".join(points))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by the command of the page, with its task as well."""
    folder = tmp_path_factory.mktemp("kinds")
    install(folder)
    install(folder, " task")
    pip, command = blocks("bash").strip().splitlines()
    assert pip == "pip install ."
    environment = {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    words = [*shlex.split(command), "--set", "task=smooth", "--output-dir", str(folder / "run")]
    run_command(*words, env=environment)
    return folder / "run"


def test_the_model_has_the_mean_gains_of_its_experts(run: Path) -> None:
    backbone: dict[str, Any] = {}
    model: dict[str, Any] = {}
    for found, stage in ((backbone, "backbone"), (model, "assembled")):
        for path in (run / stage).glob("*.safetensors"):
            found.update(load_file(path) if "statistics" not in path.name else {})
    experts = [load_file(path / "gains.safetensors") for path in sorted((run / "experts").iterdir())]
    assert len(experts) == 5
    assert model.keys() == backbone.keys()
    for name, values in model.items():
        if names.is_norm(name):
            np.testing.assert_allclose(values, np.mean([expert[name] for expert in experts], axis=0), rtol=1e-6)
            assert not np.array_equal(values, backbone[name])
        else:
            np.testing.assert_array_equal(values, backbone[name])


def test_the_run_is_evaluated_and_its_experts_are_of_that_kind_and_task(run: Path) -> None:
    assert "| expert-4 " in (run / "evaluation" / "report.md").read_text()
    manifest = (run / "experts" / "expert-0" / "manifest.json").read_text()
    assert '"expert_kind": "gains"' in manifest
    assert '"task": "smooth"' in manifest


def test_smoothed_targets_are_what_is_minimised(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of logits that know the target, plain loss is 0, and smoothed loss is not."""
    monkeypatch.syspath_prepend(str(run.parent))
    name = "smooth"
    smooth = import_module(name)
    targets_BT = torch.tensor([[1, 2]])
    logits = torch.nn.functional.one_hot(targets_BT, 4).float() * 100
    assert float(smooth.SMOOTH.loss(lambda _: logits, {"inputs": targets_BT, "targets": targets_BT})) > 1
