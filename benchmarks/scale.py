"""Thousands of GPUs on paper, and what of this design breaks first: tables and figures of docs/thousands.md.

    python benchmarks/scale.py results --figures docs/thousands     # simulations: about two minutes of one core
    python benchmarks/scale.py limits --experts 10000               # small real measurements on this machine

`results` simulates published runs, then 30 days of work as one synchronous job, as independent experts of a node each,
and as a backbone with experts behind it. `limits` plans and prepares a run of many experts, and counts what commands
and jobs ask of an S3 server (the tests' own, on the loopback interface).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import tokenise  # noqa: E402
from checkpoints import find_artifact, paths  # noqa: E402
from launcher.events import append_event, progress_of, read_all_events  # noqa: E402
from launcher.plan import describe_plan  # noqa: E402
from launcher.published import (  # noqa: E402
    HARDWARE_SHARE,
    LLAMA_3_GPUS,
    LLAMA_3_RATE,
    LLAMA_3_STATE,
    LLAMA_3_STORE,
    RESTART,
    byterobust,
    ft_hsdp,
    llama_3,
)
from launcher.simulation import DAY, HOUR, Cluster, Fault, Job, Outcome, simulate  # noqa: E402
from launcher.tasks import build_tasks, finished_tasks  # noqa: E402
from modularforge.config import Config  # noqa: E402
from modularforge.config_files import load_config  # noqa: E402
from modularforge.cost import disk_bytes, flops_of_jobs, size, trained_parameters  # noqa: E402
from modularforge.data.partition import random_partitions  # noqa: E402
from modularforge.data.token_files import TokenFileWriter, open_token_file  # noqa: E402
from modularforge.provenance import commit, making  # noqa: E402
from modularforge.run import Run  # noqa: E402
from tests.storage.proxy import Fault as Answer  # noqa: E402
from tests.storage.proxy import FaultProxy, Request  # noqa: E402
from tests.storage.server import start_server  # noqa: E402

SIZES = (64, 256, 1024, 4096, 16384)
TABLED = (64, 1024, 16384)
WORK, BACKBONE_SHARE, NODE = 30 * DAY, 0.2, 8
START, PAUSE, REQUESTS = 120.0, 2.0, 20
EXPERT_STATE, BACKBONE_WEIGHTS = 1.6e9 * 14, 7e9 * 2
LATENCY = 0.02
"""Seconds that an object store takes for a small answer: the order of what S3 takes; here a proxy waits so long."""
Phases = list[list[Job]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["results", "limits"])
    parser.add_argument("--figures", type=Path, help="folder for the figures; without it there are none")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--experts", type=int, default=10_000)
    options = parser.parse_args()
    if options.what == "results":
        results(options.figures, options.seeds)
    else:
        limits(options.experts)


def results(figures: Path | None, seeds: int) -> None:
    published(seeds)
    base = {gpus: arrangements(cluster_of(gpus), seeds, plans(gpus)) for gpus in SIZES}
    print_table("base", base)
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        draw(base, figures / "goodput.svg")
        draw_published(figures / "llama3.svg", seeds)
    for name, change in VARIANTS.items():
        print_table(name, {gpus: arrangements(change(cluster_of(gpus)), 3, two_plans(gpus)) for gpus in TABLED})
    hourly = {gpus: arrangements(cluster_of(gpus), 3, two_plans(gpus, every=HOUR)) for gpus in TABLED}
    print_table("a checkpoint an hour", hourly)


def cluster_of(gpus: int) -> Cluster:
    """Llama 3's failures, 10 minutes for each, and its store's share for so many GPUs."""
    hardware = Fault("hardware", LLAMA_3_RATE * HARDWARE_SHARE, (RESTART, RESTART), gives_up="node")
    other = Fault("software", LLAMA_3_RATE * (1 - HARDWARE_SHARE), (RESTART, RESTART))
    store = LLAMA_3_STORE * gpus / LLAMA_3_GPUS
    spare = math.ceil(gpus / 50 / NODE) * NODE
    return Cluster(gpus, (hardware, other), spare, NODE, DAY, 0.0, START, store, 3500.0, 1e9)


def with_stragglers(cluster: Cluster) -> Cluster:
    """One slow GPU for twenty that fail: 0.8 of its speed until it is found after three hours."""
    slow = Fault("straggler", LLAMA_3_RATE / 20, (3 * HOUR, 3 * HOUR), slows_to=0.8)
    return replace(cluster, faults=(*cluster.faults, slow))


def preemptible(cluster: Cluster) -> Cluster:
    """Each node is taken away every twelve days, with a warning; a job waits half an hour for its place."""
    taken = Fault("preemption", 0.01 / 24, (START, START), is_warned=True, gives_up="all")
    return replace(cluster, faults=(*cluster.faults, taken), queue=1800.0)


VARIANTS: dict[str, Callable[[Cluster], Cluster]] = {"stragglers": with_stragglers, "preemptible": preemptible}


def plans(gpus: int, every: float | None = None) -> dict[str, Phases]:
    """The same work three times: one job; experts of one node; a fifth of it as one job, then experts."""

    def one(share: float) -> Job:
        size = LLAMA_3_STATE * gpus / LLAMA_3_GPUS
        return Job("one", gpus, WORK * share, PAUSE, every, size, 0.0, REQUESTS, in_background=True)

    def experts(share: float) -> list[Job]:
        job = Job("", NODE, WORK * share, PAUSE, every, EXPERT_STATE, BACKBONE_WEIGHTS, REQUESTS, in_background=True)
        return [replace(job, name=f"expert-{number}") for number in range(gpus // NODE)]

    return {
        "one job": [[one(1.0)]],
        "experts": [experts(1.0)],
        "backbone, experts": [[one(BACKBONE_SHARE)], experts(1 - BACKBONE_SHARE)],
    }


def two_plans(gpus: int, every: float | None = None) -> dict[str, Phases]:
    """Without the one in two phases."""
    return {name: phases for name, phases in plans(gpus, every).items() if len(phases) == 1}


def arrangements(cluster: Cluster, seeds: int, arranged: dict[str, Phases]) -> dict[str, list[Outcome]]:
    return {name: [simulate(cluster, phases, seed) for seed in range(seeds)] for name, phases in arranged.items()}


def print_table(title: str, found: dict[int, dict[str, list[Outcome]]]) -> None:
    print(f"\n{title}\n")
    print("| GPUs | arrangement | goodput | days to the last result | to 99 % of the jobs | GPU-hours lost | stops |")
    print("|---|---|---|---|---|---|---|")
    for gpus, by_name in found.items():
        for name, outcomes in by_name.items():
            days = [outcome.seconds / DAY for outcome in outcomes]
            most = [outcome.seconds_of(0.99) / DAY for outcome in outcomes]
            lost = [outcome.lost_gpu_hours for outcome in outcomes]
            stops = fmean(outcome.stops for outcome in outcomes)
            share = spread([100 * outcome.goodput for outcome in outcomes], 2)
            figures = [f"{share} %", spread(days, 2), spread(most, 2), spread(lost, 0), f"{stops:,.0f}"]
            cells = [f"{gpus:,}", name, *figures]
            print(f"| {' | '.join(cells)} |", flush=True)


def spread(values: Iterable[float], digits: int) -> str:
    """Mean and standard deviation."""
    found = list(values)
    return f"{fmean(found):,.{digits}f} ± {stdev(found):,.{digits}f}"


def published(seeds: int) -> None:
    print("| run | published | simulated | stops a day |\n|---|---|---|---|")
    for said, (cluster, job) in (("> 90 %", llama_3()), ("97 %", byterobust()), ("44 %", ft_hsdp())):
        outcomes = [simulate(cluster, [[job]], seed) for seed in range(seeds)]
        share = spread([100 * outcome.goodput for outcome in outcomes], 1)
        print(f"| {job.name} | {said} | {share} % | {fmean(o.stops / o.seconds * DAY for o in outcomes):.1f} |")


def draw(base: dict[int, dict[str, list[Outcome]]], path: Path) -> None:
    """Goodput, days and lost GPU-hours by number of GPUs."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    measures: list[tuple[str, Callable[[Outcome], float]]] = [
        ("goodput, %", lambda outcome: 100 * outcome.goodput),
        ("days to the last result", lambda outcome: outcome.seconds / DAY),
        ("GPU-hours lost, % of the work", lambda outcome: outcome.lost_gpu_hours * HOUR / _useful(outcome) * 100),
    ]
    for axis, (title, measure) in zip(axes, measures, strict=True):
        for name in base[SIZES[0]]:
            values = [[measure(outcome) for outcome in base[gpus][name]] for gpus in SIZES]
            axis.errorbar(SIZES, list(map(fmean, values)), list(map(stdev, values)), marker="o", capsize=3, label=name)
        axis.set(xscale="log", title=title, xlabel="GPUs", xticks=SIZES, xticklabels=[f"{gpus:,}" for gpus in SIZES])
        axis.minorticks_off()
        axis.tick_params("x", labelrotation=45)
        axis.grid(alpha=0.3)
    axes[0].legend()
    _save(figure, path)


