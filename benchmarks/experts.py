"""Ten thousand experts: what their run asks of a real S3 server and a real Slurm (requests, seconds, bytes, memory).

    python benchmarks/experts.py --experts 10000                    # with the tests' own server and cluster
    python benchmarks/experts.py --experts 10000 --url s3://bucket/benchmark      # on a store of yours

Experts, backbone and partitions are fakes of a few kilobytes (what is measured grows with their number, not their
size); jobs are submitted held, so that none starts. Each command is a process of its own; its requests are counted
where they leave it, by botocore.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoints import paths  # noqa: E402
from checkpoints.parallel import in_order  # noqa: E402
from launcher.record import new_record, save_record  # noqa: E402
from modularforge.config import Config  # noqa: E402
from modularforge.config_files import load_config, to_yaml  # noqa: E402
from modularforge.provenance import commit, making  # noqa: E402
from modularforge.run import Run  # noqa: E402
from tests.storage.server import start_server  # noqa: E402
from tests.synthetic_models import fill_backbone, fill_expert  # noqa: E402

VOCABULARY = 64
SHAPE = ("width=8", "layers=1", "heads=1", "kv_heads=1", "ffn_width=8", "context_length=16")
COUNTING = """
import atexit, json, os, resource, runpy, sys, time
from collections import Counter
import botocore.endpoint as endpoint
counts, sizes = Counter(), Counter()
original = endpoint.Endpoint._send
def send(self, request):
    kind = "LIST" if "list-type" in request.url else request.method
    counts[kind] += 1
    answer = original(self, request)
    sizes[kind] += int(answer.headers.get("Content-Length") or 0) if kind in ("GET", "LIST") else 0
    return answer
endpoint.Endpoint._send = send
def tell():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found = {"requests": counts, "bytes": sum(sizes.values()), "cpu": usage.ru_utime + usage.ru_stime,
             "memory": usage.ru_maxrss * 1024, "seconds": time.perf_counter() - start}
    open(os.environ["COUNTS"], "w").write(json.dumps(found))
atexit.register(tell)
start = time.perf_counter()
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=10_000)
    parser.add_argument("--url", default="", help="a store of yours, with credentials in the AWS variables")
    parser.add_argument("--no-cluster", action="store_true", help="leave Slurm out")
    parser.add_argument(
        "--assemble", help="assemble alone, the run of this file of settings: what the measurement calls"
    )
    options = parser.parse_args()
    if options.assemble:
        Run(load_config(options.assemble)).make("assemble")
        return
    with tempfile.TemporaryDirectory(prefix="mf-experts-") as name, store(Path(name), options.url) as root:
        config = settings(f"{root}/run", options.experts)
        file = Path(name) / "run.yaml"
        file.write_text(to_yaml(config))
        measure(Path(name), config, ["--config", str(file)], not options.no_cluster)


@contextmanager
def store(folder: Path, url: str) -> Iterator[str]:
    os.environ["MODULARFORGE_CACHE"] = str(folder / "cache")
    if url:
        yield url
        paths.remove(url)
        return
    server = start_server(folder)
    os.environ.update(server.environment())
    paths.store_of("s3://x")._client.create_bucket(Bucket="experts")  # type: ignore[union-attr]
    try:
        yield "s3://experts"
    finally:
        server.stop()


def settings(output: str, experts: int) -> Config:
    changes = [f"experts.count={experts}", "partition.method=random", "evaluation.baselines=[]"]
    changes += ["experts.anchored=false", "assembly.router=means", "assembly.mode=link"]
    changes += [f"model.{value}" for value in SHAPE]
    changes.append("cluster.sbatch_options={hold: true}")
    return load_config(str(ROOT / "configs/quickstart.yaml"), changes, output_dir=output)


def measure(folder: Path, config: Config, options: list[str], has_cluster: bool) -> None:
    experts = config.experts.count
    say(
        f"{experts:,} experts: data, partitions and backbone",
        *pretend(config, ["prepare-data", "partition", "backbone"]),
    )
    if not has_cluster:  # the commands look for what was launched
        save_record(config, new_record(config))
    else:
        from benchmarks.cluster import cluster

        with cluster(True, most_jobs=4 * experts) as environment:
            launch = ["launcher", *options, "--cluster", "--no-preflight"]
            command(folder, "submitted, held", launch, environment)
            command(folder, "the same again, attaching", launch, environment)
            command(folder, "status while they wait", ["launcher", "status", *options], environment)
            command(folder, "cancelled", ["launcher", "cancel", *options], environment)
    say("every expert", *pretend(config, ["expert"]))
    status = "status of a run whose experts are finished"
    command(folder, status, ["launcher", "status", *options], goal=experts // 100 + 10)
    command(folder, "assembled by links", ["benchmarks.experts", "--assemble", options[1]])
    command(folder, "garbage looked for", ["checkpoints", "gc", config.output_dir])
    start = time.perf_counter()
    paths.remove(f"{config.output_dir}/assembled")
    say("assembled model removed", time.perf_counter() - start, 0)


def pretend(config: Config, stages: list[str]) -> tuple[float, int]:
    """Commit fakes of these stages; returns seconds and the bytes of the largest manifest."""
    start, run, largest = time.perf_counter(), Run(config), 0
    backbone = None if "backbone" in stages else run.require("backbone")
    lock = threading.Lock()

    def make(stage: str, index: int | None) -> int:
        with lock:  # a Run is of one thread
            plan = run.plan(stage, index)
        with making(plan) as writer:
            facts = {}
            for number in range(config.experts.count if stage == "partition" else 0):
                (writer.folder / f"partition-{number}.tokens.bin").write_text(str(number))
            if stage == "backbone":
                facts = fill_backbone(writer, config.model, VOCABULARY)
            if backbone is not None:
                facts = fill_expert(writer, backbone, config.model, VOCABULARY, index or 0)
            return len(commit(writer, plan, run, facts).manifest.to_json())

    for stage in stages:
        indices = range(config.experts.count) if stage == "expert" else [None]
        largest = max(largest, *in_order(partial(make, stage), indices, 16))
    return time.perf_counter() - start, largest


def command(
    folder: Path, title: str, arguments: list[str], environment: dict[str, str] | None = None, goal: int = 0
) -> None:
    """Run a command in a process of its own, and say what it took, beside the most requests that are the goal."""
    script, counts = folder / "counting.py", folder / "counts.json"
    script.write_text(COUNTING)
    given = {**os.environ, **(environment or {}), "COUNTS": str(counts), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), *arguments], cwd=folder, env=given, capture_output=True, text=True
    )
    if done.returncode:
        print(f"{title}: ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-600:]}", flush=True)
        return
    found = json.loads(counts.read_text())
    requests = ", ".join(f"{count:,} {kind}" for kind, count in found["requests"].items())
    print(
        f"{title}: {found['seconds']:.1f} s, {found['cpu']:.1f} s of processor, {found['memory'] / 1e6:,.0f} MB, "
        f"{sum(found['requests'].values()):,} requests ({requests}){f', goal {goal:,}' if goal else ''}, "
        f"{found['bytes'] / 1e6:.1f} MB read",
        flush=True,
    )


def say(title: str, seconds: float, largest: int) -> None:
    more = f", the largest manifest {largest / 1e6:.2f} MB" if largest else ""
    print(f"{title}: {seconds:.1f} s{more}", flush=True)


if __name__ == "__main__":
    main()
