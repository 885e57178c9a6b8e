"""How fast the assembler is beside `cp` and mergekit-moe, and how much memory it takes.

    python benchmarks/assembly.py --folder /a/disk                       # 8 experts of 4 layers
    python benchmarks/assembly.py --folder /a/disk --layers 22           # 8 experts of a 1.1 B model: 40 GB of disk
    python benchmarks/assembly.py --folder /a/disk --only merge          # or speed, link, memory, stores, mergekit
    python benchmarks/assembly.py --folder /a/disk --mergekit ENV/bin/mergekit-moe

Measures, in one run and in turns: (1) `assembly.mode: merge`, hashing in and out and fsync included, against `cp` and
fsync of the same bytes, with the ridge router, which is solved first from sums that `cp` does not read, and with random
rows, so that bytes alone are moved; (2) the same with the evidence router, which widens every matrix; (3) `link`, with
random rows and with the ridge router, which has to read the experts' sums; (4) the peak of anonymous memory, in a
process of its own, from /proc/self/smaps_rollup, with 2, 8 and more experts; (5) mergekit-moe on the same experts as
dense models, when its command is given (an environment of its own: pip install mergekit); (6) with
`--url s3://bucket/prefix`, a merge whose experts lie on an object store and whose model goes there, against `aws s3 cp`
of the same files down and up, and obstore, which streams them through this process without hashing.
MODULARFORGE_HASH=blake3 hashes parts and model by BLAKE3; OPENSSL_ia32cap=:~0x20000000 takes a core's instructions for
sha256 away from OpenSSL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoints import Artifact, open_artifact, paths
from checkpoints.copying import copy_artifact
from checkpoints.s3 import PART_BYTES
from modularforge.config import ModelConfig
from modularforge.experts.ffn import EXPERT_NAME
from tests.synthetic_models import describe, write_parts, write_sparse_experts

CHILD = """
import json, sys, threading, time, tracemalloc
from pathlib import Path
peak = 0
def anonymous():
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("Anonymous:")).split()[1]) / 1000
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.02)
from checkpoints import open_artifact, write_artifact
from modularforge.assembly.assemble import assemble
from modularforge.config_files import make_config
parts, target, mode, router = json.loads(Path(sys.argv[1]).read_text()), *sys.argv[2:5]
values = {"data": {"sources": [{"name": "x", "train": "x"}]}, "experts": {"anchored": False, "count": 2}}
values["assembly"] = {"mode": mode, "router": router, "max_shard_bytes": 5_000_000_000}
config = make_config(values, "benchmark")
threading.Thread(target=watch, daemon=True).start()
if sys.argv[5] == "trace":
    tracemalloc.start()
start = time.perf_counter()
with write_artifact(target, "assembled", "benchmark") as writer:
    experts = [open_artifact(url) for url in parts["experts"]]
    assemble(config, open_artifact(parts["backbone"]), experts, writer)
    size = writer.commit({}).manifest.size
