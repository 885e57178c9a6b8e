"""The files that README.md, CONTRIBUTING.md and the pages of docs/ name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

NAMED = re.compile(r"`((?:modularforge|launcher|checkpoints|tests|docs|configs|slurm|benchmarks)/[\w./-]*)`")
PAGES = ("CONTRIBUTING.md", "README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
NAMES_NONE = (
    "docs/settings.md",
    "docs/troubleshooting.md",
    "docs/observing.md",
    "docs/study.md",
    "docs/text.md",
    "docs/log.md",
)


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_names_are_there(page: str) -> None:
    named = set(NAMED.findall((ROOT / page).read_text(encoding="utf-8")))
    assert named or page in NAMES_NONE, "a page that names nothing is read wrongly"
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_every_change_names_a_file_of_the_library_and_a_test() -> None:
    rows = [line for line in Path(ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| ")]
    changes = [row.split(" | ") for row in rows[1:]]
    assert len(changes) >= 10
    for change, files, tests in changes:
        assert NAMED.search(files), change
        assert "`tests/" in tests, change
