"""Upload a speech model of a run to the Hub; an expert is made a whole model, with its backbone's projector, first."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import Artifact, find_artifact
from checkpoints.screen import say
from modularforge.config import Config
from modularforge.model.hub_config import TOKENIZER_FILES
from modularforge.run import Run
from modularforge.speech.folder import parts_in, read_speech_config, save_speech
from modularforge.speech.hub import push_speech, speech_folder


def push(load_settings: Callable[[], Config], name: str, model: str | None, is_private: bool) -> None:
    """Upload a model folder, an expert's, or the run's assembled model; raises DataError, StoreError."""
    artifact = find_artifact(model) if model else Run(load_settings()).require("assemble")
    if artifact is not None and artifact.manifest.kind == "expert":
        with tempfile.TemporaryDirectory(prefix="modularforge-expert-") as scratch:
            write_expert(Run(load_settings()), artifact, Path(scratch))
            push_speech(Path(scratch), name, is_private)
    else:
        push_speech(artifact.local_folder() if artifact else speech_folder(str(model)), name, is_private)
    say(f"uploaded: {name}")


def write_expert(run: Run, expert: Artifact, folder: Path) -> None:
    """An expert's own model as a folder of its own."""
    model: Any = run.backbone.expert(expert)
    backbone = run.require("backbone").local_folder()
    save_speech(model, parts_in(backbone), folder, read_speech_config(backbone)["features"])
    for token_file in TOKENIZER_FILES:
        if (backbone / token_file).is_file():
            (folder / token_file).write_bytes((backbone / token_file).read_bytes())