seconds, traced = time.perf_counter() - start, tracemalloc.get_traced_memory()[1] / 1e6
print(json.dumps({"seconds": seconds, "peak_mb": max(peak, anonymous()), "traced_mb": traced, "bytes": size}))
"""


def main() -> None:
    options = parse()
    folder = Path(options.folder) / f"assembly-benchmark-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    try:
        model = ModelConfig(
            width=2048,
            layers=options.layers,
            heads=32,
            kv_heads=4,
            ffn_width=5632,
            context_length=2048,
            tied_head=False,
        )
        backbone, experts = write_parts(folder, model, 32_000, options.experts)
        describe(folder, backbone, experts)
        size = sum(item.manifest.size for item in experts)
        print(f"{options.experts} experts of {size / options.experts / 1e9:.2f} GB, {options.layers} layers, bf16")
        measured = [options.only] if options.only else ["speed", "link", "memory", "stores", "mergekit"]
        if "speed" in measured or "merge" in measured:
            speed(folder, backbone, experts, options.rounds, CONTENDERS[:2] if options.only == "merge" else CONTENDERS)
        if "link" in measured:
            link_of_many(folder)
        if "memory" in measured:
            memory(folder, options)
        if options.url and "stores" in measured:
            between_stores(folder, options)
        if options.mergekit and "mergekit" in measured:
            mergekit(folder, backbone, experts, options.mergekit)
    finally:
        shutil.rmtree(folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="a folder on the disk to measure")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4, help="22 for the whole 1.1 B model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most-experts", type=int, default=32, help="for the memory of many experts")
    parser.add_argument(
        "--only", choices=["merge", "speed", "link", "memory", "stores", "mergekit"], help="one of them alone"
    )
    parser.add_argument("--url", default="", help="a place on an object store, for experts and model there")
    parser.add_argument("--mergekit", default="", help="path of the mergekit-moe command")
    return parser.parse_args()


CONTENDERS = (
    ("merge", "merge", "ridge"),
    ("merge, bytes", "merge", "random"),
    ("merge, evidence", "merge", "evidence"),
    ("link", "link", "random"),
    ("link, ridge", "link", "ridge"),
)


def speed(
    folder: Path,
    backbone: Artifact,
    experts: list[Artifact],
    rounds: int,
    contenders: Sequence[tuple[str, str, str]],
) -> None:
    """Each contender in turn; medians and ratios."""
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, mode, router in contenders:
            found = assemble_once(folder, mode, router)
            seconds.setdefault(name, []).append(found["seconds"])
        seconds.setdefault("cp + fsync", []).append(copy_all(folder, backbone, experts))
    reference = statistics.median(seconds["cp + fsync"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:16s} {median:7.2f} s   {median / reference:5.2f} x cp + fsync   {[round(x, 2) for x in times]}")
    print("target: merge at most 1.15 x cp; link independent of size")


def assemble_once(folder: Path, mode: str, router: str, target: str = "", trace: bool = False) -> dict[str, float]:
    """Assemble the parts of `folder` in a process of its own; seconds, peak anonymous memory in MB, and bytes.

    The kernel is asked 50 times a second: what is held for a few milliseconds (the widened embedding) may be missed.
    `trace` counts every allocation of Python and numpy instead ("traced_mb"): equal runs have equal peaks, but take
    longer.
    """
    target = target or str(folder / "out")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder / "parts.json"), target, mode, router, "trace" if trace else ""],
        check=True, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent,
    )  # fmt: skip
    paths.remove(target)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def copy_all(folder: Path, backbone: Artifact, experts: list[Artifact]) -> float:
    """`cp` of the weight files that are merged, and fsync."""
    target = folder / "copied"
    target.mkdir()
    files = [backbone.local_file("model.safetensors", verify=False)]
    files += [item.local_file("expert.safetensors", verify=False) for item in experts]
    start = time.perf_counter()
    for number, file in enumerate(files):
        subprocess.run(["cp", str(file), str(target / f"{number}")], check=True)
        subprocess.run(["sync", str(target / f"{number}")], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def link_of_many(folder: Path) -> None:
    """64 experts of 1 GB, which are holes in files so that they fit: nothing reads them."""
    many = folder / "many"
    many.mkdir()
    model = ModelConfig(
        width=2048, layers=15, heads=32, kv_heads=4, ffn_width=5632, context_length=2048, tied_head=False
    )
    backbone, _ = write_parts(many, model, 32_000, 0)
    experts = write_sparse_experts(many, backbone, model, 64)
    for count in (8, 64):
        describe(many, backbone, experts[:count])
        found = assemble_once(many, "link", "random")
        print(f"link, {count} experts of {experts[0].manifest.size / 1e9:.2f} GB: {found['seconds']:.2f} s")
    print("target: 64 experts of 1 GB in under 2 s")


def memory(folder: Path, options: argparse.Namespace) -> None:
    """Peak anonymous memory with 2, 8 and many experts; many small ones are made for it."""
    small = folder / "small"
    small.mkdir()
    model = ModelConfig(
        width=2048, layers=2, heads=32, kv_heads=4, ffn_width=5632, context_length=2048, tied_head=False
    )
    backbone, members = write_parts(small, model, 32_000, options.most_experts)
    for router in ("ridge", "evidence"):
        for count in sorted({2, 8, options.most_experts}):
            describe(small, backbone, members[:count])
            found = assemble_once(small, "merge", router)
            print(
                f"memory, {router:10s} K = {count:3d}: {found['peak_mb']:6.0f} MB anonymous, "
                f"{found['bytes'] / 1e9:.2f} GB written"
            )
    print("target: at most 300 MB, and the same for all K")


def between_stores(folder: Path, options: argparse.Namespace) -> None:
    """A merge from an object store to itself; medians, and ratios to the others' in turns."""
    url = f"{options.url.rstrip('/')}/{folder.name}"
    there = folder / "there"
    there.mkdir()
    try:
        parts = json.loads((folder / "parts.json").read_text())
        sources = [parts["backbone"], *parts["experts"]]
        urls = [paths.join(url, "parts", str(number)) for number in range(len(sources))]
        for source, target in zip(sources, urls, strict=True):
            copy_artifact(open_artifact(source), target, lambda size: None)
        (there / "parts.json").write_text(json.dumps({"backbone": urls[0], "experts": urls[1:]}))
        artifacts = [open_artifact(place) for place in urls]
        files = [item.file_url(name) for item in artifacts for name in item.manifest.files if name in WEIGHTS]
        size = sum(paths.file_size(file) for file in files)
        contenders: dict[str, Callable[[], object]] = {
            "merge": lambda: assemble_once(there, "merge", "random", paths.join(url, "out")),
            **{name: partial(copy, files, url, there) for name, copy in COPIES.items() if is_installed(name)},
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        cores: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, action in contenders.items():
                start, begun = time.perf_counter(), processor_seconds()
                action()
                seconds[name].append(time.perf_counter() - start)
                cores[name].append(processor_seconds() - begun)
        medians = {name: statistics.median(found) for name, found in seconds.items()}
        fastest = min((median for name, median in medians.items() if name != "merge"), default=float("nan"))
        for name, median in medians.items():
            print(
                f"s3 to s3, {name:10s} {median:7.2f} s   {median / fastest:5.2f} x the best other, "
                f"{statistics.median(cores[name]):6.2f} s of processor"
            )
        print("target: merge at most 1.15 x the best other")
        print(f"{size / 1e9:.2f} GB each; obstore and aws copy one file after another and do not hash them")
    finally:
        paths.remove(url)


def copy_by_aws(files: list[str], url: str, folder: Path) -> None:
    for file in files:
        for pair in ((file, str(folder / "file")), (str(folder / "file"), paths.join(url, "aws"))):
            subprocess.run(["aws", "s3", "cp", "--only-show-errors", *pair], check=True)


def copy_by_obstore(files: list[str], url: str, folder: Path) -> None:
    import obstore
    from obstore.store import S3Store

    bucket = url.removeprefix("s3://").partition("/")[0]
    store = S3Store(bucket, client_options={"allow_http": True})

    async def copy_all() -> None:  # its blocking calls cannot be nested
        for file in files:
            found = await obstore.get_async(store, file.removeprefix(f"s3://{bucket}/"))
            target = paths.join(url, "obstore").removeprefix(f"s3://{bucket}/")
            stream = found.stream(min_chunk_size=PART_BYTES)
            await obstore.put_async(store, target, stream, chunk_size=PART_BYTES, max_concurrency=8)

    asyncio.run(copy_all())


def processor_seconds() -> float:
    """What this process and the programs that it has waited for have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


WEIGHTS = ("model.safetensors", EXPERT_NAME)
COPIES = {"aws s3 cp": copy_by_aws, "obstore": copy_by_obstore}


def is_installed(name: str) -> bool:
    return find_spec("obstore") is not None if name == "obstore" else shutil.which("aws") is not None


def mergekit(folder: Path, backbone: Artifact, experts: list[Artifact], command: str) -> None:
    """mergekit-moe wants each expert as a whole dense model; random gates, so that it computes no hidden states."""
    sources = []
    for index, expert in enumerate(experts):
        dense = folder / f"dense-{index}"
        dense.mkdir()
        write_dense(dense, backbone, expert)
        sources.append({"source_model": str(dense), "positive_prompts": ["x"]})
    config = folder / "mergekit.yaml"
    base = {"base_model": sources[0]["source_model"], "gate_mode": "random", "dtype": "bfloat16", "experts": sources}
    config.write_text(json.dumps(base))
    target = folder / "mergekit-out"
    start = time.perf_counter()
    done = subprocess.run(
        ["/usr/bin/time", "-f", "%M", command, str(config), str(target), "--lazy-unpickle", "--low-cpu-memory"],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        print(f"mergekit-moe failed: {done.stderr.strip().splitlines()[-3:]}")
        return
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in target.iterdir())
    resident = int(done.stderr.strip().splitlines()[-1]) / 1000
    print(f"mergekit-moe     {seconds:7.2f} s for {size / 1e9:.2f} GB, {resident:.0f} MB resident at most")


def write_dense(target: Path, backbone: Artifact, expert: Artifact) -> None:
    """The backbone with the expert's FFN, as a folder of its own."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from checkpoints import plain_folder
    from checkpoints.safetensors import read_spans
    from modularforge.assembly.plan import output_tensors, plan_merge
    from modularforge.assembly.stream import execute
    from modularforge.model import names

    spans = read_spans(str(backbone.local_file("model.safetensors", verify=False)))
    own = read_spans(str(expert.local_file("expert.safetensors", verify=False)))
    spans |= {names.expert_to_dense(name): span for name, span in own.items()}
    execute(plan_merge(output_tensors(spans), 10**12), plain_folder(target))
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(backbone.local_file(name), target / name)
    vocabulary = {"<unk>": 0, "x": 1}
    Tokenizer(WordLevel(vocabulary, unk_token="<unk>")).save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


if __name__ == "__main__":
    main()
