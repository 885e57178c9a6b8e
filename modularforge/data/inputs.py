"""The files that the sources name: listed before they are read, recorded beside what was made of them, compared later.

Names, sizes and times (or an object store's ETag) tell whether files are those that were read. They are facts of the
artifact, not part of its identity: the same text elsewhere is the same corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pydantic import BaseModel, ValidationError

from checkpoints import Artifact, paths
from checkpoints.parallel import in_order
from checkpoints.redact import redact
from modularforge.config import Config
from modularforge.data.corpus import SPLITS
from modularforge.data.files import SAMPLE_PREFIX, all_matches, explained, file_identity
from modularforge.data.patterns import is_web
from modularforge.errors import DataError, StoreError
from modularforge.log import logger

# Of a corpus of more files only these are recorded: a manifest is read whole by everybody.
RECORDED_FILES = 1000
SHOWN = 3
SOURCES_FACT = "sources"  # in the manifest of prepared data: the files that were read
LOOKS_AT_ONCE = 16  # an object store answers each in tens of milliseconds


class _Recorded(BaseModel):
    count: int
    files: dict[str, tuple[int | None, str | None]]


@dataclass(frozen=True)
class Match:
    """A file as a split of a source names it."""

    source: str
    split: str
    url: str
    is_sample: bool


def list_matches(config: Config) -> list[Match]:
    """Every file of every split, as often as it is named; raises DataError where nothing matches."""
    return [
        Match(source.name, split, url, location.startswith(SAMPLE_PREFIX))
        for source in config.data.sources
        if source.hub is None
        for split in SPLITS
        for location in _as_list(getattr(source, split))
        for url in all_matches(location)
    ]


def warn_of_repeats(matches: list[Match]) -> None:
    """Say which files are named twice: within one split they are read once, elsewhere in each of their places."""
    places: dict[str, list[Match]] = {}
    for match in matches:
        places.setdefault(file_identity(match.url), []).append(match)
    repeated = [found for found in places.values() if len(found) > 1]
    for found in repeated[:SHOWN]:
        name, named = redact(found[0].url), dict.fromkeys(f"{match.split} of {match.source}" for match in found)
        if len(named) < len(found):
            logger.warning("%s is named %d times in %s; a split reads it once", name, len(found), ", ".join(named))
        if len(named) > 1:
            logger.warning("%s is in %s: what is measured there was trained on or counts twice", name, ", ".join(named))
    if len(repeated) > SHOWN:
        logger.warning("%d more files are named twice in data.sources", len(repeated) - SHOWN)


def file_states(matches: list[Match]) -> dict[str, list[Any]]:
    """Size and time (or ETag) by URL; raises DataError for a file that is not there."""
    urls = list(dict.fromkeys(match.url for match in matches))
    return dict(zip(urls, in_order(file_state, urls, LOOKS_AT_ONCE), strict=True))


def require_unchanged(states: Mapping[str, list[Any]]) -> None:
    """Raise DataError where a file is gone or was written again since `states` were looked at.

    A corpus is read once for each split: half of it would be of the one file and half of the other. Web addresses are
    not looked at, since servers may give each answer another ETag.
    """
    files = [(redact(url), state, url) for url, state in states.items() if not is_web(url)]
    changes = chain.from_iterable(in_order(lambda item: list(_difference(*item)), files, LOOKS_AT_ONCE))
    if change := next(changes, None):
        raise DataError(
            f"the files of data.sources must stay as they are while they are read, but {change}; run prepare-data "
            "again when nobody writes to them"
        )


def record(matches: list[Match], states: Mapping[str, list[Any]]) -> dict[str, Any]:
    """What a manifest says of the files that were read; those of the package are the package's."""
    own = list(dict.fromkeys(match.url for match in matches if not match.is_sample))
    return {"count": len(own), "files": {redact(url): states[url] for url in own[:RECORDED_FILES]}}


def changes_since(recorded: Any, config: Config) -> list[str]:
    """What differs between the files of now and those that were recorded, in words."""
    matches = [match for match in list_matches(config) if not match.is_sample]
    now = {redact(url): url for url in dict.fromkeys(match.url for match in matches)}
    try:
        then = _Recorded.model_validate(recorded)
    except ValidationError:
        return ["what its manifest says of them cannot be read"]
    changes = [f"{name} is gone" for name in then.files if name not in now]
    kept = list(now.items())[:RECORDED_FILES]
    changes += [f"{name} is new" for name, _ in kept if name not in then.files]
    known = [(name, then.files[name], url) for name, url in kept if name in then.files]
    changes += chain.from_iterable(in_order(lambda item: list(_difference(*item)), known, LOOKS_AT_ONCE))
    if len(now) != then.count and not changes:
        changes.append(f"there were {then.count} files, and now {len(now)}")
    return changes


def warn_of_changes(config: Config, artifact: Artifact) -> None:
    """Say so when the files are not those that were read; the prepared data stays what it is."""
    recorded = artifact.manifest.facts.get(SOURCES_FACT)
    try:
        changes = changes_since(recorded, config) if recorded else []
    except (DataError, StoreError) as error:
        changes = [str(error)]
    if changes:
        more = f" (and {len(changes) - SHOWN} more)" if len(changes) > SHOWN else ""
        logger.warning(
            "the sources are not what they were when %s was prepared: %s%s; that data is used as it is: delete "
            "it, or name another --data-dir, to read them again",
            artifact.url,
            "; ".join(changes[:SHOWN]),
            more,
        )


def _difference(name: str, old: Sequence[Any], url: str) -> Iterator[str]:
    try:
        new = file_state(url)
    except DataError as error:
        yield f"{name} is gone" if isinstance(error.__cause__, FileNotFoundError) else str(error)
        return
    if old[0] != new[0]:
        yield f"{name} had {old[0]} bytes and now has {new[0]}"
    elif old[1] != new[1]:
        yield f"{name} was written again"


def file_state(url: str) -> list[Any]:
    """Size and time (or ETag) of a file; raises DataError."""
    with explained(url):
        filesystem, path = paths.filesystem(url)
        info = filesystem.info(path)
    times = (info.get(name) for name in ("ETag", "etag", "mtime", "LastModified", "last_modified", "created"))
    return [info.get("size"), next((str(time) for time in times if time), None)]


def _as_list(locations: str | list[str] | None) -> list[str]:
    return [locations] if isinstance(locations, str) else locations or []
