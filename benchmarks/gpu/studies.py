"""Slices c and d: studies, trained until the time is over and gone on with in the next call.

What they train lies in OUTPUT/study-SLICE, of which the next call on the same machine goes on; the result is the table.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.gpu.parts import Part, Values
from modularforge.config_files import SMOKE_TEST
from modularforge.study.runs import Runs
from modularforge.study.study_file import load_study

FILES = {"c": "benchmarks/gpu/study.yaml", "d": "benchmarks/gpu/smollm2.yaml"}
NAMES = {"c": "study-40M", "d": "smollm2"}
TO_STOP = 45.0
"""Seconds of a call in which a training writes its checkpoint and leaves."""
SUFFIX = "-smoke-test"


def study_parts(name: str, folder: Path, tiny: bool) -> list[Part]:
    """The one part of such a slice."""
    return [Part(name, NAMES[name], partial(go_on, name, folder, tiny), 120)]


def root(name: str, folder: Path) -> Path:
    """Where a slice's study lies; a tiny one beside it."""
    return folder / f"study-{name}"


def go_on(name: str, folder: Path, tiny: bool, seconds: float) -> Values | None:
    """Train and measure until the time is over; the table when all is done."""
    end = time.monotonic() + seconds - TO_STOP
    command = [sys.executable, "-m", "modularforge", "study", FILES[name], "--output-dir", str(root(name, folder))]
    command += settings(name, folder, tiny)  # which may make a model first
    if not ended(command, end - time.monotonic()):
        return None
    table = Path(f"{root(name, folder)}{SUFFIX if tiny else ''}") / "table-validation"
    return {"table": json.loads(table.with_suffix(".json").read_text()), "text": table.with_suffix(".md").read_text()}


def ended(command: list[str], seconds: float) -> bool:
    """Whether a command ended well in time; else it was told to stop and has. Raises where it failed by itself."""
    with subprocess.Popen(command) as process:
        try:
            status = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            return False
    if status:
        raise subprocess.CalledProcessError(status, command)
    return True


def settings(name: str, folder: Path, tiny: bool) -> list[str]:
    """What is changed of a study's file for a CPU; the pretrained model of d is then a backbone of seconds."""
    if not tiny:
        return []
    return ["--smoke-test", *(word for change in changes(name, folder) for word in ("--set", change))]


def changes(name: str, folder: Path) -> list[str]:
    """What a smoke test changes, in front of the study's own settings, which outrank it."""
    wanted = {f"{section}.{key}": value for section, values in SMOKE_TEST.items() for key, value in values.items()}
    if name == "c":
        wanted |= {"data.max_documents_per_source": 8, "evaluation.tokens_per_domain": 512, "calibration.steps": 2}
    else:
        wanted = {key: value for key, value in wanted.items() if not key.startswith(("model.", "backbone.", "data."))}
        wanted |= {"model": None, "model.pretrained": tiny_model(folder), "model.context_length": 64}
    return [f"{key}={'null' if value is None else value}" for key, value in wanted.items()]


def tiny_model(folder: Path) -> Path:
    """A folder in Hugging Face's format that is made in seconds."""
    made = folder / "model" / "backbone"
    if not (made / "config.json").is_file():
        for stage in ("prepare-data", "backbone"):
            command = [sys.executable, "-m", "modularforge", stage, "--smoke-test", "--output-dir"]
            subprocess.run([*command, str(folder / "model")], check=True)
    return made


def pack(folder: Path, chosen: list[str], tiny: bool) -> None:
    """Tokenise the texts of the studies, which is then done; the folders to carry are printed."""
    for name in (name for name in chosen if name in FILES):
        words = tuple(changes(name, folder)) if tiny else ()
        runs = Runs(load_study(FILES[name], str(root(name, folder))), tiny, words)
        for recipe in runs.study.recipes:
            runs.run(runs.study.seeds[0], recipe).obtain("prepare-data")
        data = Path(runs.root) / "data"
        size = sum(file.stat().st_size for file in data.rglob("*") if file.is_file())
        print(f"{data}: {size / 1e6:.0f} MB to carry")
