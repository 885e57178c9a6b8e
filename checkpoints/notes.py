"""Lines that a job adds one by one, for others to read: what happened to it. Never written again, so never lost.

On a folder a job's lines are a file, NAME.jsonl, to which they are appended. Objects cannot grow, so on an object store
each line is one of its own, in the prefix NAME: its key holds the line too (but a very long one), so that the notes of
ten thousand jobs are read by listings. What is in their keys is what counts; a key that holds none is read. A file
NAME.jsonl there is of an older version, or was copied from a folder, and comes first.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable

from checkpoints import paths
from checkpoints.keys import fits, packed, unpacked
from checkpoints.parallel import in_order
from checkpoints.urls import FileInfo

ENDING = ".jsonl"
READS_AT_ONCE = 16
# When the line was added, in nanoseconds since 1970 so that keys are in order, a word of chance, the line.
KEY = re.compile(r"(?P<name>.+?)/(?P<place>\d{20}-[0-9a-f]{8})(/(?P<line>[0-9A-Za-z_/-]+))?")
Read = Callable[[str], bytes]


def add_line(url: str, line: bytes) -> None:
    """Add a line (without its end) to the notes at a URL that ends with `.jsonl`."""
    if paths.is_local(url):
        with paths.open_to_append(paths.local_path(url)) as file:
            file.write(line + b"\n")
        return
    place = paths.join(_prefix(url), f"{time.time_ns():020d}-{os.urandom(4).hex()}")
    key = paths.join(place, packed(line))
    paths.replace_bytes(key if fits(key) else place, line)


def read_lines(url: str) -> bytes:
    """All notes at a URL; none where there are none."""
    if paths.is_local(url):
        return read_file(url)
    return b"".join((read_file(url), *_added(paths.walk(_prefix(url)), _prefix(url).rpartition("/")[0], read_file)))


def read_folder(folder: str, read: Read | None = None) -> dict[str, bytes]:
    """The notes in a folder by their name, without the ending; `read` is how one that is a file is read."""
    read = read or read_file
    there, added = _files(folder) if paths.is_local(folder) else _listed(folder)
    files = dict(zip(there, in_order(read, there, READS_AT_ONCE), strict=True))
    found = {paths.relative(url, folder).removesuffix(ENDING): content for url, content in files.items()}
    for name, infos in added.items():
        found[name] = b"".join((found.get(name, b""), *_added(infos, folder, read)))
    return found


def notes_of(name: str) -> str:
    """The file of notes that an object's key is a line of (`events/x.jsonl`), or an empty string."""
    match = KEY.fullmatch(name)
    return f"{match['name']}{ENDING}" if match else ""


def read_file(url: str) -> bytes:
    """A file that may be missing."""
    try:
        return paths.read_bytes(url)
    except (FileNotFoundError, NotADirectoryError):
        return b""


def _prefix(url: str) -> str:
    return url.removesuffix(ENDING)


def _files(folder: str) -> tuple[list[str], dict[str, list[FileInfo]]]:
    """Files of notes in a folder."""
    return [paths.join(folder, name) for name in paths.list_folder(folder) if name.endswith(ENDING)], {}


def _listed(folder: str) -> tuple[list[str], dict[str, list[FileInfo]]]:
    """Files of notes below a prefix, and lines that are objects by the name of their notes."""
    files: list[str] = []
    added: dict[str, list[FileInfo]] = {}
    for info in paths.walk(folder):
        name = paths.relative(info.url, folder)
        if "/" not in name and name.endswith(ENDING):
            files.append(info.url)
        elif notes := notes_of(name):
            added.setdefault(notes.removesuffix(ENDING), []).append(info)
    return files, added


def _added(infos: Iterable[FileInfo], folder: str, read: Read) -> Iterable[bytes]:
    """Lines that are objects, in the order in which they were added."""
    matches = {info.url: KEY.fullmatch(paths.relative(info.url, folder)) for info in infos}
    places = sorted((match["place"], url) for url, match in matches.items() if match)
    return (_line(matches[url], url, read) + b"\n" for _, url in places)


def _line(match: re.Match[str] | None, url: str, read: Read) -> bytes:
    try:
        return unpacked(match["line"]) if match and match["line"] else read(url)
    except ValueError:
        return read(url)
