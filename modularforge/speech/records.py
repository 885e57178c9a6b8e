"""Utterances of a source, wherever they lie: JSONL, Parquet, tar archives, folders, `datasets` folders, the Hub.

A record is what a file says; its audio is read only when features are computed. A path beside a JSONL file is that
file's neighbour; in an archive it is another member.
"""

from __future__ import annotations

import hashlib
import lzma
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from checkpoints import paths
from checkpoints.redact import redact
from modularforge.config import Config, SourceConfig, SpeechDataConfig
from modularforge.data.compression import compression_of
from modularforge.data.corpus import Split
from modularforge.data.files import find_files, open_bytes, read_lines, real_location
from modularforge.data.formats import (
    csv_records,
    fields,
    hub_records,
    json_records,
    label_of,
    parquet_rows,
    require_object,
    undecoded,
)
from modularforge.data.inputs import file_state
from modularforge.data.patterns import file_part, is_web
from modularforge.errors import DataError, one_line
from modularforge.speech.audio import UnusableAudio

AUDIO_ENDINGS = (".wav", ".flac", ".mp3", ".ogg")
TABLE_ENDINGS = (".jsonl", ".ndjson", ".json")
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
# An archive is held in memory, and a few bytes of a compressed or sparse one may stand for any number.
ARCHIVE_BYTES = 1 << 34
SPLIT_NAMES: Mapping[str, Split] = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "dev": "validation",
    "test": "test",
}  # fmt: skip
PREPARED = ("input_features", "labels")
Read = Callable[[], bytes]
Open = Callable[[str], Read]
"""From the name of a file in a record to what reads it."""


