"""How fast the store is beside the tools that people know, on the same server, file and disk, in one run.

    python benchmarks/storage.py --url s3://bucket/benchmark --folder /a/disk --size-mb 1024

Measures (1) put and get of one file by command: `python -m checkpoints push|pull`, hashing and fsync included,
against those of `aws s3 cp`, `s5cmd` and `rclone` that are installed, whose gets are flushed to the disk too; (2) the
same within one process, of a weight file too, against obstore, which does not hash; (3) writing into a folder against
`cp` and fsync; (4) the pause of a training loop at a background save as a share of a save that it waits for.
Credentials and endpoint come from the AWS variables, the hash from MODULARFORGE_HASH.
Contenders take turns; printed are medians of seconds and of the client's processor time, and both beside the best of
the others, with the goal.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from checkpoints import Artifact, open_artifact, paths, write_artifact
from checkpoints.fetching import fetch_file
from checkpoints.s3 import PART_BYTES
from checkpoints.safetensors import header_bytes
from checkpoints.saver import CheckpointSaver
from checkpoints.training import Checkpoint, save_checkpoint

Contenders = dict[str, Callable[[], object]]


def main() -> None:
    options = parse()
    folder = Path(options.folder) / f"storage-benchmark-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    url = f"{options.url.rstrip('/')}/{folder.name}" if options.url else ""
    try:
        big = folder / "big.bin"
        make_file(big, options.size_mb)
        if url:
            by_command(big, folder, url, options)
            in_process(big, url, options)
        into_a_folder(big, folder, options)
        pause_of_the_loop(str(folder / "job"), options)
        if url:
            pause_of_the_loop(paths.join(url, "job"), options)
    finally:
        shutil.rmtree(folder)
        if url:
            paths.remove(url)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="", help="where to write on an object store; empty leaves that part out")
    parser.add_argument("--folder", required=True, help="a folder on the disk to measure")
    parser.add_argument("--size-mb", type=int, default=1024, help="size of the file and of the training state in MiB")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def by_command(big: Path, folder: Path, url: str, options: argparse.Namespace) -> None:
    """Whole commands, their start included."""
    source = folder / "artifact"
    with write_artifact(str(source), "benchmark", "f") as writer:
        writer.write_chunks("big.bin", read(big))
        writer.commit()
    ours, theirs, turn = paths.join(url, "ours"), paths.join(url, "aws"), Turn(folder)
    push = [sys.executable, "-m", "checkpoints", "push", str(source)]
    pull = [sys.executable, "-m", "checkpoints", "pull"]
    put: Contenders = {"push": lambda: run(*push, paths.join(ours, turn.next()))}
    get: Contenders = {"pull": lambda: run(*pull, paths.join(ours, "x"), turn.folder())}
    for name, command, place in peers():
        put[name] = lambda c=command, p=place: run(*c, str(big), p(paths.join(theirs, turn.next())))  # type: ignore[misc]
        get[name] = lambda c=command, p=place: fetch([*c, p(paths.join(theirs, "x"))], turn.folder())  # type: ignore[misc]
    compare(f"put {options.size_mb} MiB by command (goal 0.9)", put, options)
    run(*push, paths.join(ours, "x"))
    for _, command, place in peers()[:1]:
        run(*command, str(big), place(paths.join(theirs, "x")))
    compare(f"get {options.size_mb} MiB by command (goal 0.8)", get, options)
    turn.clean()


def fetch(command: list[str], target: str) -> None:
    """Another tool's get, flushed to the disk as ours is."""
    run(*command, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def peers() -> list[tuple[str, list[str], Callable[[str], str]]]:
    """Other tools that are installed: name, command before source and target, how they spell an object's URL."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    remote = f':s3,env_auth,provider=Other,endpoint="{endpoint}":'
    known: list[tuple[str, list[str], Callable[[str], str]]] = [
        ("aws s3 cp", ["aws", "s3", "cp", "--only-show-errors"], str),
        ("s5cmd", ["s5cmd", *(["--endpoint-url", endpoint] if endpoint else []), "cp"], str),
        ("rclone", ["rclone", "copyto"], lambda url: url.replace("s3://", remote) if endpoint else url),
    ]
    return [peer for peer in known if shutil.which(peer[1][0])]


def in_process(big: Path, url: str, options: argparse.Namespace) -> None:
    """Without the start of a program; obstore moves bytes only, ours hashes them too."""
    try:
        import obstore
        from obstore.store import S3Store
    except ImportError:
        print("obstore is not installed: left out")
        return
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    store = S3Store(bucket, prefix=prefix, client_options={"allow_http": True})

    weights = big.with_name("weights.safetensors")
    make_weights(weights, big)
    made: list[str] = []

    def put(path: Path) -> None:
        made.append(paths.join(url, uuid.uuid4().hex))
        with write_artifact(made[-1], "benchmark", "f") as writer:
            writer.write_chunks(path.name, read(path), path.stat().st_size)
            writer.commit()

    def obstore_put() -> None:
        obstore.put(store, "obstore", big, chunk_size=PART_BYTES, max_concurrency=8)

    def get(artifact: Artifact) -> None:
        ((name, entry),) = artifact.manifest.files.items()
        target = big.with_name("got")
        target.unlink(missing_ok=True)
        fetch_file(artifact.file_url(name), entry, target)

    def obstore_get() -> None:
        with open(big.with_name("got"), "wb") as file:
            for part in obstore.get(store, "obstore").stream(min_chunk_size=PART_BYTES):
                file.write(part)
            os.fsync(file.fileno())

    def clean() -> None:
        while made:
            paths.remove(made.pop())

    names = "file", "weight file"  # of which each tensor is hashed too
    puts: Contenders = {name: lambda p=path: put(p) for name, path in zip(names, (big, weights), strict=True)}  # type: ignore[misc]
    compare(f"put {options.size_mb} MiB in process", {**puts, "obstore": obstore_put}, options, clean, ours=2)
    put(big)
    put(weights)
    there = [open_artifact(place) for place in made]
    gets: Contenders = {name: lambda a=artifact: get(a) for name, artifact in zip(names, there, strict=True)}  # type: ignore[misc]
    compare(f"get {options.size_mb} MiB in process", {**gets, "obstore": obstore_get}, options, ours=2)
    clean()


def make_weights(path: Path, content: Path) -> None:
    """A weight file of the bytes of another one, in 64 tensors."""
    size = content.stat().st_size // 64
    with open(path, "wb") as file:
        file.write(header_bytes((f"{i:02}", "U8", (size,), size) for i in range(64)))
        for chunk in read(content):
            file.write(chunk)


def into_a_folder(big: Path, folder: Path, options: argparse.Namespace) -> None:
    """The same bytes onto the same disk, flushed; ours hashes them and renames."""
    turn = Turn(folder)

    def ours() -> None:
        with write_artifact(turn.folder(), "benchmark", "f") as writer:
            writer.write_chunks("big.bin", read(big))
            writer.commit()

    def stage() -> None:
        with write_artifact(turn.folder(), "benchmark", "f") as writer:
            run("cp", str(big), str(writer.folder / "big.bin"))
            writer.commit()

    def copy() -> None:
        target = turn.folder()
        run("cp", str(big), target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())

    contenders: Contenders = {"write_chunks": ours, "file, then commit": stage, "cp and fsync": copy}
    compare(f"write {options.size_mb} MiB into a folder (goal 0.8)", contenders, options, turn.clean, ours=2)


def pause_of_the_loop(url: str, options: argparse.Namespace) -> None:
    """The pause at the first background save, whose buffers are made while a step is trained, and at later ones."""
    tensors = {str(i): torch.rand(options.size_mb << 14) for i in range(16)}
    waited: list[float] = []
    for step in range(1, options.rounds + 1):
        start = time.perf_counter()
        save_checkpoint(url, Checkpoint(step, tensors, {}), "f", keep_last=1)
        waited.append(time.perf_counter() - start)
    pauses: list[float] = []
    with CheckpointSaver(url, "f", keep_last=1) as saver:
        saver.prepare(tensors)
        time.sleep(statistics.median(waited))
        for step in range(options.rounds + 1, 2 * options.rounds + 2):
            saver.save(Checkpoint(step, tensors, {}))
            pauses.append(saver.stall_seconds)
            saver.wait()
    whole, first, later = statistics.median(waited), pauses[0], statistics.median(pauses[1:])
    kind = "a folder" if paths.is_local(url) else "the object store"
    print(f"\nsaving {options.size_mb} MiB of training state to {kind}: {whole:.2f} s when waited for")
    print(f"  pause of the loop  first {first:.2f} s ({first / whole:.1%})  later {later:.2f} s ({later / whole:.1%})")


def compare(
    title: str,
    contenders: Contenders,
    options: argparse.Namespace,
    after: Callable[[], object] = lambda: None,
    ours: int = 1,
) -> None:
    """Run the contenders, the first of which are `ours`, in turns; print medians, and ratios to the best of others."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    cores: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, action in contenders.items():
            os.sync()
            start, begun = time.perf_counter(), processor_seconds()
            action()
            seconds[name].append(time.perf_counter() - start)
            cores[name].append(processor_seconds() - begun)
            after()
    medians = {name: (statistics.median(seconds[name]), statistics.median(cores[name])) for name in contenders}
    others = list(medians.values())[ours:] or [(float("nan"), float("nan"))]
    fastest, thriftiest = min(wall for wall, _ in others), min(core for _, core in others)
    print(f"\n{title}", flush=True)
    for name, (wall, core) in medians.items():
        print(
            f"  {name:18} {wall:6.2f} s  {options.size_mb / wall:6.0f} MiB/s  {fastest / wall:5.2f} of the best, "
            f"{core:5.2f} s of processor  {core / thriftiest:5.2f} x the least",
            flush=True,
        )


def processor_seconds() -> float:
    """What this process and the programs that it has waited for have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class Turn:
    """Fresh names for every turn."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._used: list[str] = []

    def next(self) -> str:
        """A name that was not used."""
        return uuid.uuid4().hex

    def folder(self) -> str:
        """A path that was not used."""
        self._used.append(str(self._folder / self.next()))
        return self._used[-1]

    def clean(self) -> None:
        """Delete what lies at the paths that were handed out."""
        for path in self._used:
            paths.remove(path)


def make_file(path: Path, size_mb: int) -> None:
    with open(path, "wb") as file:
        for _ in range(size_mb):
            file.write(os.urandom(1 << 20))


def read(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


if __name__ == "__main__":
    main()
