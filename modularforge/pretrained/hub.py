"""What talks to the Hub of models: which files a model has there, downloads into Hugging Face's own cache, uploads.

That cache is shared with other tools, resumes downloads, and is what works without a network. `HF_ENDPOINT`, `HF_HOME`,
`HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to `huggingface_hub`.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from modularforge.errors import DataError, StoreError, one_line
from modularforge.log import logger
from modularforge.model.hub_config import CONFIG_NAME
from modularforge.pretrained.sources import HubName

CHUNK_BYTES = 1 << 20
Upload = Path | bytes  # a file here, or its content


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub describes it: `sha256` of large files, git's hash of small ones."""

    name: str
    size: int
    sha256: str | None
    git_hash: str | None


@dataclass(frozen=True)
class HubListing:
    """The files of a model at one commit."""

    commit: str
    files: dict[str, HubFile]


def list_files(name: HubName) -> HubListing:
    """Ask the Hub; raises ConnectionError when it cannot be asked, DataError when there is no such model."""
    from huggingface_hub import HfApi

    with _explained(name):
        info = HfApi().model_info(name.repository, revision=name.revision, files_metadata=True)
    files = {
        item.rfilename: HubFile(item.rfilename, item.size or 0, item.lfs.sha256 if item.lfs else None, item.blob_id)
        for item in info.siblings or []
    }
    return HubListing(info.sha or name.revision, files)


def cached_folder(name: HubName) -> Path | None:
    """The folder of a model in Hugging Face's cache, whole or not, without asking the Hub; None when there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name.repository, revision=name.revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None


def download_config(name: HubName) -> Path:
    """config.json alone, from the cache where the Hub cannot be asked; raises ConnectionError or DataError."""
    from huggingface_hub import hf_hub_download

    with _explained(name):
        return Path(hf_hub_download(name.repository, CONFIG_NAME, revision=name.revision))


def download(name: HubName, listing: HubListing, file: str) -> Path:
    """One file, in the cache or from the Hub, compared with what the Hub says of it.

    A damaged copy in the cache is downloaded again, once; raises StoreError when it still differs.
    """
    from huggingface_hub import hf_hub_download

    told = listing.files[file]

    def get(again: bool) -> Path:
        try:
            with _explained(name):
                # By branch or tag, not by commit: only so the cache knows without a network what they stand for.
                return Path(hf_hub_download(name.repository, file, revision=name.revision, force_download=again))
        except ConnectionError as error:
            raise StoreError(
                f"{file} of {name.repository} must arrive whole from the Hub, but the download broke off ({error}); "
                "nothing was written, and the same command goes on where it stopped"
            ) from error

    path = get(again=False)
    if not _is_as_told(path, told):
        logger.warning("%s of %s is damaged in the cache; it is downloaded again", file, name.repository)
        path = get(again=True)
    if not _is_as_told(path, told):
        raise StoreError(
            f"{file} of {name.repository} must have the size and hash that the Hub says ({told.size} bytes), but has "
            "not after a second download; nothing was written, try again later"
        )
    return path


def _is_as_told(path: Path, told: HubFile) -> bool:
    if path.stat().st_size != told.size:
        return False
    if told.sha256:
        return _hash(path, hashlib.sha256()) == told.sha256
    if told.git_hash:
        return _hash(path, hashlib.sha1(f"blob {told.size}\0".encode())) == told.git_hash
    return True


def _hash(path: Path, digest: hashlib._Hash) -> str:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def upload(name: HubName, files: Mapping[str, Upload], is_private: bool = False) -> str:
    """All files, by their names there, as one commit to a model, which is made where there is none; its URL.

    A revision but `main` is a branch, made where there is none. Raises DataError, StoreError.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    hub, added = HfApi(), [CommitOperationAdd(there, one) for there, one in files.items()]
    try:
        with _explained(name):
            hub.create_repo(name.repository, private=is_private or None, exist_ok=True)  # or as its owner has it
            if name.revision != "main":
                hub.create_branch(name.repository, branch=name.revision, exist_ok=True)
            words = "Model pushed by ModularForge"
            return str(
                hub.create_commit(name.repository, added, commit_message=words, revision=name.revision).commit_url
            )
    except ConnectionError as error:
        raise StoreError(
            f"{name.repository} must be a name on the Hub that you may write to, but the upload broke off ({error}); "
            "set HF_TOKEN, and repeat the command"
        ) from error


def snapshot(name: HubName, patterns: list[str]) -> Path:
    """The files of a model that match, in Hugging Face's cache; without a network those that are there already.

    Raises DataError, StoreError.
    """
    try:
        listing = list_files(name)
    except ConnectionError as error:
        if (folder := cached_folder(name)) is not None:
            return folder
        raise StoreError(
            f"{name.repository} must be cached or reachable on the Hub, but is neither ({error}); name a folder"
        ) from error
    wanted = [file for file in listing.files if any(fnmatch(file, pattern) for pattern in patterns)]
    if not wanted:
        raise DataError(f"{name.repository} must hold a model, but has none of its files; choose another")
    found = [download(name, listing, file) for file in wanted]
    return found[0].parent


@contextmanager
def _explained(name: HubName) -> Iterator[None]:
    """Turn what huggingface_hub raises into DataError (no such model) or ConnectionError (the Hub cannot be asked)."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise DataError(
            f"{name.repository} must be open to you, but its owner has not let you in; accept its terms on the Hub and "
            "set HF_TOKEN"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise DataError(
            f"{name.repository} at {name.revision} must be a model on the Hub or a folder here, but is neither (or is "
            "private: set HF_TOKEN); fix the name"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise StoreError(
                f"Hugging Face's cache must be writable and have room, but: {error}; free some, or set HF_HOME"
            ) from error
        raise ConnectionError(one_line(str(error) or type(error).__name__)) from error
    except Exception as error:  # its HTTP client has changed from version to version, and each has its own classes
        raise ConnectionError(one_line(str(error) or type(error).__name__)) from error
