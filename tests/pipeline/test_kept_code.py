"""A command that runs for hours has the code that it began with, whatever `git pull` writes meanwhile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from modularforge.kept_code import PACKAGES, keep_code
from tests.conftest import ROOT

NEWER = "raise RuntimeError('this is the code that was pulled')\n"
SMOKE = ("-m", "modularforge", "run-all", "--config", "configs/quickstart.yaml", "--smoke-test", "--output-dir", "run")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for package in (*PACKAGES, "configs"):
        leave = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=leave, symlinks=True)
    return tmp_path


def pull(clone: Path) -> None:
    for path in (path for package in PACKAGES for path in (clone / package).rglob("*.py")):
        path.write_text(NEWER)


def run(clone: Path, *words: str, until: str = "", then: Callable[[Path], None] = pull) -> tuple[int, str]:
    """Run a program in a clone, in which something is done once a line of it has some words."""
    variables = os.environ | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    program = subprocess.Popen(
        [sys.executable, *words], cwd=clone, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert program.stdout
    lines: list[str] = []
    with program:
        for line in program.stdout:
            lines.append(line)
            if until and until in line:
                then(clone)
                until = ""
    return program.returncode, "".join(lines)


def test_a_run_goes_on_while_its_clone_is_pulled(clone: Path) -> None:
    code, said = run(clone, *SMOKE, until="part 1 of")
    assert code == 0, said
    assert "the code that was pulled" not in said
    assert (clone / "run" / "evaluation" / "results.json").is_file()
    code, said = run(clone, "-m", "modularforge", "--version")
    assert code == 1
    assert "the code that was pulled" in said, "a new command has the new code"


KEEP = """
import sys
from pathlib import Path
from modularforge.kept_code import keep_code
assert "torch" not in sys.modules
keep_code(); keep_code()
for path in Path().rglob("*.py"):
    path.write_text("raise RuntimeError('pulled')")
assert "torch" not in sys.modules, "keeping the code is no reason to load torch"
import inspect
import launcher.layout, modularforge.observe.table as table
import importlib.resources
print(table.__file__, inspect.getsource(table.count).startswith("def count("))
print(importlib.resources.files("modularforge").joinpath("observe/page.html").is_file())
try:
    import modularforge.not_there
except ModuleNotFoundError:
    print("missing as ever")
"""


def test_modules_that_were_kept_are_ordinary_ones(clone: Path) -> None:
    code, said = run(clone, "-c", KEEP)
    assert code == 0, said
    place = clone / "modularforge" / "observe" / "table.py"
    assert said.splitlines() == [f"{place} True", "True", "missing as ever"]


def test_code_is_kept_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "kept_code" not in str(finder)])
    before = len(sys.meta_path)
    keep_code(tmp_path)
    keep_code(tmp_path)
    assert len(sys.meta_path) == before + 1
