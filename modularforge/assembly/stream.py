"""Execute a merge plan: read spans of bytes in chunks, check their hashes, write files one after another.

Memory is a few chunks, whatever the size of the model and the number of experts; nothing here imports torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from checkpoints import paths
from modularforge.assembly.plan import MergePlan, OutputFile, TensorSpan
from modularforge.errors import DataError, MismatchError
from modularforge.log import Progress, progress

CHUNK_BYTES = 8 << 20


def execute(plan: MergePlan, folder: Path) -> None:
    """Write all weight files of the plan into `folder`."""
    total = sum(file.size for file in plan.files)
    with progress("assemble", total, "bytes") as bar:
        for file in plan.files:
            write_file(file, folder / file.name, bar)


def write_file(file: OutputFile, target: Path, bar: Progress | None = None) -> None:
    """Write one weight file by copying its spans; raises MismatchError when a tensor is not what its manifest says."""
    readers: dict[str, SpanReader] = {}
    with open(target, "wb", buffering=0) as output:
        output.write(file.header)
        for name, span in file.spans:
            if span.url not in readers:
                readers[span.url] = SpanReader(span.url)
            for chunk in checked(name, span, readers[span.url].chunks(span)):
                output.write(chunk)
                if bar:
                    bar.advance(len(chunk))
            if len(readers) > 8:  # more open files than that help nobody, and K may be in the hundreds
                readers.pop(next(iter(readers))).close()
    for reader in readers.values():
        reader.close()


def checked(name: str, span: TensorSpan, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Pass the chunks on and compare their hash with the span's at the end, where it has one."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if span.sha256 and digest.hexdigest() != span.sha256:
        raise MismatchError(
            f"{name} in {span.url} must have the sha256 that its manifest says, but differs: the file was changed or "
            "damaged after it was committed; delete that artifact and run its stage again"
        )


class SpanReader:
    """Reads spans of one file, local or remote, sequentially and in chunks."""

    def __init__(self, url: str) -> None:
        self.url = url
        store, path = paths.filesystem(url)
        self._file = store.open(path, "rb", block_size=CHUNK_BYTES)

    def chunks(self, span: TensorSpan) -> Iterator[bytes]:
        """The bytes of a span; raises DataError when the file ends before it."""
        self._file.seek(span.start)
        left = span.length
        while left:
            chunk: bytes = self._file.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise DataError(f"{self.url} must be a whole weight file, but ends {left} bytes early; make it again")
            left -= len(chunk)
            yield chunk

    def close(self) -> None:
        """Close the file."""
        self._file.close()
