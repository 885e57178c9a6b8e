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
from checkpoints.forms import check_manifest, file_entries, is_step
from checkpoints.hashing import FileEntry, describe_file
from checkpoints.parsing import parse_object
from checkpoints.places import MANIFEST_NAME

__all__ = ["FORMAT", "MANIFEST_NAME", "FileEntry", "Manifest", "describe_file"]

FORMAT = 1
NO_HASH = "0" * 64


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
        values = {**asdict(self), "sha256": NO_HASH}
        content = (json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
        return _with_hash(content, hashlib.sha256(content).hexdigest())

    @staticmethod
    def from_json(content: bytes, url: str) -> Manifest:
        """Parse and check a manifest; `url` is only named in errors."""
        try:
            values = parse_object(content)
            if type(values["format"]) is not int or values["format"] != FORMAT:
                raise CorruptArtifactError(
                    f"{url} must have manifest format {FORMAT}, but has {values['format']!r:.60}; "
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


def _with_hash(content: bytes, digest: str) -> bytes:
    return _HASH_LINE.sub(rb"\g<1>" + digest.encode() + rb"\g<2>", content, count=1)


# Only the top level of the JSON is indented by one blank, so this matches no hash of a file.
_HASH_LINE = re.compile(rb'(?m)(^ "sha256": ")[0-9a-f]{64}(",?$)')


def _check_own_hash(content: bytes, digest: Any) -> None:
    if hashlib.sha256(_with_hash(content, NO_HASH)).hexdigest() != digest:
        raise ValueError("its own sha256 does not match")
