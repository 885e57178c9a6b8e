"""The few storage calls everything else is built from, by URL; the only file that asks fsspec for a file system.

A plain path and ``file://`` are a folder; ``s3://``, ``memory://`` and the rest are object stores. Every call retries
passing trouble with a log line and raises StoreError with bucket, key and action; a missing file, in a bucket that
exists, is FileNotFoundError.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import fsspec

from checkpoints import retry
from checkpoints.errors import StoreError
from checkpoints.folder import (
    FolderStore,
    check_regular,
    check_within,
    leads_out,
    linked_folders,
    open_to_append,
    sync_file,
    sync_folder,
    write_atomically,
    written_beside,
)
from checkpoints.objects import ObjectStore
from checkpoints.options import settings_hash
from checkpoints.redact import is_redacted
from checkpoints.s3 import PART_BYTES, S3Store, open_client
from checkpoints.urls import MANIFEST_NAME, FileInfo, is_local, join, local_path, relative

__all__ = [
    "FileInfo", "check_regular", "check_within", "copy_inside", "create_bytes", "exists", "file_size", "filesystem",
    "is_local", "join", "leads_out", "linked_folders", "list_folder", "local_path", "open_to_append", "read_bytes",
    "relative", "remove", "replace_bytes", "store_of", "sync_file", "sync_folder", "upload", "walk", "write_atomically",
    "written_beside",
]  # fmt: skip

Store = FolderStore | S3Store | ObjectStore
S3_PROTOCOLS = ("s3", "s3a")
# In their keys and addresses `::` is text; after other protocols it chains file systems (`zip://a.txt::b.zip`).
UNCHAINED = (*S3_PROTOCOLS, "gs", "gcs", "az", "abfs", "abfss", "http", "https")


def store_of(url: str) -> Store:
    """The store behind a URL; raises StoreError for a protocol that fsspec does not know."""
    if is_local(url):
        return FolderStore()
    _require_usable(url)
    protocol = url.split("://", 1)[0]
    root = "" if protocol in (*S3_PROTOCOLS, "memory") else url.split("/", 3)[2]
    settings = json.dumps(fsspec.config.conf.get(protocol, {}), default=str, sort_keys=True)
    try:
        return _object_store(protocol, root, os.getpid(), settings, settings_hash())
    except Exception as error:
        if protocol in S3_PROTOCOLS:
            raise retry.unusable_settings(error, url) from error
        if not isinstance(error, ValueError | ImportError):
            raise
        raise StoreError(
            f"{url} must be a path or a URL with a protocol that fsspec knows, but: {error}; fix the URL"
        ) from error


def filesystem(url: str, **options: Any) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path within it, for streaming inputs; listings are never cached.

    `options` are those of the file system. A local pipe, socket or device is refused, as opening it may wait for ever.
    """
    _require_usable(url)
    if is_local(url):
        with contextlib.suppress(OSError, ValueError):  # a pattern, or not there: for the reader to say
            check_regular(local_path(url))
        return fsspec.filesystem("file"), str(local_path(url))
    if not url.startswith("memory://"):
        options["use_listings_cache"] = False
    protocol = url.partition("://")[0]
    try:
        if "::" in url and protocol in UNCHAINED:
            kind = fsspec.get_filesystem_class(protocol)
            return kind(**kind._get_kwargs_from_urls(url), **options), kind._strip_protocol(url)
        files, path = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise StoreError(
            f"{url} must be a path or a URL with a protocol that fsspec knows, but: {error}; fix the URL"
        ) from error
    return files, path


def _require_usable(url: str) -> None:
    if not is_local(url) and is_redacted(url):
        raise StoreError(
            f"{url} must be a whole URL, but its secret was not saved with the settings; give the URL again (--set, "
            "--output-dir, --data-dir), or put the secret into fsspec's configuration"
        )
    protocol, _, rest = url.partition("://")
    if protocol in S3_PROTOCOLS and "@" in rest.partition("/")[0]:  # the library would quote it as a wrong name
        raise StoreError(
            f"{url} must begin with the name of a bucket, but has a user or a password before it; put them into "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


def exists(url: str) -> bool:
    """Whether a file is there; a missing bucket or a refusal is an error, not an answer."""
    try:
        store_of(url).size(url)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def file_size(url: str) -> int:
    """Size of a file in bytes; raises FileNotFoundError."""
    return store_of(url).size(url)


def read_bytes(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """A file, or bytes [start, end) of it; raises FileNotFoundError."""
    return store_of(url).read(url, start or 0, end)


def list_folder(url: str) -> list[str]:
    """Names of the entries of a folder, sorted; empty when there is none."""
    return store_of(url).list_names(url)


def walk(url: str) -> list[FileInfo]:
    """All files below a URL."""
    return store_of(url).walk(url)


def create_bytes(url: str, content: bytes) -> str:
    """Write a file that must not exist yet, in one atomic step; raises FileExistsError. Returns its ETag, if known.

    On an object store a lost answer is resolved by reading back, so `content` must be unique to its writer.
    """
    return store_of(url).create(url, content)


def replace_bytes(url: str, content: bytes) -> None:
    """Write a small mutable file (logs, records) in one atomic step."""
    store_of(url).replace(url, content)


def upload(url: str, chunks: Iterable[bytes | memoryview], part_bytes: int = 0, resumes: bool = False) -> None:
    """Write a file from its bytes with only a few of them in memory; nothing appears before the last.

    On S3 in parts of a size, and where it `resumes`, parts that an interrupted upload of the same bytes left are not
    sent again.
    """
    store = store_of(url)
    if isinstance(store, S3Store):
        store.upload(url, chunks, part_bytes or PART_BYTES, resumes)
    else:
        store.upload(url, chunks)


def copy_inside(source: str, target: str, size: int | None = None) -> bool:
    """Give a file a second name without moving its bytes: a hard link, or a copy made by the object store.

    `size` in bytes, where it is known, saves a request. False, with nothing done, where that cannot be: another disk or
    store, or one that has no such copies.
    """
    if is_local(source) != is_local(target):
        return False
    if not is_local(source) and source.split("://", 1)[0] != target.split("://", 1)[0]:
        return False
    return store_of(target).copy_inside(source, target, size)


def remove(url: str) -> None:
    """Delete a file or a folder with all it holds; nothing happens when there is none.

    An artifact stops existing in the first step (its folder is renamed, or its manifest deleted), so a deletion that is
    cut short leaves garbage but never half an artifact.
    """
    store = store_of(url)
    if isinstance(store, FolderStore):
        store.delete_folder(url)
        return
    below = [info.url for info in store.walk(join(url))]
    manifest = join(url, MANIFEST_NAME)
    store.delete([manifest] if manifest in below else [])
    store.delete([url, *(name for name in below if name != manifest)])


@lru_cache(maxsize=64)
def _object_store(protocol: str, root: str, process: int, settings: str, environment: int) -> S3Store | ObjectStore:
    """One client per process and configuration; the arguments after `root` only tell stale clients apart."""
    if protocol not in S3_PROTOCOLS:
        return ObjectStore(fsspec.core.url_to_fs(f"{protocol}://{root}")[0], protocol)
    return S3Store(open_client(fsspec.config.conf.get("s3", {})))
