"""The fault campaign: slow tests that compare with one undisturbed run; what was done is counted at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import KILLS, Run, values


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.faults)
            item.add_marker(pytest.mark.timeout(3600))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not KILLS:
        return
    terminalreporter.section("what was done, and to which stage")
    for (where, stage, what), count in sorted(KILLS.items()):
        terminalreporter.write_line(f"{count:5d}  {what:22} {where:10} {stage}")
    totals: Counter[str] = Counter()
    for (_, _, what), count in KILLS.items():
        totals[what] += count
    terminalreporter.write_line(", ".join(f"{count} {what}" for what, count in sorted(totals.items())))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run, undisturbed."""
    place = tmp_path_factory.mktemp("reference") / "run"
    run = Run(values(place), place)
    assert run.finish("run-all") == 0, run.said()
    return run


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Run]:
    """A run that was never started."""

    def make(name: str = "run", **changes: Any) -> Run:
        return Run(values(tmp_path / name, **changes), tmp_path / name)

    return make
