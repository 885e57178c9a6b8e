"""Routers read of an expert's statistics what they use, by ranges, and what they read is compared with hashes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from checkpoints import Artifact, CorruptArtifactError, paths, write_artifact
from modularforge.errors import MismatchError
from modularforge.routing import solvers, statistics
from modularforge.routing.statistics import (
    HEADER_FACT,
    STATISTICS_NAME,
    LayerStatistics,
    RouterStatistics,
    header_hash,
    load_statistics,
    save_statistics,
    stored_statistics,
    token_counts,
)
from modularforge.routing.text_counts import StoredCounts, TextCounts, save_counts
from modularforge.routing.text_evidence import background_of, pair_evidence, token_evidence

WIDTH, LAYERS, VOCABULARY = 24, 3, 1000
OUTER_BYTES, SUM_BYTES, TOKEN_BYTES = 4 * WIDTH**2, 4 * WIDTH, 4 * VOCABULARY


@pytest.fixture
def expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    monkeypatch.setattr(statistics, "READ_WHOLE_BYTES", 1000)
    monkeypatch.setattr("checkpoints.safetensors.USUAL_HEADER_BYTES", 1200)
    return made(str(tmp_path / "expert"), 0)


def made(url: str, seed: int, records: bool = True) -> Artifact:
    draw = np.random.default_rng(seed)
    inputs = [draw.random((10 + layer, WIDTH)) for layer in range(LAYERS)]
    layers = [LayerStatistics(float(len(x_ND)), x_ND.sum(axis=0), x_ND.T @ x_ND) for x_ND in inputs]
    with write_artifact(url, "expert", f"f{seed}") as writer:
        path = writer.folder / STATISTICS_NAME
        save_statistics(
            path, RouterStatistics(layers, draw.integers(0, 9, VOCABULARY).astype(np.float64), draw.random(LAYERS))
        )
        return writer.commit({HEADER_FACT: header_hash(path)} if records else {})


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Names and bytes of what is read."""
    found: list[tuple[str, int]] = []
    original = paths.read_bytes

    def reading(url: str, start: int | None = None, end: int | None = None) -> bytes:
        content = original(url, start, end)
        found.append((url.rpartition("/")[2], len(content)))
        return content

    monkeypatch.setattr(paths, "read_bytes", reading)
    return found


@pytest.mark.parametrize("products", [False, True])
def test_a_solver_reads_the_header_and_the_sums_that_it_uses(expert, read, products: bool) -> None:
    found = stored_statistics(expert, products)
    whole = load_statistics(Path(expert.url) / STATISTICS_NAME)
    assert np.array_equal(found.inverse_rms_L, whole.inverse_rms_L)
    assert sum(size for _, size in read) <= 1200, "one read of the header, before a layer is asked for"
    read.clear()
    layer, other = found.layers[1], whole.layers[1]
    assert (layer.count, len(found.layers)) == (other.count, LAYERS)
    assert np.array_equal(layer.sum_D, other.sum_D)
    assert np.array_equal(layer.outer_DD, other.outer_DD) if products else not layer.outer_DD.size
    assert sum(size for _, size in read) == SUM_BYTES + (OUTER_BYTES if products else 0)


def test_token_counts_are_read_alone(expert, read) -> None:
    found = token_counts(expert)
    assert np.array_equal(found, load_statistics(Path(expert.url) / STATISTICS_NAME).tokens_V)
    assert sum(size for _, size in read) <= 1200 + TOKEN_BYTES


def test_rows_solved_from_ranges_are_those_of_whole_files(tmp_path: Path, monkeypatch) -> None:
    experts = [made(str(tmp_path / f"expert-{seed}"), seed) for seed in range(3)]
    older = [made(str(tmp_path / f"older-{seed}"), seed, records=False) for seed in range(3)]
    monkeypatch.setattr(statistics, "READ_WHOLE_BYTES", 1000)
    for products, solve in ((True, lambda sums: solvers.ridge(sums, 0.1, 1.0)), (False, lambda s: solvers.means(s, 1))):
        one, other = (
            solve(item.layers[1] for item in solvers.all_statistics(parts, products)) for parts in (experts, older)
        )
        assert np.array_equal(one, other)


@pytest.mark.parametrize("where", ["scalars", "sum", "tokens"])
def test_a_flipped_byte_in_what_is_read_is_found(expert, where: str) -> None:
    file = Path(expert.url) / STATISTICS_NAME
    content = bytearray(file.read_bytes())
    place = {"scalars": content.index(b"10.0"), "sum": content.index(b"layers.0.sum"), "tokens": len(content) - 2}[
        where
    ]
    if where == "sum":
        place = len(content) - TOKEN_BYTES - 2  # of the last layer's
    content[place] ^= 1
    file.write_bytes(content)
    read = {
        "scalars": lambda: stored_statistics(expert, False),
        "sum": lambda: stored_statistics(expert, False).layers[LAYERS - 1],
        "tokens": lambda: token_counts(expert),
    }[where]
    with pytest.raises((CorruptArtifactError, MismatchError), match=r"statistics\.safetensors must have the"):
        read()


def test_statistics_that_are_missing_their_hash_or_small_are_read_whole(tmp_path: Path, read) -> None:
    small = stored_statistics(made(str(tmp_path / "small"), 0), False)
    assert small.tokens_V.size == 0
    assert read == [], "mapped, behind a comparison of the whole file"


def test_counts_of_experts_are_read_when_they_are_used(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    texts, stored = [], []
    for number in range(4):
        keys = np.unique(draw.integers(0, 50**2, 200))
        counts = TextCounts(
            draw.integers(0, 90, 50).astype(np.float64), keys, draw.integers(1, 9, len(keys)).astype(np.float32)
        )
        save_counts(tmp_path / str(number), counts)
        texts.append(counts)
        stored.append(StoredCounts(tmp_path / str(number)))
    assert all(not isinstance(value, np.ndarray) for item in stored for value in vars(item).values())
    assert np.array_equal(token_evidence(texts, neutral=[3]), token_evidence(stored, neutral=[3]))
    one, other = (pair_evidence(counts, None, [3], 100) for counts in (texts, stored))
    for name in ("token_VE", "context_VE", "keys_P", "pair_PE"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    naive_V = np.mean([item.tokens_V / item.tokens_V.sum() for item in texts], axis=0) + 0.1 / min(
        item.tokens_V.sum() for item in texts
    )
    assert np.array_equal(background_of(texts, None), naive_V / naive_V.sum()), "to the bit"
