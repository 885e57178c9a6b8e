"""The notebooks in docs/notebooks do what they say, cell by cell, on a tiny run in place of the quickstart's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modularforge.config import Config
from modularforge.config_files import to_yaml
from tests.conftest import ROOT, THREADS

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def code_of(notebook: Path) -> str:
    """Its code cells, in order; they are kept without outputs, which nobody could compare."""
    values = json.loads(notebook.read_text(encoding="utf-8"))
    assert (values["nbformat"], values["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in values["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    return "\n".join("".join(cell["source"]) for cell in cells)


def run_in(folder: Path, config: Config, notebook: Path) -> str:
    """What it prints in a folder whose quickstart is that config."""
    (folder / "configs").mkdir()
    tiny = config.model_copy(update={"output_dir": "runs/quickstart"})
    (folder / "configs" / "quickstart.yaml").write_text(to_yaml(tiny))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": THREADS}
    words = [sys.executable, "-c", code_of(notebook)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_on_a_run_that_is_there(notebook: Path, finished_run: Config, tmp_path: Path) -> None:
    shutil.copytree(finished_run.output_dir, tmp_path / "runs" / "quickstart")
    shown = run_in(tmp_path, finished_run, notebook)
    assert "runs/quickstart" in shown


@pytest.mark.slow
def test_the_first_notebook_makes_a_run_from_nothing(finished_run: Config, tmp_path: Path) -> None:
    (first,) = [notebook for notebook in NOTEBOOKS if notebook.stem == "first-run"]
    shown = run_in(tmp_path, finished_run, first)
    assert "orth it" in shown
    assert (tmp_path / "runs/quickstart/evaluation/results.json").is_file()
