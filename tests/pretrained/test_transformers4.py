"""Both generations of transformers: 4.57.6 in an environment of its own reads what we write, and we what it writes.

Slow, as it installs that environment: `make test-transformers4`.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from modularforge.config import Config
from modularforge.config_files import complete_config
from modularforge.model.folder import load_model
from tests.conftest import run_every_stage
from tests.pretrained import models
from tests.pretrained.in_transformers4 import tokens
from tests.pretrained.test_pipeline import values_on
from tests.pretrained.transformers4 import ROOT, environment_python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
TOLERANCE = 1e-5
TEXT = "The <think> of 1901 – « été » <|end|>."


def in_transformers4(*arguments: str) -> str:
    """Run the other side's program; only its own folders and torch's are on its path."""
    program = ROOT / "tests" / "pretrained" / "in_transformers4.py"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(environment_python()), str(program), *arguments], capture_output=True, text=True, env=variables
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ours(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load_model(folder).float()(tokens() % load_model(folder).vocab_size)
    return logits


@pytest.fixture(scope="module", params=["llama", "qwen3", "qwen3-scaled", "our own"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders of a whole run: assembled from a pretrained model, or from a backbone of our own."""
    root, kind = tmp_path_factory.mktemp("run"), str(request.param)
    if kind == "our own":
        finished: Config = request.getfixturevalue("finished_run")
        run = Path(finished.output_dir)
    else:
        scaled: dict[str, Any] = {"rope_parameters": models.YARN} if kind == "qwen3-scaled" else {}
        source = models.llama(root / "model") if kind == "llama" else models.qwen3(root / "model", **scaled)
        run_every_stage(complete_config(values_on(source, root / "run"), "tests"))
        run = root / "run"
    found = {stage: run / stage for stage in ("backbone", "assembled", "calibrated")}
    return {stage: folder for stage, folder in found.items() if (folder / "config.json").is_file()}


def test_transformers_4_and_5_give_our_logits_and_tokens(folders: dict[str, Path]) -> None:
    answers: dict[str, Any] = json.loads(in_transformers4("read", TEXT, *map(str, folders.values())))
    for stage, folder in folders.items():
        name, ids, end, generation_end = answers[str(folder)]
        newer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert name == type(newer).__name__
        assert ids == tokenizer(TEXT)["input_ids"]
        assert end == tokenizer.eos_token_id == generation_end
        older = load_file(folder.with_suffix(".logits"))["logits"]
        with torch.no_grad():
            assert (newer(tokens()).logits - older).abs().max() < TOLERANCE, stage
        assert (ours(folder) - older).abs().max() < TOLERANCE, stage


def test_we_read_what_transformers_4_writes(tmp_path: Path) -> None:
    in_transformers4("write", str(tmp_path))
    for name in ("llama3", "yarn", "linear", "qwen3", "qwen3-yarn"):
        expected = load_file(tmp_path / f"{name}.logits")["logits"]
        assert expected.std() > 0.1
        assert (ours(tmp_path / name) - expected).abs().max() < TOLERANCE, name
