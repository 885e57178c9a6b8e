"""Validation, evaluation and statistics run in `measuring`, which decides their type on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import run_every_stage, tiny_config
from tests.measured import seen_without_gradients


def test_every_stage_looks_at_its_models_in_the_type_that_measuring_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run", backbone={"steps": 4}, experts={"steps": 4, "statistics_tokens": 512})
    with seen_without_gradients(monkeypatch) as seen:
        run_every_stage(config)
    assert not seen.outside, "\n".join(seen.outside)
    assert seen.inside > 1000