def draw_published(path: Path, seeds: int) -> None:
    """Llama 3's goodput by what a restart takes, which was not published."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    minutes = (2, 5, 8, 10, 12, 14, 16, 20)
    runs = {restart: llama_3(restart * 60) for restart in minutes}
    values = [[100 * simulate(run, [[job]], seed).goodput for seed in range(seeds)] for run, job in runs.values()]
    axis.errorbar(minutes, list(map(fmean, values)), list(map(stdev, values)), marker="o", capsize=3, label="simulated")
    axis.axhline(90, color="gray", linestyle="--", label="published: more than 90 %")
    axis.axvline(RESTART / 60, color="tab:orange", linestyle=":", label="a restart at FT-HSDP's scale")
    axis.set(xlabel="minutes from a failure to training", ylabel="goodput, %")
    axis.set_title("Llama 3 405B, 16,384 GPUs, 54 days")
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)
    print(", ".join(f"{restart} min: {fmean(found):.1f} %" for restart, found in zip(minutes, values, strict=True)))


def _useful(outcome: Outcome) -> float:
    return sum(ran.useful for ran in outcome.jobs)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "scale"  # the same figure has the same bytes
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def limits(experts: int) -> None:
    with tempfile.TemporaryDirectory(prefix="mf-scale-") as folder:
        for count in (1600, experts):
            measure_plan(many(f"{folder}/planned", count))
        for count in (1000, experts):
            count_sizes(count)
        measure_partitions(Path(folder), experts)
        measure_corpus(Path(folder))
        with counted_store(Path(folder)) as (url, proxy):
            measure_expert(url, proxy)
            for count in (100, 400):
                measure_status(f"{url}/{count}", proxy, count)


def many(output: str, experts: int, *changes: str) -> Config:
    """The quickstart with many experts."""
    shared = [f"experts.count={experts}", "partition.method=random", "evaluation.baselines=[]"]
    return load_config(str(ROOT / "configs/quickstart.yaml"), [*shared, *changes], output_dir=output)


def measure_plan(config: Config) -> None:
    start = time.process_time()
    text = describe_plan(config)
    spent = time.process_time() - start
    print(f"plan of {config.experts.count:,} experts: {spent:.3f} s of processor, {len(text) / 1000:,.0f} kB of text")


def count_sizes(experts: int) -> None:
    """What follows from the shapes of `configs/default.yaml`."""
    for router in ("evidence", "ridge"):
        changes = [f"experts.count={experts}", "partition.method=random", "evaluation.baselines=[]"]
        config = load_config(str(ROOT / "configs/default.yaml"), [*changes, f"assembly.router={router}"])
        assembled, flops = trained_parameters(config, "assemble"), flops_of_jobs(config)
        print(
            f"{experts:,} experts of {trained_parameters(config, 'expert') / 1e6:.1f} M, {router}: "
            f"{assembled / 1e9:,.1f} billion parameters, {size(disk_bytes(config))} of disk, an evaluation of "
            f"{flops['evaluate'] / flops['expert-0']:,.0f} trainings of an expert"
        )


def measure_partitions(folder: Path, experts: int) -> None:
    """Prepare two short documents for each expert, and look at what all of them read."""
    texts = folder / "texts.jsonl"
    lines = (
        {"text": f"part {k} of a text that one expert reads, and nothing of any other. " * 4}
        for k in range(2 * experts)
    )
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = f"data.sources=[{{name: made, train: {texts}}}]"
    config = many(str(folder / "run"), experts, source, "data.vocab_size=512", "data.min_article_length=1")
    run = Run(config)
    run.make("prepare-data")
    start, busy = time.perf_counter(), time.process_time()
    artifact = run.make("partition")
    print(
        f"{experts:,} partitions: {time.perf_counter() - start:.0f} s ({time.process_time() - busy:.0f} s of "
        f"processor), {sum(1 for _ in artifact.local_folder().iterdir()):,} files"
    )
    for name in ("manifest.json", "partitions.json"):
        path = artifact.local_folder() / name
        start = time.process_time()
        json.loads(path.read_bytes())
        spent = time.process_time() - start
        print(f"  {name}: {path.stat().st_size / 1e6:.2f} MB, {spent:.3f} s of processor to parse")
    start = time.process_time()
    found = find_artifact(artifact.url)
    assert found is not None
    print(f"  its manifest found and checked: {time.process_time() - start:.3f} s of processor")
    start = time.process_time()
    done = finished_tasks(Run(config), build_tasks(config))
    print(f"  what is finished, on this disk ({len(done)} tasks): {time.process_time() - start:.2f} s of processor")


def measure_corpus(folder: Path, documents: int = 1_000_000) -> None:
    """What one machine that prepares a corpus spends for each MB, and holds for each document."""
    config = tokenise.make_config(tokenise.samples(), 1, folder)
    _, size = tokenise.learn_once(config, folder)
    start = time.process_time()
    tokenise.end_to_end(config, folder)
    print(f"{size:.1f} MB of text prepared: {size / (time.process_time() - start):.2f} MB a processor second")
    tracemalloc.start()
    with TokenFileWriter(folder, "train", 512) as writer:
        for _ in range(documents // 1000):
            writer.add(np.zeros(8000, np.uint16), np.full(1000, 8), np.zeros(1000, np.uint16))
    print(f"token file of {documents:,} documents: {_peak() / documents:.0f} bytes each at the most")
    random_partitions(open_token_file(folder, "train").lengths, 16, 0)
    print(f"dividing them into 16 partitions: {_peak() / documents:.0f} bytes each at the most")
    tracemalloc.stop()


def _peak() -> int:
    """Bytes that were held at the same time since the last question."""
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    return peak


@contextmanager
def counted_store(folder: Path) -> Iterator[tuple[str, FaultProxy]]:
    """A bucket of an S3 server on this machine, and the proxy that sees every request."""
    server = start_server(folder)
    proxy = FaultProxy(server.port)
    os.environ.update(server.environment(proxy.port), MODULARFORGE_CACHE=str(folder / "cache"))
    try:
        paths.store_of("s3://x")._client.create_bucket(Bucket="scale")  # type: ignore[union-attr]
        yield "s3://scale", proxy
    finally:
        proxy.close()
        server.stop()


def measure_expert(url: str, proxy: FaultProxy) -> None:
    """What one expert of the smoke test asks of the store, from nothing to its commit, and of its checkpoints."""
    path = str(ROOT / "configs/quickstart.yaml")
    changes = ["evaluation.baselines=[]", "training.checkpoint_every=10"]
    config = load_config(path, changes, smoke_test=True, output_dir=f"{url}/smoke")
    for stage in ("prepare-data", "partition", "backbone"):
        Run(config).make(stage)
    proxy.reset()
    Run(config).make("expert", 0)
    print(f"an expert of {config.experts.steps} steps with a checkpoint every 10: {counted(proxy)}")
    saves = [request for request in proxy.requests if "/step-" in request.path]
    print(f"  of these for checkpoints: {counted(proxy, saves)}")
    proxy.reset()
    progress_of(config, "expert-0")
    print(f"  what `status` asks of it while it runs: {counted(proxy)}")


def measure_status(url: str, proxy: FaultProxy, experts: int) -> None:
    """What `status` asks before the experts are finished, and after each has said that it started."""
    config = many(url, experts)
    run = Run(config)
    for stage in ("prepare-data", "partition", "backbone"):
        plan = run.plan(stage)
        with making(plan) as writer:
            for number in range(experts if stage == "partition" else 0):
                (writer.folder / f"partition-{number}.tokens.bin").write_text(str(number))
            commit(writer, plan, run, {})
    for number in range(experts):
        append_event(config, f"expert-{number}", "started")
    proxy.rule = lambda request: Answer("do", action=lambda: time.sleep(LATENCY))
    for title, ask in (
        ("what is finished", lambda: finished_tasks(Run(config), build_tasks(config))),
        ("what happened", lambda: read_all_events(config)),
    ):
        proxy.reset(proxy.rule)
        start = time.perf_counter()
        ask()
        seconds = time.perf_counter() - start
        print(f"{experts} experts, {title}: {counted(proxy)} of {LATENCY * 1000:.0f} ms in {seconds:.1f} s")
    proxy.reset()


def counted(proxy: FaultProxy, requests: Sequence[Request] | None = None) -> str:
    """Requests by method, listings apart."""
    found = proxy.requests if requests is None else requests
    kinds = Counter("LIST" if "list-type" in request.path else request.method for request in found)
    return f"{sum(kinds.values())} requests ({', '.join(f'{count} {kind}' for kind, count in kinds.most_common())})"


if __name__ == "__main__":
    main()