@dataclass(frozen=True)
class Utterance:
    """One record: where its audio lies, or its samples, or prepared features; and what was said.

    `read` gives the bytes of a file. `samples` are (values, rate). `origin` names it in listings.
    """

    text: str
    label: str
    origin: str
    read: Read | None = None
    samples: tuple[Any, int] | None = None
    prepared: Mapping[str, Any] = field(default_factory=dict)
    prompt: str | None = None

    def state(self) -> Any:
        """What tells its audio from another one's by the same name: size and time of a file, a hash of all else.

        None where nothing does: of what is missing, and on the web.
        """
        if isinstance(self.read, Stored):
            return self.read.state()
        try:
            content = self.read() if self.read else pickle.dumps([self.samples, dict(self.prepared)])
        except UnusableAudio:
            return None
        return hashlib.blake2b(content, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Stored:
    """Reads a file of its own; raises UnusableAudio where that cannot be done."""

    url: str

    def __call__(self) -> bytes:
        """Its bytes."""
        try:
            with open_bytes(self.url) as file:
                content: bytes = file.read()
                return content
        except DataError as error:
            raise UnusableAudio("missing", str(error)) from error

    def state(self) -> list[Any] | None:
        """Its size and time; None where nothing says them."""
        try:
            return None if is_web(self.url) else file_state(self.url)
        except DataError:
            return None


def utterances(config: Config, source: SourceConfig, split: Split) -> Iterator[Utterance]:
    """Those of one split of a source, in the order of its files; raises DataError for what is no such record."""
    locations = getattr(source, split) or source.train
    if source.hub is not None:
        names = [locations] if isinstance(locations, str) else locations
        found = (item for name in names for item in hub_records(name, source))
        rows: Iterator[Row] = (Row(record, origin, Stored) for record, origin in found)
    else:
        rows = _rows(source, locations, config.speech.data)
    for row in rows:
        if _split_of(config, source, split, row) == split:
            yield _utterance(config.speech.data, source, row)


@dataclass(frozen=True)
class Row:
    """A record as a file has it, and how to open a path that it names."""

    values: Mapping[str, Any]
    origin: str
    open: Open


def _split_of(config: Config, source: SourceConfig, split: Split, row: Row) -> Split:
    """The split of a record that was read for `split`; only training files are divided."""
    if split != "train" and getattr(source, split):
        return split
    if (name := config.speech.data.split_field) is not None:
        _require(row, name, "speech.data.split_field")
        said = str(row.values[name]).lower()
        if said not in SPLIT_NAMES:
            raise DataError(
                f"{row.origin} must name a split in column {name}: {', '.join(SPLIT_NAMES)}, but has {said!r:.60}; fix "
                "the record, or leave speech.data.split_field null"
            )
        return SPLIT_NAMES[said]
    digest = hashlib.blake2b(f"{config.preparation_seed}:{row.origin}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64 / config.speech.data.heldout_fraction
    for index, held_out in enumerate(("validation", "test")):
        if not getattr(source, held_out) and index <= position < index + 1:
            return SPLIT_NAMES[held_out]
    return "train"


def _utterance(settings: SpeechDataConfig, source: SourceConfig, row: Row) -> Utterance:
    values = row.values
    prompt = None
    if settings.prompt_field is not None:
        _require(row, settings.prompt_field, "speech.data.prompt_field")
        prompt = str(values[settings.prompt_field] or "")
    if all(name in values for name in PREPARED):
        prepared = {name: values[name] for name in PREPARED}
        text, label = str(values.get(source.text_field) or ""), label_of(values, source, row.origin)
        return Utterance(text, label or source.name, row.origin, prepared=prepared, prompt=prompt)
    _require(row, settings.audio_field, "speech.data.audio_field")
    text, label = fields(values, source, row.origin)
    found = Utterance(text, label or source.name, row.origin, prompt=prompt)
    return _with_audio(row, values[settings.audio_field], found)


def _with_audio(row: Row, audio: Any, found: Utterance) -> Utterance:
    """The utterance with its audio: a path, bytes, or samples, as `datasets` writes them."""
    name, content, samples = found.origin, None, None
    if isinstance(audio, Mapping):
        if audio.get("bytes"):
            content, audio = audio["bytes"], str(audio.get("path") or "")
        elif audio.get("array") is not None:
            samples, audio = (audio["array"], int(audio.get("sampling_rate") or 0)), str(audio.get("path") or "")
        else:
            audio = audio.get("path")
    if isinstance(audio, bytes):
        content, audio = audio, ""
    if isinstance(audio, str) and audio:
        name = audio if "://" in audio else f"{row.origin.rpartition(':')[0] or row.origin}: {audio}"
    read: Read | None = None
    if content is not None:
        read = partial(bytes, content)
    elif samples is None and isinstance(audio, str) and audio:
        read = row.open(audio)
    return Utterance(found.text, found.label, redact(name), read, samples, prompt=found.prompt)


def _require(row: Row, column: str, setting: str) -> None:
    if column not in row.values:
        found = one_line(", ".join(map(str, row.values)) or "none")
        raise DataError(f"{row.origin} must have a column {column}, but has {found}; set {setting} to one of them")


def _rows(source: SourceConfig, locations: str | list[str], settings: SpeechDataConfig) -> Iterator[Row]:
    given = [locations] if isinstance(locations, str) else locations
    for location in given:
        if is_folder(real := real_location(location)):
            yield from _folder_rows(paths.local_path(real), source, settings)
            continue
        for url in find_files(location):
            yield from _file_rows(url, source, settings)


def is_folder(location: str) -> bool:
    """Whether a source names a folder of this machine, which is searched."""
    return paths.is_local(location) and paths.local_path(location).is_dir()


def _file_rows(url: str, source: SourceConfig, settings: SpeechDataConfig) -> Iterator[Row]:
    name = file_part(url).lower()
    unpacked = name.removesuffix(compression_of(url) or "")
    if name.endswith(TAR_ENDINGS):
        return _tar_rows(url, source, settings)
    if name.endswith(".parquet"):
        return _parquet_rows(url, source, settings)
    if name.endswith(AUDIO_ENDINGS):
        return iter([_audio_row(url, source, settings, Stored)])
    if unpacked.endswith(METADATA_NAMES[1]):
        return _csv_rows(read_lines(url), redact(url), settings, partial(_beside, url))
    if unpacked.endswith(TABLE_ENDINGS):
        return _json_rows(read_lines(url), redact(url), partial(_beside, url))
    raise DataError(
        f"{redact(url)} must be audio ({', '.join(AUDIO_ENDINGS)}), JSONL, Parquet or a tar archive, but its name ends "
        "otherwise; name such files for this source"
    )


def _json_rows(lines: Iterable[str], name: str, open_path: Open) -> Iterator[Row]:
    for record, origin in json_records(lines, name):
        require_object(record, origin)
        yield Row(record, origin, open_path)


def _csv_rows(lines: Iterable[str], name: str, settings: SpeechDataConfig, open_path: Open) -> Iterator[Row]:
    """Rows of a `metadata.csv`, whose `file_name` is the audio, as in `datasets`' audio folders."""
    for record, origin in csv_records(lines, name):
        if "file_name" in record:
            record.setdefault(settings.audio_field, record["file_name"])
        yield Row(record, origin, open_path)


def _parquet_rows(url: str, source: SourceConfig, settings: SpeechDataConfig) -> Iterator[Row]:
    import pyarrow.parquet

    with open_bytes(url) as file:
        try:
            existing = pyarrow.parquet.ParquetFile(file).schema_arrow.names
        except (pyarrow.ArrowException, OSError, ValueError):
            existing = []  # the reader has a sentence for it
    own = (settings.audio_field, source.text_field, source.label_field, settings.prompt_field, settings.split_field)
    wanted = [name for name in own if name]
    if all(name in existing for name in PREPARED):
        columns = [name for name in (*PREPARED, *wanted) if name in existing]
    else:
        columns = wanted
    for number, record in enumerate(parquet_rows(url, list(dict.fromkeys(columns))), start=1):
        yield Row(record, f"{redact(url)}:{number}", partial(_beside, url))


def _tar_rows(url: str, source: SourceConfig, settings: SpeechDataConfig) -> Iterator[Row]:
    """Records of a `metadata.jsonl` in an archive; without one, its audio files with a `.txt` each beside them."""
    try:
        with open_bytes(url) as file, tarfile.open(fileobj=file) as archive:
            # Read as a whole: compressed ones cannot be sought in, and hold hours of audio at the most.
            contents = _contents(archive, redact(url))
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, MemoryError) as error:
        raise DataError(
            f"{redact(url)} must be a tar archive, but cannot be read ({one_line(str(error))}); copy it again"
        ) from error
    yield from _member_rows(contents, redact(url), source, settings)


def _contents(archive: tarfile.TarFile, url: str) -> dict[str, bytes]:
    """The files of an archive by name; raises DataError for too many bytes, and ReadError where it is damaged."""
    found: dict[str, bytes] = {}
    size = 0
    for member in archive:
        size += member.size if member.isfile() else 0
        if size > ARCHIVE_BYTES:
            raise DataError(
                f"{url} must hold at most {ARCHIVE_BYTES >> 30} GiB, which are read into memory, but holds more; "
                "unpack it and name its folder"
            )
        if member.isfile():
            found[member.name.removeprefix("./")] = archive.extractfile(member).read()  # type: ignore[union-attr]
    _check_end(archive)
    return found


def _check_end(archive: tarfile.TarFile) -> None:
    """Raise ReadError where members stop without the zeros that end an archive: tarfile takes damage for the end."""
    file: Any = archive.fileobj
    file.seek(archive.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if not block or block.strip(b"\0"):
        raise tarfile.ReadError(f"what is at byte {archive.offset} is neither a file nor the end")
    while file.read(1 << 20):  # compressed ones have a checksum behind
        pass


def _member_rows(
    contents: Mapping[str, bytes], url: str, source: SourceConfig, settings: SpeechDataConfig
) -> Iterator[Row]:
    tables = [name for name in contents if name.rpartition("/")[2] in METADATA_NAMES]
    for name in tables:
        lines = _lines(contents[name], f"{url}/{name}")
        open_path = partial(_member, contents, name.rpartition("/")[0])
        if name.endswith(".csv"):
            yield from _csv_rows(lines, f"{url}/{name}", settings, open_path)
        else:
            yield from _json_rows(lines, f"{url}/{name}", open_path)
    if not tables:
        for name in sorted(contents):
            if name.lower().endswith(AUDIO_ENDINGS):
                yield _audio_row(name, source, settings, partial(_member, contents, ""), url)


def _lines(content: bytes, origin: str) -> list[str]:
    """The lines of a table in an archive, between line feeds alone, as those of files are."""
    try:
        return content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{origin} must be UTF-8 text, but byte {error.start} is 0x{error.object[error.start]:02x}; convert it "
            "(iconv -f ENCODING -t UTF-8)"
        ) from error


def _member(contents: Mapping[str, bytes], folder: str, name: str) -> Read:
    path = f"{folder}/{name}" if folder else name

    def read() -> bytes:
        if path not in contents:
            raise UnusableAudio("missing", f"the archive has no {path}")
        return contents[path]

    return read


def _audio_row(name: str, source: SourceConfig, settings: SpeechDataConfig, open_path: Open, within: str = "") -> Row:
    """A recording whose text lies beside it, in a file of the same name that ends in `.txt`."""
    origin = f"{redact(within)}/{name}" if within else redact(name)
    text_name = f"{name.rpartition('.')[0]}.txt"
    try:
        text = open_path(text_name)().decode("utf-8-sig").strip()
    except (UnusableAudio, DataError, UnicodeDecodeError) as error:
        raise DataError(
            f"{origin} must have its text in a file beside it that ends in .txt, but has none that can be read; add "
            "it, or name a JSONL or Parquet file with the columns audio and text"
        ) from error
    return Row({settings.audio_field: name, source.text_field: text}, origin, open_path)


def _folder_rows(folder: Path, source: SourceConfig, settings: SpeechDataConfig) -> Iterator[Row]:
    """A folder of `datasets`, of a metadata file, or of audio files with their texts; searched below, but for what is
    hidden.
    """
    if (folder / "state.json").is_file():
        yield from _saved_rows(folder)
        return
    below = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    seen = [folder / path for path in below if not any(part.startswith(".") for part in path.parts)]
    tables = [path for path in seen if path.name in METADATA_NAMES]
    files = tables or [path for path in seen if path.suffix.lower() in AUDIO_ENDINGS]
    if not files:
        raise DataError(
            f"{folder} must hold metadata.jsonl, or audio files ({', '.join(AUDIO_ENDINGS)}) with a .txt each, but "
            "holds none; name another folder"
        )
    for path in files:
        yield from _file_rows(str(path), source, settings)


def _saved_rows(folder: Path) -> Iterator[Row]:
    """Rows of a data set that `datasets` saved to disk."""
    from datasets import load_from_disk

    for number, record in enumerate(undecoded(load_from_disk(str(folder))), start=1):
        yield Row(record, f"{folder}:{number}", partial(_beside, str(folder / "state.json")))


def _beside(table: str, name: str) -> Stored:
    """The file that a table names: its neighbour, unless it is a URL or begins at the root."""
    return Stored(name if "://" in name or name.startswith("/") else neighbour(table, name))


def neighbour(table: str, name: str) -> str:
    """The URL of a file beside another one: with its query on the web, in the archive where that one lies in one."""
    path = file_part(table)
    folder = path.removesuffix(path.rpartition("/")[2])
    return f"{folder or './'}{quote(name) if is_web(table) else name}{table.removeprefix(path)}"
