"""Data that four nodes prepare: of a task or a node that dies only its share is made again, to the same bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints import open_artifact
from modularforge.config import Config
from tests.cluster.conftest import Launched
from tests.cluster.slurm import wait_for

# Before the python of a job: the first start of share 1 is killed at once, or sleeps until its node dies.
CONTAINER = """
case " $* " in *" tokenise --index 1 "*)
    if [ -z "$SLURM_RESTART_COUNT" ] || [ "$SLURM_RESTART_COUNT" = 0 ]; then
        touch {held}
        {dies}
    fi
esac
shift
exec {python} "$@"
"""


@pytest.mark.parametrize("victim", ["task", pytest.param("node", marks=pytest.mark.slow)])
def test_only_the_share_of_what_died_is_made_again(
    new_run: Callable[..., Launched], finished_run: Config, tmp_path: Path, victim: str
) -> None:
    script, held = tmp_path / "container.sh", tmp_path / "held"
    dies = "kill -9 $$" if victim == "task" else "exec sleep 600"
    script.write_text(CONTAINER.format(held=held, dies=dies, python=sys.executable))
    run = new_run(cluster={"prepare_tasks": 4, "container": f"bash {script}"})
    run.submit()
    wait_for(held.exists, "share 1 has begun", 120)
    for index in (0, 2, 3):
        run.wait_for_artifact(f"data-parts/tokenise-{index}")
    if victim == "node":
        node = run.events("tokenise-1", "started")[0]["nodes"]
        run.cluster.crash(node)
        try:
            wait_for(lambda: len(run.events("tokenise-1", "started")) == 2, "share 1 starts again", 180)
        finally:
            run.cluster.start_node(node)
    run.wait_for_artifact("data", 240)
    starts = [len(run.events(f"tokenise-{index}", "started")) for index in range(4)]
    assert starts == [1, 2, 1, 1]
    made, expected = (open_artifact(f"{folder}/data").manifest for folder in (run.folder, finished_run.output_dir))
    assert made.files == expected.files
    assert made.fingerprint == expected.fingerprint
    assert run.rows()["tokenise-1"]["state"] == "committed"
