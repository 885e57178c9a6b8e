"""The manifest: what an artifact is, what it was made from, and size and digest of every file.

Weight files (safetensors) also list a hash per tensor, so one tensor can be checked without reading the rest.
The manifest carries the hash of its own bytes, so damage to it is found as well. One that somebody else wrote is
checked value by value: names become paths, sizes and hashes decide what is believed, and dates and steps are computed
with, so each is checked where it is parsed and nowhere else.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from checkpoints import digests
from checkpoints.errors import CorruptArtifactError
from checkpoints.hashing import FileEntry
from checkpoints.parsing import parse_object
from checkpoints.urls import ATTEMPT, HIDDEN, OWN_NAMES, checked_path, has_control_characters

FORMAT = 1  # all digests are sha256
ANY_DIGEST = 2  # those of a file are of the algorithm that it names
NO_HASH = "0" * 64
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00")
MAX_BYTES = 2**63 - 1  # of a file, on any system
MAX_TEXT = 1000
CHECKPOINT_KIND = "checkpoint"


@dataclass(frozen=True)
class Manifest:
    """All that is known of an artifact; immutable once committed.

    `attempt` is unique to the writer. `files_in` is the folder within the artifact that holds the files: on object
    stores the writer's attempt, so that two writers never share a key; empty on a folder, where they lie beside the
    manifest.
    """

    kind: str
    fingerprint: str
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    created: str = ""
    attempt: str = ""
    files_in: str = ""
    format: int = FORMAT

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())

    @property
    def step(self) -> int | None:
        """The step of a training checkpoint; None for what has none."""
        step = self.facts.get("step")
        return step if is_step(step) else None

    def to_json(self) -> bytes:
        """The bytes of ``manifest.json``; `sha256` in it is the hash of these bytes with 64 zeros in its place."""
        files = {name: entry.to_values() for name, entry in self.files.items()}
        values = {**vars(self), "files": files, "sha256": NO_HASH}
        content = (json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
        return _with_hash(content, hashlib.sha256(content).hexdigest())

    @staticmethod
    def from_json(content: bytes, url: str) -> Manifest:
        """Parse and check a manifest; `url` is only named in errors."""
        try:
            values = parse_object(content)
            if type(values["format"]) is not int or values["format"] not in (FORMAT, ANY_DIGEST):
                raise CorruptArtifactError(
                    f"{url} must have manifest format {FORMAT} or {ANY_DIGEST}, but has {values['format']!r:.60}; "
                    "read it with the version of modularforge that wrote it"
                )
            _check_own_hash(content, values.pop("sha256"))
            values["files"] = file_entries(values["files"])
            check_manifest(values)
            return Manifest(**values)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise CorruptArtifactError(
                f"{url} must be an undamaged manifest, but cannot be read ({reason}); "
                "restore it from a copy, or delete the folder and run its stage again"
            ) from error


def format_of(files: dict[str, FileEntry]) -> int:
    """The format of a manifest with these files: the oldest that has room for them."""
    return FORMAT if all(entry.algorithm == digests.SHA256 for entry in files.values()) else ANY_DIGEST


def _with_hash(content: bytes, digest: str) -> bytes:
    return _HASH_LINE.sub(rb"\g<1>" + digest.encode() + rb"\g<2>", content, count=1)


# Only the top level of the JSON is indented by one blank, so this matches no hash of a file.
_HASH_LINE = re.compile(rb'(?m)(^ "sha256": ")[0-9a-f]{64}(",?$)')


def _check_own_hash(content: bytes, digest: Any) -> None:
    if hashlib.sha256(_with_hash(content, NO_HASH)).hexdigest() != digest:
        raise ValueError("its own sha256 does not match")


def check_manifest(values: dict[str, Any]) -> None:
    """Check all of a parsed manifest but its files and its own hash."""
    _text(values, "kind")
    _text(values, "fingerprint")
    _require(values, "attempt", "a name such as attempt-0123456789ab", _is_attempt)
    _require(values, "files_in", "empty or the attempt", lambda value: value in ("", values["attempt"]))
    _require(values, "created", "a time in UTC such as 2026-01-31T12:00:00+00:00", _is_time)
    for name in ("settings", "facts"):
        _require(values, name, "an object", lambda value: isinstance(value, dict))
    _require(values, "inputs", "texts by name", _are_texts)
    if values["kind"] == CHECKPOINT_KIND and not is_step(step := values["facts"].get("step")):
        raise ValueError(f"facts.step must be a number of steps, but is {step!r:.60}")


def file_entries(value: Any) -> dict[str, FileEntry]:
    """Sizes and hashes by file name, of names that all can lie in one folder."""
    if not isinstance(value, dict):
        raise ValueError(f"files must be an object, but is {value!r:.60}")
    entries = {checked_path(name): _entry(name, entry) for name, entry in value.items()}
    check_names(entries)
    return entries


def check_names(names: Iterable[str]) -> None:
    """Check that names are safe and not the store's own, and that none is at the same time the folder of another."""
    known = {checked_path(name): name.split("/") for name in names}
    # Hidden folders of unfinished work are swept, wherever they lie.
    if own := [name for name, parts in known.items() if parts[0] in OWN_NAMES or any(map(HIDDEN.fullmatch, parts))]:
        raise ValueError(f"{own[0]!r:.80} is not a file name within an artifact")
    for name, parts in known.items():
        if folder := next((path for end in range(1, len(parts)) if (path := "/".join(parts[:end])) in known), None):
            raise ValueError(f"{folder!r:.80} cannot be a file and, for {name!r:.80}, a folder")


