"""Write artifacts so that they appear whole or not at all.

On a folder the files are written beside the artifact's place and the folder is renamed into it. On an object store they
are uploaded under a key that belongs to this attempt, and the manifest, created last and only if absent, makes the
artifact exist. Of two writers exactly one wins, and the other is told.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints import digests, paths, retry
from checkpoints.artifact import Artifact
from checkpoints.errors import ArtifactExistsError, StoreError, StoreFullError
from checkpoints.folder import exchange
from checkpoints.garbage import sweep_beside
from checkpoints.hashing import FileEntry, FileHasher, describe_file
from checkpoints.journal import Journal, attempt_of
from checkpoints.labels import write_label
from checkpoints.manifest import Manifest, check_names, format_of
from checkpoints.owners import locked
from checkpoints.parallel import in_order, meanwhile
from checkpoints.redact import redact_values
from checkpoints.retry import logger
from checkpoints.s3 import PART_BYTES
from checkpoints.streams import (
    Chunk,
    continue_local,
    passed_to,
    read_chunks,
    steady_pieces,
    write_local,
)
from checkpoints.urls import (
    JOURNAL_NAME,
    LABEL,
    MANIFEST_NAME,
    OWN_NAMES,
    OWNER_NAME,
    UPLOAD_SCRATCH,
    hidden_name,
    new_attempt,
)

FILES_AT_ONCE = 3
SMALL_PART_BYTES = 6 << 20  # where memory is bounded; S3 wants at least 5 MiB
MAX_PARTS = 9_000  # S3 allows 10,000


class ArtifactWriter:
    """A local scratch folder whose files become the artifact at `url` when `commit` is called."""

    def __init__(self, url: str, folder: Path, attempt: str, manifest: Manifest, resumes: bool = False) -> None:
        self.url = url
        self.folder = folder
        self.attempt = attempt
        self.resumes = resumes
        self._manifest = manifest
        self._files_url = str(folder) if paths.is_local(url) else paths.join(url, attempt)
        self._journal = Journal(paths.join(self._files_url, JOURNAL_NAME) if resumes else "")
        self.written: dict[str, FileEntry] = self._journal.read(self._files_url)
        self.files: dict[str, FileEntry] = {}
        self.may_be_committed = False

    def write_json(self, name: str, value: Any) -> None:
        """Write one JSON file into the artifact, without secrets."""
        target = self._path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            json.dumps(redact_values(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    def write_chunks(self, name: str, chunks: Iterable[Chunk], size: int = 0) -> FileEntry:
        """Write one file from its bytes, hashed as they pass; to an object store they go at once, not to the disk.

        `size` is needed only for files of more than 140 GB on an object store, to choose larger parts.
        """
        hasher = FileHasher(name)
        if paths.is_local(self.url):
            write_local(self._path(name), chunks, hasher)
        else:
            with hasher.in_background() as update:
                self._upload(name, passed_to(update, steady_pieces(chunks)), size, PART_BYTES)
        self.written[name] = hasher.entry()
        return self.written[name]

    def write_known(self, name: str, chunks: Iterable[Chunk], size: int, finish: Callable[[], FileEntry]) -> FileEntry:
        """Write one file of `size` bytes whose hashes the caller takes: `finish` tells its entry after the last chunk.

        A resumable writer goes on in a file that an interrupted one left: bytes, or parts on S3, that are there already
        are compared instead of written.
        """
        if paths.is_local(self.url):
            continue_local(self._path(name), chunks, size)
        else:
            self._upload(name, chunks, size, SMALL_PART_BYTES, self.resumes)
        self.adopt(name, finish())
        return self.written[name]

    def upload_copy(self, name: str, chunks: Iterable[Chunk], entry: FileEntry) -> None:
        """Send a copy of a file to an object store; parts that an earlier writer of this attempt left stay."""
        self._upload(name, chunks, entry.size, PART_BYTES, resumes=True)
        self.adopt(name, entry)

    def link(self, name: str, source_url: str, entry: FileEntry) -> bool:
        """Take a committed file without moving its bytes: a hard link, or a copy made by the object store.

        False, with nothing done, where that cannot be: another disk, another store, or a store without such copies.
        """
        target = self._path(name) if paths.is_local(self.url) else self._upload_url(name)
        if not paths.copy_inside(source_url, str(target), entry.size):
            return False
        self.adopt(name, entry)
        return True

    def is_written(self, name: str) -> bool:
        """Whether this writer, or an interrupted one that it continues, has finished a file."""
        return name in self.written

    def require_space(self, size: int) -> None:
        """Raise StoreFullError before the work when `size` bytes more do not fit on the disk of a local artifact."""
        free = shutil.disk_usage(self.folder).free if paths.is_local(self.url) else size
        if free < size:
            raise StoreFullError(
                f"{self.url} needs {size / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free on that disk; "
                "make room, or use another --output-dir"
            )

    def commit(self, facts: dict[str, Any] | None = None, created: str = "", old: Artifact | None = None) -> Artifact:
        """Hash the files, publish them, and create the manifest; raises ArtifactExistsError when another won.

        An `old` artifact at this place is there until this one is, and deleted then: one of them is found at any time.
        """
        self.files = self._all_files()
        self._journal.remove()
        local = paths.is_local(self.url)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        manifest = replace(
            self._manifest,
            facts=redact_values(facts or {}),
            files=self.files,
            created=created or now,
            attempt=self.attempt,
            files_in="" if local else self.attempt,
            format=format_of(self.files),
        )
        content = manifest.to_json()
        self.may_be_committed = True
        if old is not None:
            self._take_place_of(old, content)
        elif local:
            self._rename_into_place(content)
        else:
            write_label(self.url, manifest, self._create_manifest(content))
        if local:
            sweep_beside(paths.local_path(self.url))
        return Artifact(self.url, manifest)

    def adopt(self, name: str, entry: FileEntry) -> None:
        """Take a file that is in its place already, with these hashes, as written."""
        self.written[name] = entry
        self._journal.add(name, entry)

    def discard(self) -> None:
        """Delete what was uploaded, unless the manifest may name it or a later writer may go on with it."""
        if self.may_be_committed or self.resumes or paths.is_local(self.url):
            return
        try:
            paths.remove(paths.join(self.url, self.attempt))
        except StoreError as error:  # the first error is the one to report; gc finds the rest
            logger.warning("could not delete %s: %s", paths.join(self.url, self.attempt), error)

    def _upload(self, name: str, chunks: Iterable[Chunk], size: int, least: int, resumes: bool = False) -> None:
        paths.upload(self._upload_url(name), chunks, max(least, -(-size // MAX_PARTS)), resumes)

    def _upload_url(self, name: str) -> str:
        return paths.join(self.url, self.attempt, self._checked(name))

    def _path(self, name: str) -> Path:
        return self.folder / self._checked(name)

    def _checked(self, name: str) -> str:
        """The name, if readers will accept it; it may be that of somebody else's file."""
        try:
            check_names([name])
        except ValueError as error:
            raise StoreError(f"{self.url} must have files with plain names, but {error}; rename it") from error
        return name

    def _all_files(self) -> dict[str, FileEntry]:
        """Entries of all files; those that were put into the folder without `write_chunks` are published now."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        names = sorted(path.relative_to(self.folder).as_posix() for path in found)
        waiting = [self._checked(name) for name in names if name not in self.written and name not in OWN_NAMES]
        for name in waiting:
            paths.check_within(self.folder / name, self.folder)  # readers would refuse the link
        publish = self._hash_and_sync if paths.is_local(self.url) else self._upload_file
        entries = in_order(publish, waiting, FILES_AT_ONCE)
        return dict(sorted({**self.written, **dict(zip(waiting, entries, strict=True))}.items()))

    def _hash_and_sync(self, name: str) -> FileEntry:
        path = self.folder / name
        _give_rights_of(self.folder, path)
        with meanwhile(lambda: paths.sync_file(path)):
            return describe_file(path)

    def _upload_file(self, name: str) -> FileEntry:
        path = self.folder / name
        return self.write_chunks(name, read_chunks(path), path.stat().st_size)

    def _take_place_of(self, old: Artifact, manifest: bytes) -> None:
        """Replace an artifact: on a folder by an exchange, on an object store by the manifest, which names files."""
        if old.is_deleted():
            self.may_be_committed = False
            raise self._exists()
        if not paths.is_local(self.url):
            paths.replace_bytes(paths.join(self.url, MANIFEST_NAME), manifest)
            paths.remove(paths.join(self.url, LABEL))  # of the old manifest
            if old.manifest.files_in not in ("", self.attempt):
                paths.remove(paths.join(self.url, old.manifest.files_in))
            return
        self._make_durable(manifest)
        target = paths.local_path(self.url)
        # Under a name that no later writer continues: what is left there after a kill are the old files.
        staged = target.with_name(hidden_name(target.name))
        os.rename(self.folder, staged)
        try:
            exchange(staged, target)
        except OSError as error:
            shutil.rmtree(staged, ignore_errors=True)
            raise retry.explain(error, "replace", self.url) from error
        _finish(target)
        with suppress(StoreError):  # what is in place is whole
            paths.remove(str(staged))

    def _make_durable(self, manifest: bytes) -> None:
        (self.folder / MANIFEST_NAME).write_bytes(manifest)
        paths.sync_file(self.folder / MANIFEST_NAME)
        for folder in (*(path for path in self.folder.rglob("*") if path.is_dir()), self.folder):
            paths.sync_folder(folder)

    def _rename_into_place(self, manifest: bytes) -> None:
        """Make the folder durable, then visible by one rename, then the rename durable."""
        self._make_durable(manifest)
        target = paths.local_path(self.url)
        try:
            os.rename(self.folder, target)
        except OSError as error:
            self._explain_failed_rename(target, manifest, error)
        _finish(target)

    def _explain_failed_rename(self, target: Path, manifest: bytes, error: OSError) -> None:
        """Return when the rename did happen (network file systems lose answers), or raise what is wrong."""
        found = target / MANIFEST_NAME
        if found.is_file() and found.read_bytes() == manifest:
            return
        if found.is_file():
            shutil.rmtree(self.folder, ignore_errors=True)  # nobody will go on with it
            raise self._exists() from error
        if target.exists():
            raise StoreError(
                f"{self.url} must be free or a committed artifact, but holds files without a {MANIFEST_NAME}; "
                "nothing reads them: move this folder away and start again"
            ) from error
        raise retry.explain(error, "commit", self.url) from error

    def _create_manifest(self, manifest: bytes) -> str:
        try:
            return paths.create_bytes(paths.join(self.url, MANIFEST_NAME), manifest)
        except FileExistsError as error:
            self.may_be_committed = False
            raise self._exists() from error

    def _exists(self) -> ArtifactExistsError:
        return ArtifactExistsError(
            f"{self.url} must not exist yet, but another writer has committed it; it is left as it is: "
            "use it, or delete it and start again"
        )


def plain_folder(folder: Path) -> ArtifactWriter:
    """A writer of files into a folder that becomes no artifact."""
    return ArtifactWriter(str(folder), folder, "", Manifest("folder", ""))


@contextmanager
def write_artifact(
    url: str,
    kind: str,
    fingerprint: str,
    settings: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
    resume: str = "",
) -> Iterator[ArtifactWriter]:
    """A writer with a scratch folder that is removed at the end, whatever happens; nothing appears without `commit`.

    With `resume`, finished files are kept when the writer is interrupted, and the next writer with the same `resume`
    takes them over: it must be a hash (hexadecimal) of all that the bytes depend on.
    """
    digests.new()  # what is chosen is refused before the work whose bytes it would hash
    manifest = Manifest(kind, fingerprint, redact_values(settings or {}), inputs or {})
    with ExitStack() as stack:
        try:
            attempt, folder, resumes = _place(url, resume, stack)
        except OSError as error:
            raise retry.explain(error, "write", url) from error
        writer = ArtifactWriter(url, folder, attempt, manifest, resumes)
        try:
            yield writer
        except OSError as error:
            if retry.is_full(error):
                raise retry.explain(error, "write", url) from error
            raise
        finally:
            writer.discard()
            if not resumes or not paths.is_local(url) or _holds_nothing(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _holds_nothing(folder: Path) -> bool:
    """Whether a scratch folder, where it is still there, has no file that another writer could take over."""
    return folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())


def _place(url: str, resume: str, stack: ExitStack) -> tuple[str, Path, bool]:
    """Attempt and scratch folder of a writer, and whether it can be resumed: not while another process does so."""
    if resume:
        attempt = attempt_of(resume)
        folder = _scratch_folder(url, attempt)
        is_mine = stack.enter_context(locked(folder, resumes=paths.is_local(url)))
        if is_mine or not paths.is_local(url):
            return attempt, folder, True
    attempt = new_attempt()
    folder = _scratch_folder(url, attempt)
    stack.enter_context(locked(folder))  # so that `gc` sees that this writer lives
    return attempt, folder, False


def _scratch_folder(url: str, attempt: str) -> Path:
    if not paths.is_local(url):
        return Path(tempfile.mkdtemp(prefix=UPLOAD_SCRATCH))
    target = paths.local_path(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.{attempt}")
    folder.mkdir(exist_ok=True)  # a resumable one may be there
    return folder


def _finish(target: Path) -> None:
    """Make a rename durable; until then the note told whose the folder was, and in the artifact nobody reads it."""
    paths.sync_folder(target.parent)
    with suppress(OSError):
        (target / OWNER_NAME).unlink()


def _give_rights_of(folder: Path, path: Path) -> None:
    """Let read a file who may read its folder, which has its rights by the umask: safetensors lets the owner only.

    A file with a second name, in Hugging Face's cache say, is left as it is.
    """
    status, rights = path.stat(), folder.stat().st_mode & 0o666
    if status.st_nlink == 1 and status.st_mode & 0o777 != rights:
        with suppress(OSError):  # file systems without such rights
            path.chmod(rights)
