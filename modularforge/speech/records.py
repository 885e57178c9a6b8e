"""Utterances of a source, wherever they lie: JSONL, Parquet, tar archives, folders, `datasets` folders, the Hub.

A record is what a file says; its audio is read only when features are computed. A path beside a JSONL file is that
file's neighbour; in an archive it is another member.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints import paths
from checkpoints.redact import redact
from modularforge.config import Config, SourceConfig, SpeechDataConfig
from modularforge.data.corpus import Split
from modularforge.data.files import find_files, open_bytes, read_lines, real_location
from modularforge.data.formats import parquet_rows
from modularforge.data.patterns import file_part
from modularforge.errors import DataError, one_line
from modularforge.speech.audio import UnusableAudio

AUDIO_ENDINGS = (".wav", ".flac", ".mp3", ".ogg")
TABLE_ENDINGS = (".jsonl", ".ndjson", ".json")
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
SPLIT_NAMES: Mapping[str, Split] = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "dev": "validation",
    "test": "test",
}  # fmt: skip
PREPARED = ("input_features", "labels")
Read = Callable[[], bytes]


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


def utterances(config: Config, source: SourceConfig, split: Split) -> Iterator[Utterance]:
    """Those of one split of a source, in the order of its files; raises DataError for what is no such record."""
    locations = getattr(source, split) or source.train
    if source.hub is not None:
        names = [locations] if isinstance(locations, str) else locations
        rows: Iterator[Row] = (row for name in names for row in _hub_rows(source, name))
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
    open: Callable[[str], bytes]


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
    label = source.name
    if source.label_field is not None and values.get(source.label_field) not in (None, ""):
        label = one_line(str(values[source.label_field]))
    prompt = None
    if settings.prompt_field is not None:
        _require(row, settings.prompt_field, "speech.data.prompt_field")
        prompt = str(values[settings.prompt_field] or "")
    if all(name in values for name in PREPARED):
        prepared = {name: values[name] for name in PREPARED}
        return Utterance(str(values.get(source.text_field) or ""), label, row.origin, prepared=prepared, prompt=prompt)
    _require(row, settings.audio_field, "speech.data.audio_field")
    _require(row, source.text_field, f"text_field of source {source.name}")
    text = values[source.text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{row.origin} must have text in column {source.text_field}, but has {type(text).__name__}; fix the "
            f"record, or set text_field of source {source.name}"
        )
    return _with_audio(row, values[settings.audio_field], Utterance(text, label, row.origin, prompt=prompt))


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
        read = partial(row.open, audio)
    return Utterance(found.text, found.label, redact(name), read, samples, prompt=found.prompt)


def _require(row: Row, column: str, setting: str) -> None:
    if column not in row.values:
        found = one_line(", ".join(map(str, row.values)) or "none")
        raise DataError(f"{row.origin} must have a column {column}, but has {found}; set {setting} to one of them")


def _rows(source: SourceConfig, locations: str | list[str], settings: SpeechDataConfig) -> Iterator[Row]:
    given = [locations] if isinstance(locations, str) else locations
    for location in given:
        if _is_folder(location):
            yield from _folder_rows(paths.local_path(real_location(location)), source, settings)
            continue
        for url in find_files(location):
            yield from _file_rows(url, source, settings)


def _is_folder(location: str) -> bool:
    return paths.is_local(location) and paths.local_path(location).is_dir()


def _file_rows(url: str, source: SourceConfig, settings: SpeechDataConfig) -> Iterator[Row]:
    name = file_part(url).lower()
    if name.endswith(TAR_ENDINGS):
        return _tar_rows(url, source, settings)
    if name.endswith(".parquet"):
        return _parquet_rows(url, source, settings)
    if name.endswith(AUDIO_ENDINGS):
        return iter([_audio_row(url, source, settings, _bytes_of)])
    if name.endswith(METADATA_NAMES[1]):
        return _csv_rows("\n".join(read_lines(url)), redact(url), settings, partial(_open_beside, url))
    if any(ending in name for ending in TABLE_ENDINGS):
        return _json_rows(read_lines(url), redact(url), partial(_open_beside, url))
    raise DataError(
        f"{redact(url)} must be audio ({', '.join(AUDIO_ENDINGS)}), JSONL, Parquet or a tar archive, but its name ends "
        "otherwise; name such files for this source"
    )


def _json_rows(lines: Iterator[str], name: str, open_path: Callable[[str], bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{name}:{number} must be one JSON object, but is not ({one_line(str(error))}); fix the line"
            ) from error
        if not isinstance(record, dict):
            raise DataError(f"{name}:{number} must be a JSON object, but is a {type(record).__name__}; fix the line")
        yield Row(record, f"{name}:{number}", open_path)


def _csv_rows(content: str, name: str, settings: SpeechDataConfig, open_path: Callable[[str], bytes]) -> Iterator[Row]:
    """Rows of a `metadata.csv`, whose `file_name` is the audio, as in `datasets`' audio folders."""
    for number, record in enumerate(csv.DictReader(io.StringIO(content)), start=2):
        if "file_name" in record:
            record.setdefault(settings.audio_field, record["file_name"])
        yield Row(record, f"{name}:{number}", open_path)


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
        yield Row(record, f"{redact(url)}:{number}", partial(_open_beside, url))


