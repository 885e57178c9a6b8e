"""Every environment variable that the store reads by itself; credentials are left to botocore and fsspec."""

from __future__ import annotations

import os
from pathlib import Path

from checkpoints.errors import StoreError
from checkpoints.redact import redact

DEFAULT_ATTEMPTS = 8  # with the delays in retry.py about half a minute of trouble is ridden out


def max_attempts() -> int:
    """How often one request is sent at the most: botocore's own variable AWS_MAX_ATTEMPTS, or 8."""
    text = os.environ.get("AWS_MAX_ATTEMPTS", "")
    return max(1, int(text)) if text.isdecimal() else DEFAULT_ATTEMPTS


def endpoint() -> str:
    """The configured address of the object store, in words and without secrets."""
    address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return redact(address) if address else "the store's default endpoint"


def cache_folder() -> Path:
    """Where files of object stores are kept for local reading: $MODULARFORGE_CACHE or the user's cache folder."""
    if chosen := os.environ.get("MODULARFORGE_CACHE"):
        return Path(chosen)
    above = os.environ.get("XDG_CACHE_HOME")
    return (Path(above) if above else home_folder("MODULARFORGE_CACHE") / ".cache") / "modularforge"


def cache_limit() -> int | None:
    """Bytes of one file from which on it is read by ranges, of which so many are kept: $MODULARFORGE_CACHE_GB, or None.

    Raises StoreError for what is no number above 0.
    """
    text = os.environ.get("MODULARFORGE_CACHE_GB")
    try:
        found = None if not text else int(float(text) * 1e9)
    except (ValueError, OverflowError):
        found = 0
    if found is not None and found <= 0:
        raise StoreError(
            f"MODULARFORGE_CACHE_GB must be a number of GB above 0, but is {text!r:.80}; correct or unset it"
        )
    return found


def home_folder(instead: str) -> Path:
    """The user's home; asked for only when no variable answers, because containers' users may have none."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise StoreError(
            f"the user's home folder must be known, but HOME is not set and user {os.getuid()} has no entry in the "
            f"system's list; set HOME or {instead}"
        ) from error


def settings_hash() -> int:
    """Changes when a variable changes that storage libraries read, so that no stale client is used."""
    prefixes = ("AWS_", "FSSPEC_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
    return hash(tuple(sorted(item for item in os.environ.items() if item[0].upper().startswith(prefixes))))
