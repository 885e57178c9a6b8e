"""Models as parts, each a weight file of its own: one for the backbone, one for each expert, …

A part whose bytes exist in a committed artifact is taken over without moving them: a hard link on a folder, a copy made
by the server on an object store. What a part holds is told by its key, a hash over the names, types and hashes of its
tensors and what becomes of them, so that a changed model also takes over what it has in common with the old one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from checkpoints import Artifact, ArtifactWriter, FileEntry, paths
from checkpoints.parallel import in_order
from checkpoints.safetensors import INDEX_NAME, WEIGHTS_NAME, TensorSpan
from checkpoints.screen import progress
from modularforge.assembly.plan import (
    MergePlan,
    OutputFile,
    OutputTensor,
    output_tensors,
    plan_merge,
    plan_parts,
    split,
)
from modularforge.assembly.stream import execute, write_file
from modularforge.errors import MismatchError
from modularforge.facts import fact
from modularforge.model.hub_config import write_json

COPIES_AT_ONCE = 16
KEYS_FACT = "part_keys"
Mode = Literal["auto", "merge", "link"]


@dataclass(frozen=True)
class Source:
    """A committed file that a part may be taken over from."""

    url: str
    entry: FileEntry


@dataclass(frozen=True)
class Merged:
    """What a kind of expert makes of a backbone and experts, before a byte is moved.

    `tensors` are all of the model's, `part_of` names the weight file that one belongs to when parts have files of
    their own, and `sources` are committed files that are parts already, by their keys. `config` is config.json,
    `summary` says in a sentence what the model is, `loading` how other programs load it where that is not as a whole
    model, and `facts` go to its manifest, with those of `write_files`, which
    writes what lies beside the weights.
    """

    tensors: Mapping[str, OutputTensor]
    part_of: Callable[[str], str]
    sources: Mapping[str, Source]
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    summary: str
    write_files: Callable[[Path], Mapping[str, Any]]
    loading: str = ""


def group(tensors: Mapping[str, OutputTensor], part_of: Callable[[str], str]) -> dict[str, dict[str, OutputTensor]]:
    """Tensors by the part they belong to, parts in order of their names."""
    parts: dict[str, dict[str, OutputTensor]] = {}
    for part, name in sorted((part_of(name), name) for name in tensors):
        parts.setdefault(part, {})[name] = tensors[name]
    return parts


def part_key(tensors: Iterable[tuple[str, OutputTensor]]) -> str:
    """Identity of what a part holds, whatever file it lies in; empty when a hash is not known."""
    rows = []
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        grown = [span and span.digest for span in (tensor.beside, tensor.below)]
        if added := tensor.added:
            grown += [added.a.digest, added.b.digest, f"{added.scale!r}"]
        if not tensor.span.digest or "" in grown:
            return ""
        rows.append([name, tensor.span.digest, tensor.dtype, tensor.columns, tensor.rows, *grown])
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def whole_file(artifact: Artifact, name: str, spans: Mapping[str, TensorSpan]) -> dict[str, Source]:
    """A committed weight file by the key of the part that it is."""
    return {part_key(output_tensors(spans).items()): Source(artifact.file_url(name), artifact.entry(name))}


def parts_of(assembled: Artifact) -> dict[str, Source]:
    """The weight files of an assembled model by their keys; none for one that was merged."""
    keys: Mapping[str, str] = fact(assembled, KEYS_FACT, {})
    files = assembled.manifest.files
    return {key: Source(assembled.file_url(name), files[name]) for name, key in keys.items() if key and name in files}


def write_weights(
    tensors: Mapping[str, OutputTensor],
    part_of: Callable[[str], str],
    sources: Mapping[str, Source],
    writer: ArtifactWriter,
    mode: Mode,
    max_shard_bytes: int,
) -> dict[str, Any]:
    """Write all weight files of a model, and their index where there are several; returns facts for the manifest.

    `assembly.mode` says what the modes are.
    """
    if mode == "merge":
        plan = plan_merge(tensors, max_shard_bytes)
        execute(plan, writer)
        facts: dict[str, Any] = {"bytes_written": plan.size, "bytes_linked": 0}
    else:
        parts = group(tensors, part_of)
        # A model of one part is one file, which programs look for under this name.
        whole = plan_parts(parts if len(parts) > 1 else {WEIGHTS_NAME: dict(tensors)})
        plan, keys, written = write_parts(whole, writer, sources, mode == "link", max_shard_bytes)
        facts = {"bytes_written": written, "bytes_linked": plan.size - written, KEYS_FACT: keys}
    if plan.index:
        write_json(writer.folder / INDEX_NAME, plan.index)
    return facts


def write_parts(
    plan: MergePlan, writer: ArtifactWriter, sources: Mapping[str, Source], must_link: bool, max_shard_bytes: int
) -> tuple[MergePlan, dict[str, str], int]:
    """Take over or write every part; one that must be written and is larger than `max_shard_bytes` is split.

    Returns the plan of the files as they are now, their keys by name, and how many bytes were written. Raises
    MismatchError with `must_link` when bytes that exist cannot be taken over.
    """
    files: list[OutputFile] = []
    waiting: list[OutputFile] = []
    at_once = 1 if paths.is_local(writer.url) else COPIES_AT_ONCE  # a server copies some hundred MB a second
    taken = in_order(lambda part: _take_over(part, writer, sources, must_link), plan.files, at_once)
    for part, is_taken in zip(plan.files, taken, strict=True):
        if is_taken:
            files.append(part)
            continue
        shards = split(part, max_shard_bytes)
        files += shards
        waiting += [file for file in shards if file is part or not _take_over(file, writer, sources, must_link)]
    unwritten = [file for file in waiting if not writer.is_written(file.name)]
    size = sum(file.size for file in unwritten)
    writer.require_space(size)
    with progress("assemble", size, "bytes") as bar:
        for file in unwritten:
            write_file(file, writer, bar)
    keys = {file.name: part_key(file.tensors) for file in files}
    return MergePlan(tuple(files)), keys, sum(file.size for file in waiting)


def _take_over(file: OutputFile, writer: ArtifactWriter, sources: Mapping[str, Source], must_link: bool) -> bool:
    source = sources.get(part_key(file.tensors))
    if source is None:
        return False
    if writer.is_written(file.name) or writer.link(file.name, source.url, source.entry):
        return True
    if must_link:
        raise MismatchError(
            f"assembly.mode link needs {source.url} and {writer.url} on one file system that has hard links, or in one "
            "object store, but they are not; use auto or merge"
        )
    return False