def is_step(value: Any) -> bool:
    """Whether a value is a number of steps."""
    return type(value) is int and 0 <= value <= MAX_BYTES


def is_hash(value: Any) -> bool:
    """Whether a value is 256 bits in lower-case hexadecimal."""
    return isinstance(value, str) and digests.HEXADECIMAL.fullmatch(value) is not None


def _entry(name: str, value: Any) -> FileEntry:
    algorithm = digests.BLAKE3 if isinstance(value, dict) and digests.BLAKE3 in value else digests.SHA256
    if not isinstance(value, dict) or not {"size", algorithm} <= value.keys() <= {"size", algorithm, "tensors"}:
        raise ValueError(f"{name!r:.80} must have size, {algorithm} and tensors, but is {value!r:.60}")
    size, tensors = value["size"], value.get("tensors", {})
    if not is_step(size):
        raise ValueError(f"the size of {name!r:.80} must be a number of bytes, but is {size!r:.60}")
    if not is_hash(value[algorithm]) or not isinstance(tensors, dict) or not all(map(is_hash, tensors.values())):
        raise ValueError(f"the hashes of {name!r:.80} must be {algorithm} in hexadecimal, but one is not")
    by_tensor = {tensor: digests.named(algorithm, digits) for tensor, digits in tensors.items()}
    return FileEntry(size, digests.named(algorithm, value[algorithm]), by_tensor)


def _require(values: dict[str, Any], name: str, what: str, is_right: Any) -> None:
    if name not in values:
        raise ValueError(f"{name} must be there, but is missing")
    if not is_right(values[name]):
        raise ValueError(f"{name} must be {what}, but is {values[name]!r:.60}")


def _text(values: dict[str, Any], name: str) -> None:
    _require(values, name, f"a line of at most {MAX_TEXT} characters", _is_line)


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and not has_control_characters(value)


def _is_attempt(value: Any) -> bool:
    return isinstance(value, str) and ATTEMPT.fullmatch(value) is not None


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _is_time(value: Any) -> bool:
    if not isinstance(value, str) or not TIME.fullmatch(value):
        return False
    try:
        datetime.datetime.fromisoformat(value)
    except ValueError:  # of the form, but no day or hour
        return False
    return True
