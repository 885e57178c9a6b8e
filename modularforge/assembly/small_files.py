"""Tokenizer and generation settings, which every model of a run shares."""

from __future__ import annotations

from pathlib import Path

from checkpoints import Artifact
from modularforge.model.hub_config import GENERATION_NAME, TOKENIZER_FILES


def copy_text_files(backbone: Artifact, folder: Path) -> None:
    """Copy those that the backbone has into a model folder."""
    for name in (GENERATION_NAME, *TOKENIZER_FILES):
        if name in backbone.manifest.files:
            (folder / name).write_bytes(backbone.read_bytes(name))
