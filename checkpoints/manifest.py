"""The manifest: what an artifact is, what it was made from, and size and sha256 of every file.

Weight files (safetensors) also list a hash per tensor, so one tensor can be checked without reading the rest.
The manifest carries the hash of its own bytes, so damage to it is found as well.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from checkpoints.errors import CorruptArtifactError
from checkpoints.hashing import FileEntry, describe_file

__all__ = ["FORMAT", "MANIFEST_NAME", "FileEntry", "Manifest", "describe_file"]

MANIFEST_NAME = "manifest.json"
FORMAT = 1
NO_HASH = "0" * 64
SAFE_NAME = re.compile(r"(?!/)(?!.*//)(?!(.*/)?\.{1,2}(/|$))[^\\\0]+")


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

    def to_json(self) -> bytes:
        """The bytes of ``manifest.json``; `sha256` in it is the hash of these bytes with 64 zeros in its place."""
        values = {**asdict(self), "sha256": NO_HASH}
        content = (json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
        return _with_hash(content, hashlib.sha256(content).hexdigest())

    @staticmethod
    def from_json(content: bytes, url: str) -> Manifest:
        """Parse and check a manifest; `url` is only named in errors."""
        try:
            values = json.loads(content)
            if values["format"] != FORMAT:
                raise CorruptArtifactError(
                    f"{url} must have manifest format {FORMAT}, but has {values['format']}; "
                    "read it with the version of modularforge that wrote it"
                )
            _check_own_hash(content, values.pop("sha256"))
            if values["files_in"] not in ("", values["attempt"]):
                raise ValueError(f"files_in is {values['files_in']!r}")
            values["files"] = {_checked_name(name): FileEntry(**entry) for name, entry in values["files"].items()}
            return Manifest(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptArtifactError(
                f"{url} must be an undamaged manifest, but cannot be read ({error}); "
                "restore it from a copy, or delete the folder and run its stage again"
            ) from error


def _with_hash(content: bytes, digest: str) -> bytes:
    return _HASH_LINE.sub(rb"\g<1>" + digest.encode() + rb"\g<2>", content, count=1)


# Only the top level of the JSON is indented by one blank, so this matches no hash of a file.
_HASH_LINE = re.compile(rb'(?m)(^ "sha256": ")[0-9a-f]{64}(",?$)')


def _check_own_hash(content: bytes, digest: str) -> None:
    if hashlib.sha256(_with_hash(content, NO_HASH)).hexdigest() != digest:
        raise ValueError("its own sha256 does not match")


def _checked_name(name: str) -> str:
    """Refuse names that would leave the artifact's folder when they are joined to it."""
    if not SAFE_NAME.fullmatch(name) or name == MANIFEST_NAME:
        raise ValueError(f"{name!r} is not a file name within an artifact")
    return name
