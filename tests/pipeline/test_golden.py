"""Every artifact keeps its bytes and its fingerprint; `python -m tests.golden --accept` records a change on purpose."""

from __future__ import annotations

import pytest

from tests import golden

EVERY_TIME = ("quickstart", golden.ANCHORED, golden.FIFTY_STEPS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in EVERY_TIME else pytest.mark.slow) for name in golden.NAMES]
)
def test_artifacts_keep_their_bytes_and_their_fingerprints(name: str) -> None:
    record = golden.recorded()
    is_same_machine = record["machine"] == golden.machine()
    found = golden.differences(name, golden.computed(name), record["runs"][name], is_same_machine)
    assert not found, "\n".join(
        [*found, "accept on purpose with `python -m tests.golden --accept` and a CHANGELOG line"]
    )
