"""Open one file of a corpus, wherever it lies; what its storage refuses becomes one sentence."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from checkpoints import paths
from checkpoints.redact import redact
from modularforge.data.patterns import is_web
from modularforge.errors import DataError, one_line

SILENCE_SECONDS = 120.0
# Libraries through which file systems of fsspec ask servers; each raises exceptions of its own.
CLIENTS = ("aiohttp", "azure", "ftplib", "google", "httpx", "httpx2", "paramiko", "requests", "urllib3")


@contextmanager
def open_bytes(url: str, is_stream: bool = False) -> Iterator[Any]:
    """Open one file for binary reading; what the storage refuses, then or while reading, becomes a DataError.

    `is_stream`: it is read from the beginning to the end, which every web server can do.
    """
    with explained(url):
        if paths.is_local(url):
            with _open_regular(url) as file:
                yield file
            return
        filesystem, path = paths.filesystem(url, **_web_options(url))
        with filesystem.open(path, "rb", **({"block_size": 0} if is_stream and is_web(url) else {})) as file:
            yield file


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what a storage says into a DataError with the name of the file."""
    name = redact(url)
    try:
        yield
    except FileNotFoundError as error:
        refusal = error.__cause__  # fsspec takes every answer of a web server, and none, for a missing file
        if _is_clients(refusal) and getattr(refusal, "status", None) != 404:
            raise _unreadable(name, refusal) from error
        raise DataError(f"{name} must be a file, but does not exist; mend its path in the settings") from error
    except IsADirectoryError as error:
        raise DataError(
            f"{name} must be a file, but is a folder; name its files, for example {name}/*.jsonl.gz"
        ) from error
    except (OSError, asyncio.TimeoutError) as error:
        raise _unreadable(name, error) from error
    except Exception as error:
        if not _is_clients(error):
            raise
        raise _unreadable(name, error) from error


def _web_options(url: str) -> dict[str, Any]:
    """Time for a web server to answer, but none for the whole file: a stream is read as slowly as it is tokenised."""
    if not is_web(url):
        return {}
    import aiohttp

    own = fsspec.config.conf.get(url.partition("://")[0], {}).get("client_kwargs", {})
    patience = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
    return {"client_kwargs": {"timeout": patience, **own}}


def _unreadable(name: str, error: BaseException | None) -> DataError:
    said = one_line(redact(str(error) or type(error).__name__))
    return DataError(
        f"{name} must be readable, but the storage says: {said}; mend the path, its permissions or the network"
    )


def _open_regular(url: str) -> Any:
    path = paths.local_path(url)
    paths.check_regular(path)
    return open(path, "rb")


def _is_clients(error: BaseException | None) -> bool:
    return type(error).__module__.partition(".")[0] in CLIENTS
