"""What submitting costs: seconds and Slurm calls for many experts, and the wall time of a run not spent in its stages.

    python benchmarks/cluster.py submit --experts 1000      # on a login node, or with the tests' cluster: --local
    python benchmarks/cluster.py overhead --local

`submit` prepares a run whose data and backbone look finished, launches it, counts the calls of Slurm's programs, and
cancels it. `overhead` runs the smoke test from launch to evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("sbatch", "squeue", "scontrol", "scancel", "srun", "sacct", "sinfo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["submit", "overhead"])
    parser.add_argument("--experts", type=int, default=1000)
    parser.add_argument("--local", action="store_true", help="start the Slurm of tests/cluster on this machine")
    options = parser.parse_args()
    with cluster(options.local) as environment, tempfile.TemporaryDirectory() as folder:
        if options.what == "submit":
            submit(Path(folder), options.experts, environment)
        else:
            overhead(Path(folder), environment)


@contextmanager
def cluster(local: bool, most_jobs: int = 5000) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's programs find the cluster."""
    if not local:
        yield dict(os.environ)
        return
    sys.path.insert(0, str(ROOT))
    from tests.cluster.slurm import Cluster, remove

    folder = Path(tempfile.mkdtemp(prefix="mf-bench-"))
    found = Cluster(folder / "c", cpus=8, max_array_size=1001, most_jobs=most_jobs)
    try:
        found.start()
        yield found.environ
    finally:
        found.stop()
        remove(folder)


def submit(folder: Path, experts: int, environment: dict[str, str]) -> None:
    pretend_prepared(folder / "run", experts)
    tools = folder / "tools"
    tools.mkdir()
    for name in PROGRAMS:  # each call of a program is a line in a file
        script = f'#!/bin/bash\necho {name} >> {folder}/calls\nexec "$(PATH=${{PATH#*:}} type -P {name})" "$@"\n'
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    counted = {**environment, "PATH": f"{tools}:{environment['PATH']}"}
    options = ["--config", str(folder / "run.yaml")]
    seconds = timed([*options, "--cluster", "--no-preflight"], counted)
    calls = (folder / "calls").read_text().split()
    print(f"{experts} experts submitted in {seconds:.2f} s with {len(calls)} Slurm calls: {' '.join(calls)}")
    (folder / "calls").unlink()
    seconds = timed([*options, "--cluster", "--no-preflight"], counted)
    calls = (folder / "calls").read_text().split()
    print(f"the same again, attaching: {seconds:.2f} s with {len(calls)} Slurm calls")
    timed(["cancel", *options], environment)


def overhead(folder: Path, environment: dict[str, str]) -> None:
    options = ["--config", str(ROOT / "configs/quickstart.yaml"), "--smoke-test", "-o", str(folder / "run")]
    sizes = ["--set", "cluster.backbone.cpus=1", "--set", "cluster.expert.cpus=1", "--set", "cluster.other.cpus=1"]
    start = time.perf_counter()
    timed(["--cluster", "--no-preflight", *options, *sizes], environment)
    timed(["wait", *options], environment)
    wall = time.perf_counter() - start
    lines = [json.loads(line) for line in (folder / "run" / "jobs.jsonl").read_text().splitlines()]
    busy = covered([(first["time"], last["time"]) for first, last in _spans(lines)])
    print(f"{wall:.1f} s from launch to the end of `wait`, {busy:.1f} s of it in stages: {wall - busy:.1f} s overhead")


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, end = 0.0, 0.0
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def _spans(lines: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    started: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["event"] == "started":
            started[line["job"]] = line
        elif line["event"] == "ended":
            yield started.pop(line["job"]), line


def timed(arguments: list[str], environment: dict[str, str]) -> float:
    """Seconds that a launcher command takes."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{arguments} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start


def pretend_prepared(output: Path, experts: int) -> None:
    """Commit data, partitions and a backbone without content, and write the settings beside the run."""
    from modularforge.config_files import load_config, to_yaml
    from modularforge.provenance import commit, making
    from modularforge.run import Run

    changes = [f"experts.count={experts}", "partition.method=random", "evaluation.baselines=[]"]
    changes.append("cluster.sbatch_options={hold: true}")  # what is measured is the launcher, not the start of jobs
    config = load_config(str(ROOT / "configs/quickstart.yaml"), changes, output_dir=str(output))
    for stage in ("prepare-data", "partition", "backbone"):
        plan = Run(config).plan(stage)
        with making(plan) as writer:
            for number in range(experts if stage == "partition" else 0):
                (writer.folder / f"partition-{number}.tokens.bin").write_text(str(number))
            commit(writer, plan, Run(config), {})
    output.with_suffix(".yaml").write_text(to_yaml(config))


if __name__ == "__main__":
    main()
