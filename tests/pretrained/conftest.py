"""A cache of their own for all tests here: hashes of files and fetched models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODULARFORGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
