"""What a manifest that somebody else wrote must look like, value by value; raises ValueError with what is wrong.

Names become paths, sizes and hashes decide what is believed, and dates and steps are computed with, so each is checked
where it is parsed and nowhere else.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from typing import Any

from checkpoints.hashing import FileEntry
from checkpoints.names import checked_path, has_control_characters
from checkpoints.places import ATTEMPT, HIDDEN, OWN_NAMES

HASH = re.compile(r"[0-9a-f]{64}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00")
MAX_BYTES = 2**63 - 1  # of a file, on any system
MAX_TEXT = 1000
CHECKPOINT_KIND = "checkpoint"


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
    """Whether a value is a sha256 in lower-case hexadecimal."""
    return isinstance(value, str) and HASH.fullmatch(value) is not None


def _entry(name: str, value: Any) -> FileEntry:
    if not isinstance(value, dict) or not {"size", "sha256"} <= value.keys() <= {"size", "sha256", "tensors"}:
        raise ValueError(f"{name!r:.80} must have size, sha256 and tensors, but is {value!r:.60}")
    size, tensors = value["size"], value.get("tensors", {})
    if not is_step(size):
        raise ValueError(f"the size of {name!r:.80} must be a number of bytes, but is {size!r:.60}")
    if not is_hash(value["sha256"]) or not isinstance(tensors, dict) or not all(map(is_hash, tensors.values())):
        raise ValueError(f"the hashes of {name!r:.80} must be sha256 in hexadecimal, but one is not")
    return FileEntry(size, value["sha256"], tensors)


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
