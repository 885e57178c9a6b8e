"""Whether requests at once follow what a network brings: each connection is slow, the network is not.

    python benchmarks/slow_connections.py --url s3://bucket/benchmark --folder /a/disk --size-mb 512 --rate 5

Between this process and the server (http alone) stands a forwarder that lets each connection pass `--rate` MB/s in
each direction, as one connection to a distant S3 brings some 50 to 100 MB/s however wide the network is. Measured in
turns: put and get of a file, with as many requests as the measured rate asks for, beside the 8 that it begins with.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from checkpoints import open_artifact, pace, paths, write_artifact
from checkpoints.fetching import fetch_file

NAME = "big.bin"
STEP_BYTES = 64 << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="where to write on an object store")
    parser.add_argument("--folder", required=True, help="a folder for the file that comes back")
    parser.add_argument("--size-mb", type=int, default=512)
    parser.add_argument("--rate", type=float, default=5.0, help="MB/s of each connection")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder = Path(options.folder) / f"slow-connections-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    url = f"{options.url.rstrip('/')}/{folder.name}"
    bucket = "/".join(url.split("/")[:3])
    upstream = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    port = serve(upstream.hostname or "", upstream.port or 80, options.rate * 1e6)
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    seconds: dict[tuple[str, str], list[float]] = {}
    try:
        for number in range(options.rounds):
            for kind, most in (("8 at once", pace.LEAST), ("by the rate", 0)):
                new_paces(bucket, most)
                place = paths.join(url, f"{number}-{most}")
                put = taken(lambda place=place: send(place, options.size_mb))  # type: ignore[misc]
                get = taken(lambda place=place: fetch(place, folder / "got"))  # type: ignore[misc]
                widths = pace.writing_to(bucket).width, pace.reading_of(bucket).width
                seconds.setdefault(("put", kind), []).append(put)
                seconds.setdefault(("get", kind), []).append(get)
                print(f"round {number + 1}, {kind}: put {put:.1f} s, get {get:.1f} s, at the end {widths} at once")
                paths.remove(place)
    finally:
        shutil.rmtree(folder)
        paths.remove(url)
    for action in ("put", "get"):
        fixed, free = (statistics.median(seconds[action, kind]) for kind in ("8 at once", "by the rate"))
        print(f"{action} {options.size_mb} MiB: {free:.1f} s by the rate, {fixed / free:.2f} x as fast as 8 at once")


def new_paces(bucket: str, most: int) -> None:
    """Begin anew with 8 requests at once; `most` is as many as there may ever be, 0 for the product's own bound."""
    pace.reading_of.cache_clear()
    pace.writing_to.cache_clear()
    for known in (pace.reading_of(bucket), pace.writing_to(bucket)):
        known.most = most or known.most


def taken(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def send(place: str, size_mb: int) -> None:
    with write_artifact(place, "benchmark", "f") as writer:
        writer.write_chunks(NAME, (os.urandom(1 << 20) for _ in range(size_mb)), size_mb << 20)
        writer.commit()


def fetch(place: str, target: Path) -> None:
    artifact = open_artifact(place)
    target.unlink(missing_ok=True)
    fetch_file(artifact.file_url(NAME), artifact.manifest.files[NAME], target)


def serve(host: str, port: int, rate: float) -> int:
    """Forward connections to a server, each at a rate in bytes a second; returns the port to use in its place."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)

    def forward(client: socket.socket) -> None:
        server = socket.create_connection((host, port))
        for source, target in ((client, server), (server, client)):
            threading.Thread(target=pump, args=(source, target, rate), daemon=True).start()

    def accept() -> None:
        while True:
            forward(listener.accept()[0])

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


def pump(source: socket.socket, target: socket.socket, rate: float) -> None:
    due = time.perf_counter()
    while True:
        try:
            content = source.recv(STEP_BYTES)
            if content:
                target.sendall(content)
        except OSError:
            content = b""
        if not content:
            for end in (source, target):
                end.close()
            return
        due = max(due, time.perf_counter() - 0.05) + len(content) / rate
        time.sleep(max(due - time.perf_counter(), 0))


if __name__ == "__main__":
    main()