def _tar_rows(url: str, source: SourceConfig, settings: SpeechDataConfig) -> Iterator[Row]:
    """Records of a `metadata.jsonl` in an archive; without one, its audio files with a `.txt` each beside them."""
    try:
        with open_bytes(url) as file, tarfile.open(fileobj=file) as archive:
            members = {member.name.removeprefix("./"): member for member in archive if member.isfile()}
            # Archives are read once: compressed ones cannot be sought in, and hold hours of audio at the most.
            contents = {name: archive.extractfile(member).read() for name, member in members.items()}  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{redact(url)} must be a tar archive, but cannot be read ({one_line(str(error))}); copy it again"
        ) from error
    yield from _member_rows(contents, redact(url), source, settings)


def _member_rows(
    contents: Mapping[str, bytes], url: str, source: SourceConfig, settings: SpeechDataConfig
) -> Iterator[Row]:
    tables = [name for name in contents if name.rpartition("/")[2] in METADATA_NAMES]
    for name in tables:
        text, folder = contents[name].decode("utf-8-sig"), name.rpartition("/")[0]
        open_path = partial(_open_member, contents, folder)
        if name.endswith(".csv"):
            yield from _csv_rows(text, f"{url}/{name}", settings, open_path)
        else:
            yield from _json_rows(iter(text.splitlines()), f"{url}/{name}", open_path)
    if not tables:
        for name in sorted(contents):
            if name.lower().endswith(AUDIO_ENDINGS):
                yield _audio_row(name, source, settings, partial(_open_member, contents, ""), url)


def _open_member(contents: Mapping[str, bytes], folder: str, name: str) -> bytes:
    path = f"{folder}/{name}" if folder else name
    if path not in contents:
        raise UnusableAudio("missing", f"the archive has no {path}")
    return contents[path]


def _audio_row(
    name: str, source: SourceConfig, settings: SpeechDataConfig, open_path: Callable[[str], bytes], within: str = ""
) -> Row:
    """A recording whose text lies beside it, in a file of the same name that ends in `.txt`."""
    origin = f"{redact(within)}/{name}" if within else redact(name)
    text_name = f"{name.rpartition('.')[0]}.txt"
    try:
        text = open_path(text_name).decode("utf-8-sig").strip()
    except (UnusableAudio, DataError, UnicodeDecodeError) as error:
        raise DataError(
            f"{origin} must have its text in a file beside it that ends in .txt, but has none that can be read; add "
            "it, or name a JSONL or Parquet file with the columns audio and text"
        ) from error
    return Row({settings.audio_field: name, source.text_field: text}, origin, open_path)


def _folder_rows(folder: Path, source: SourceConfig, settings: SpeechDataConfig) -> Iterator[Row]:
    """A folder of `datasets`, of a metadata file, or of audio files with their texts; searched below."""
    if (folder / "state.json").is_file():
        yield from _saved_rows(folder)
        return
    tables = sorted(path for name in METADATA_NAMES for path in folder.rglob(name))
    files = tables or sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_ENDINGS)
    if not files:
        raise DataError(
            f"{folder} must hold metadata.jsonl, or audio files ({', '.join(AUDIO_ENDINGS)}) with a .txt each, but "
            "holds none; name another folder"
        )
    for path in files:
        yield from _file_rows(str(path), source, settings)


def _saved_rows(folder: Path) -> Iterator[Row]:
    """Rows of a data set that `datasets` saved to disk."""
    from datasets import Audio, load_from_disk

    rows = load_from_disk(str(folder))
    for name, feature in dict(rows.features).items():
        if isinstance(feature, Audio):
            rows = rows.cast_column(name, Audio(decode=False))
    for number, record in enumerate(rows, start=1):
        yield Row(record, f"{folder}:{number}", partial(_open_beside, str(folder / "state.json")))


def _hub_rows(source: SourceConfig, split: str) -> Iterator[Row]:
    """Rows of a data set of the Hub, streamed, with the bytes of their audio."""
    from datasets import Audio, load_dataset

    name = f"{source.hub} ({split})"
    try:
        rows = load_dataset(source.hub, source.hub_config, split=split, streaming=True)
        for column, feature in dict(rows.features or {}).items():
            if isinstance(feature, Audio):
                rows = rows.cast_column(column, Audio(decode=False))
        for number, record in enumerate(rows, start=1):
            yield Row(record, f"{name}:{number}", _bytes_of)
    except DataError:
        raise
    except Exception as error:  # data sets, Arrow and HTTP clients each have their own classes
        raise DataError(
            f"{name} must be a data set of the Hugging Face Hub, but cannot be read ({one_line(str(error))}); check "
            f"hub, hub_config and split of source {source.name}, and the network"
        ) from error


def _open_beside(table: str, name: str) -> bytes:
    """The bytes of a path that a table names: its neighbour, unless it is a URL or begins at the root."""
    if "://" in name or name.startswith("/"):
        return _bytes_of(name)
    return _bytes_of(paths.join(table.rpartition("/")[0] or ".", name))


def _bytes_of(url: str) -> bytes:
    try:
        with open_bytes(url) as file:
            content: bytes = file.read()
            return content
    except DataError as error:
        raise UnusableAudio("missing", str(error)) from error
