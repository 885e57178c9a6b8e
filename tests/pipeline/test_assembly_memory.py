"""Assembly takes the same memory whatever the number of experts, and stays under what docs/assembly.md says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.assembly import assemble_once
from checkpoints import Artifact
from modularforge.config import ModelConfig
from tests.synthetic_models import describe, write_parts

# Megabytes. What grows with the number of experts is their manifests: 0.25 MB each were measured.
MOST_MEGABYTES, MOST_GROWTH = 300, 15
COUNTS = (2, 32)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, list[Artifact]]:
    """A backbone and experts of 14 MB each."""
    model = ModelConfig(width=768, layers=3, heads=12, kv_heads=4, ffn_width=2048, context_length=64, tied_head=True)
    return write_parts(tmp_path_factory.mktemp("parts"), model, 8_000, max(COUNTS))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc/self/smaps_rollup")
@pytest.mark.parametrize("router", ["ridge", "evidence"])
def test_peak_anonymous_memory_is_flat_in_the_number_of_experts(
    router: str, parts: tuple[Artifact, list[Artifact]], tmp_path: Path
) -> None:
    backbone, experts = parts
    peaks = []
    for count in COUNTS:
        describe(tmp_path, backbone, experts[:count])
        found = assemble_once(tmp_path, "merge", router, trace=True)
        assert found["bytes"] > count * experts[0].manifest.files["expert.safetensors"].size
        # Growth is read from counted allocations: samples of the kernel's figure may miss the moment of a peak.
        peaks.append(found["traced_mb"])
        assert found["peak_mb"] < MOST_MEGABYTES
    assert peaks[-1] - peaks[0] < MOST_GROWTH, peaks
    # The largest model is many times larger than what is allowed to be in memory.
    assert found["bytes"] / 1e6 > 3 * MOST_MEGABYTES
