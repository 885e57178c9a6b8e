"""One finished tiny speech run that many tests read, and the sounds that it was trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from modularforge.config import Config
from tests.speech.runs import run_all, speech_config


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sounds")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, sounds: Path) -> Config:
    """A finished run; tests must not change it."""
    config = speech_config(tmp_path_factory.mktemp("speech") / "run", sounds)
    run_all(config)
    return config
