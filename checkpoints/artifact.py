"""Read artifacts by their manifest only; every byte that is handed out has been compared with its hash.

Also finds what is stored below a URL: the artifacts of a run and its training checkpoints.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import paths
from checkpoints.errors import CorruptArtifactError, MissingArtifactError
from checkpoints.fetching import fetch_file
from checkpoints.hashing import FileEntry
from checkpoints.manifest import CHECKPOINT_KIND, Manifest
from checkpoints.options import cache_folder
from checkpoints.owners import one_at_a_time
from checkpoints.parallel import in_order
from checkpoints.parsing import parse_json
from checkpoints.retry import call
from checkpoints.streams import check_local_file, check_size, compare_size, passing_file, stream_file
from checkpoints.urls import ATTEMPT, HIDDEN, MANIFEST_NAME, OWNER_NAME, UnsafeNameError, checked_path

READS_AT_ONCE = 8
LOOKS_AT_ONCE = 16  # small requests, of which each waits tens of milliseconds for the store
FEWEST_TO_LIST = 8  # an expert has about as many files, which a listing of all of them names too


@dataclass(frozen=True)
class Artifact:
    """A committed folder: `url` and what its manifest says."""

    url: str
    manifest: Manifest

    def file_url(self, name: str) -> str:
        """URL of one file; raises CorruptArtifactError when the manifest does not name it, or a link leads away."""
        self.entry(name)
        url = self.place_of(name)
        if paths.is_local(url):
            paths.check_within(paths.local_path(url), paths.local_path(self.url))
        return url

    def entry(self, name: str) -> FileEntry:
        """Size and hashes of one file; raises CorruptArtifactError when the manifest does not name it."""
        if name not in self.manifest.files:
            known = ", ".join(sorted(self.manifest.files))
            raise CorruptArtifactError(
                f"{self.url} must hold {name:.80}, but its manifest names {known:.200}; make it again"
            )
        return self.manifest.files[name]

    def place_of(self, name: str) -> str:
        """Where one file must lie, whatever lies there."""
        return paths.join(self.url, self.manifest.files_in, name)

    def stream(self, name: str) -> Iterator[bytes]:
        """One file in parts; when a byte differs, CorruptArtifactError comes after the last: use nothing before."""
        return stream_file(self.file_url(name), self.manifest.files[name])

    def read_bytes(self, name: str) -> bytes:
        """One small file, checked."""
        return b"".join(self.stream(name))

    def read_json(self, name: str) -> Any:
        """Parse one JSON file, checked."""
        try:
            return parse_json(self.read_bytes(name))
        except ValueError as error:
            raise CorruptArtifactError(
                f"{self.place_of(name)} must be JSON, but is not ({error}); make the artifact again"
            ) from error

    def local_file(self, name: str, verify: bool = True) -> Path:
        """One file as a local path; from an object store it is downloaded once, by one process of a machine.

        Its hash is compared once per process; `verify=False` compares only the size of a file that is local already.
        """
        url, entry = self.file_url(name), self.manifest.files[name]
        if not paths.is_local(url):
            return self._cached_file(name)
        path = paths.local_path(url)
        if verify:
            return check_local_file(path, entry)
        check_size(url, entry)
        return path

    def local_folder(self, verify: bool = True, names: Iterable[str] | None = None) -> Path:
        """All files, or at least these, in one local folder, for tools that read folders."""
        wanted = self.manifest.files if names is None else names
        files = {name: self.local_file(name, verify) for name in wanted}
        if paths.is_local(self.url):
            return paths.local_path(self.url)
        # Of the manifest's own hash: nobody else's manifest can put files into this folder.
        folder = cache_folder() / "folders" / hashlib.sha256(self.manifest.to_json()).hexdigest()
        for name, path in files.items():
            _link(path, folder / name)
        return folder

    def verify(self) -> None:
        """Read every byte and compare with the manifest; raises CorruptArtifactError that names all that is wrong."""
        if found := self.problems():
            raise CorruptArtifactError("\n".join(found))

    def problems(self) -> list[str]:
        """One sentence for each file that is missing, extra, truncated, swapped or changed."""
        return [*self.extra_files(), *(text for name in self.manifest.files if (text := self.problem_of(name)))]

    def problem_of(self, name: str) -> str:
        """What is wrong with one file, or an empty string; reads all of it."""
        try:
            for _ in passing_file(self.file_url(name), self.manifest.files[name]):
                pass
        except CorruptArtifactError as error:
            return str(error)
        return ""

    def is_deleted(self) -> bool:
        """Whether it is gone or replaced since it was opened, as old checkpoints are while their job runs."""
        try:
            now = find_artifact(self.url)
        except CorruptArtifactError:
            return False
        return now is None or now.manifest.attempt != self.manifest.attempt

    def extra_files(self) -> list[str]:
        """One sentence for each file that lies among the artifact's files without being named.

        Artifacts inside this one (partitions lie in `data/`) and unfinished work answer for themselves.
        """
        folder = paths.join(self.url, self.manifest.files_in)
        names = {paths.relative(info.url, folder) for info in paths.walk(folder)}
        inner = tuple(name.removesuffix(MANIFEST_NAME) for name in names if name.endswith(f"/{MANIFEST_NAME}"))
        return [
            f"{paths.join(folder, name)} must not be there, because the manifest does not name it; move it away"
            for name in sorted(names - {*self.manifest.files, MANIFEST_NAME, OWNER_NAME})
            if not name.startswith(inner) and not any(HIDDEN.fullmatch(part) for part in name.split("/"))
        ]

    def _cached_file(self, name: str) -> Path:
        entry = self.manifest.files[name]
        target = cache_folder() / entry.digest.replace(":", "-") / Path(name).name
        with suppress(CorruptArtifactError):  # not there yet, or damaged in the cache
            return check_local_file(target, entry)
        with one_at_a_time(target.parent):  # ranks of a node that begin together fetch it once
            try:
                return check_local_file(target, entry)
            except CorruptArtifactError:

                def write() -> None:  # from the first byte, if it must be tried again
                    with paths.written_beside(target) as scratch:
                        fetch_file(self.file_url(name), entry, scratch)

                call("write", str(target), write)
        return target


def find_artifact(url: str) -> Artifact | None:
    """The committed artifact at a URL, or None; a missing bucket or a damaged manifest is an error, not None."""
    manifest_url = paths.join(url, MANIFEST_NAME)
    try:
        if paths.is_local(url):
            paths.check_within(paths.local_path(manifest_url), paths.local_path(url))
        content = paths.read_bytes(manifest_url)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Artifact(url, Manifest.from_json(content, manifest_url))


def find_each(urls: Iterable[str]) -> dict[str, Artifact | None]:
    """The committed artifacts at many URLs of object stores, side by side; damaged ones are left out.

    Where many lie in one folder, a listing says which are there, so that only those are asked for.
    """
    found: dict[str, Artifact | None] = {}
    for folder, members in by_folder(urls).items():
        if len(members) >= FEWEST_TO_LIST:
            listed = {info.url for info in paths.walk(folder)}
            found |= {url: None for url in members if paths.join(url, MANIFEST_NAME) not in listed}
        there = [url for url in members if url not in found]
        found |= {url: one for url, one in open_each(there).items() if not isinstance(one, CorruptArtifactError)}
    return found


def open_each(urls: Iterable[str]) -> dict[str, Artifact | CorruptArtifactError | None]:
    """What is at each of these URLs, asked for side by side."""
    known = list(urls)
    return dict(zip(known, in_order(_open, known, LOOKS_AT_ONCE), strict=True))


def check_sizes(artifacts: Iterable[Artifact]) -> None:
    """Raise CorruptArtifactError when a file is missing, shorter or longer than its manifest says.

    On an object store by listings, one for each folder of many artifacts, and not by a request for each file.
    """
    known = {artifact.url: artifact for artifact in artifacts}
    for url, artifact in known.items():
        for name in artifact.manifest.files if paths.is_local(url) else ():
            check_size(artifact.file_url(name), artifact.manifest.files[name])
    for folder, members in by_folder(url for url in known if not paths.is_local(url)).items():
        roots = [folder] if len(members) >= FEWEST_TO_LIST else members
        walked = in_order(lambda root: [*paths.walk(root)], roots, READS_AT_ONCE)
        sizes = {info.url: info.size for found in walked for info in found}
        for artifact in map(known.__getitem__, members):
            for name, entry in artifact.manifest.files.items():
                compare_size(artifact.file_url(name), entry, sizes.get(artifact.file_url(name)))


def by_folder(urls: Iterable[str]) -> dict[str, list[str]]:
    """URLs by the folder that they lie in, each once."""
    found: dict[str, list[str]] = {}
    for url in dict.fromkeys(urls):
        found.setdefault(url.rstrip("/").rpartition("/")[0], []).append(url)
    return found


def open_artifact(url: str) -> Artifact:
    """The committed artifact at a URL; raises MissingArtifactError."""
    artifact = find_artifact(url)
    if artifact is None:
        raise MissingArtifactError(
            f"{url} must be a committed artifact, but has no {MANIFEST_NAME}; run the stage that makes it first"
        )
    return artifact


def _link(path: Path, link: Path) -> None:
    """Point a symbolic link at a file; safe when several processes do it at once."""
    link.parent.mkdir(parents=True, exist_ok=True)
    scratch = link.with_name(f".{link.name}.{os.urandom(4).hex()}")
    os.symlink(path.resolve(), scratch)
    os.replace(scratch, link)


def find_artifacts(url: str) -> list[Artifact]:
    """All committed artifacts at and below a URL, by URL; raises MissingArtifactError when there are none."""
    artifacts, damaged = examine(url)
    if damaged:
        raise CorruptArtifactError("\n".join(damaged.values()))
    return artifacts


def examine(url: str) -> tuple[list[Artifact], dict[str, str]]:
    """All committed artifacts at and below a URL, and by URL what is wrong with manifests that cannot be read."""
    folders, unsafe = _artifact_folders(url)
    if not folders and not unsafe:
        raise MissingArtifactError(
            f"{url} must hold a committed artifact, but no {MANIFEST_NAME} is there or below; fix the URL"
        )
    found = dict(zip(folders, in_order(_open, folders, READS_AT_ONCE), strict=True))
    artifacts = [one for one in found.values() if isinstance(one, Artifact)]
    named = {artifact.place_of(name) for artifact in artifacts for name in artifact.manifest.files}
    whole = [artifact for artifact in artifacts if paths.join(artifact.url, MANIFEST_NAME) not in named]
    damaged = {folder: str(one) for folder, one in found.items() if isinstance(one, CorruptArtifactError)}
    return whole, {**unsafe, **damaged}


def newest_checkpoints(artifacts: Iterable[Artifact], url: str) -> list[Artifact]:
    """Of every job that has training checkpoints, the newest one, behind its pieces where it has some.

    Raises MissingArtifactError, which names the URL.
    """
    newest: dict[str, Artifact] = {}
    found = list(artifacts)
    for artifact in found:
        if artifact.manifest.kind == CHECKPOINT_KIND:
            job = artifact.url.rsplit("/", 1)[0]
            newest[job] = max(newest.get(job, artifact), artifact, key=lambda one: one.manifest.step or 0)
    if not newest:
        raise MissingArtifactError(
            f"{url} must hold a training checkpoint, but only other artifacts are there; leave out --newest"
        )
    places = {artifact.url.replace("/step-", "/pieces-") for artifact in newest.values()}
    return [*(one for one in found if one.url.rsplit("/", 1)[0] in places), *newest.values()]


def _open(url: str) -> Artifact | CorruptArtifactError | None:
    try:
        return find_artifact(url)
    except CorruptArtifactError as error:
        return error


def _artifact_folders(root: str) -> tuple[list[str], dict[str, str]]:
    """The folders of manifests that readers may see, sorted, and what is wrong with the names of others."""
    folders: list[str] = []
    unsafe: dict[str, str] = {}
    for info in paths.walk(root):
        name = paths.relative(info.url, root)
        parts = name.split("/")
        if parts[-1] != MANIFEST_NAME or any(ATTEMPT.fullmatch(part) or HIDDEN.fullmatch(part) for part in parts):
            continue
        try:
            checked_path(name)
            folders.append(info.url.removesuffix(f"/{MANIFEST_NAME}"))
        except UnsafeNameError as error:
            unsafe[info.url] = (
                f"{info.url!r:.200} must have a plain name below {root}, but {error}; rename or delete it"
            )
    return sorted(folders), unsafe
