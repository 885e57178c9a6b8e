"""A snapshot of code and settings at submission: jobs run what was submitted, however the tree is edited meanwhile.

Its folder, `cluster/frozen/HASH`, and `frozen.json` in it have the names that earlier versions gave them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from launcher.layout import work_folder
from modularforge.config import Config
from modularforge.provenance import FROZEN_NAME, source_commit
from modularforge.settings import to_yaml

PACKAGES = ("modularforge", "launcher", "checkpoints")
ROOT = Path(__file__).resolve().parent.parent
ENTRY_NAME = "run.py"
CONFIG_NAME = "config.yaml"
# `python -m` would put the job's working folder, perhaps the edited tree, before the snapshot.
ENTRY = '''"""Run a module of the code beside this file: python run.py MODULE ARGUMENTS."""
import runpy
import sys

del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
'''


def take_snapshot(config: Config) -> Path:
    """Copy code and settings into the work folder, unless the same lie there; returns their folder."""
    folder = snapshot_folder(config)
    if folder.is_dir():
        return folder
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    for path in _source_files():
        target = scratch / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (scratch / ENTRY_NAME).write_text(ENTRY)
    (scratch / CONFIG_NAME).write_text(to_yaml(config), encoding="utf-8")
    (scratch / FROZEN_NAME).write_text(json.dumps(source_commit()))
    try:
        os.rename(scratch, folder)
    except OSError:  # another launcher took the same at the same time
        shutil.rmtree(scratch)
    return folder


def node_words(python: str, snapshot: Path, group: str, key: str) -> list[str]:
    """The command of a job: the node program of a snapshot, with its settings."""
    entry, settings = str(snapshot / ENTRY_NAME), str(snapshot / CONFIG_NAME)
    return [python, "-u", entry, "launcher.node", group, "--config", settings, "--key", key]


def snapshot_folder(config: Config) -> Path:
    """Named after its content, so that jobs of one code and one config share it."""
    digest = hashlib.sha256(to_yaml(config).encode())
    for path in _source_files():
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return work_folder(config) / "frozen" / digest.hexdigest()[:12]


def _source_files() -> list[Path]:
    """Files of the packages, without compiled ones."""
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*")) if path.is_file()]
    return [path for path in found if "__pycache__" not in path.parts]
