"""Labels: what a listing tells of artifacts on an object store, so that nobody reads ten thousand manifests to ask.

Beside its manifest an artifact has an empty object whose key holds the ETag that the store gave the manifest, kind,
fingerprint and the numbers among the facts. A label is believed only where the same listing shows the manifest with
that ETag: where one is missing, stale or damaged, the manifest is read, and one without a manifest is nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from checkpoints import paths
from checkpoints.artifact import FEWEST_TO_LIST, Artifact, by_folder, open_each
from checkpoints.errors import CorruptArtifactError, StoreError
from checkpoints.keys import fits, packed, unpacked
from checkpoints.manifest import CHECKPOINT_KIND, Manifest
from checkpoints.parsing import parse_object
from checkpoints.retry import logger
from checkpoints.urls import LABEL, MANIFEST_NAME

TAG = re.compile(r"[0-9A-Za-z-]{8,64}")
Number = int | float


@dataclass(frozen=True, slots=True)
class Label:
    """What is known of a committed artifact without its manifest: `facts` are those that are numbers."""

    kind: str
    fingerprint: str
    facts: dict[str, Number]


def label_of(manifest: Manifest) -> Label:
    """What a label says of an artifact with this manifest."""
    numbers = {name: value for name, value in manifest.facts.items() if type(value) in (int, float)}
    return Label(manifest.kind, manifest.fingerprint, numbers)


def write_label(url: str, manifest: Manifest, tag: str) -> None:
    """Put a label beside the manifest to which the store gave this ETag; without one, readers read the manifest."""
    label = label_of(manifest)
    text = json.dumps([label.kind, label.fingerprint, label.facts], separators=(",", ":"), allow_nan=False)
    place = paths.join(url, LABEL, tag, packed(text.encode()))
    if manifest.kind == CHECKPOINT_KIND or not TAG.fullmatch(tag) or not fits(place):
        return
    try:
        paths.replace_bytes(place, b"")
    except StoreError as error:  # the artifact is committed
        logger.debug("%s has no label: %s", url, error)


def look_at_each(urls: Iterable[str]) -> dict[str, Label | Artifact | None]:
    """What is committed at many URLs of object stores; None where nothing is, and damaged manifests are left out.

    Where many lie in one folder, a listing says which are there; only manifests without a label are read, side by side.
    """
    found: dict[str, Label | Artifact | None] = {}
    for folder, members in by_folder(urls).items():
        if len(members) >= FEWEST_TO_LIST:
            listed = _listed(folder)
            found |= {url: listed.get(url) for url in members if listed.get(url) or url not in listed}
        opened = open_each(url for url in members if url not in found)
        found |= {url: one for url, one in opened.items() if not isinstance(one, CorruptArtifactError)}
    return found


def _listed(folder: str) -> dict[str, Label | None]:
    """The artifacts directly below a prefix, and the labels of those that have one which is right."""
    tags: dict[str, str] = {}
    labels: dict[str, list[tuple[str, str]]] = {}
    for info in paths.walk(folder):
        name, _, rest = paths.relative(info.url, folder).partition("/")
        if rest == MANIFEST_NAME:
            tags[name] = info.tag
        elif rest.startswith(f"{LABEL}/"):
            tag, _, text = rest.removeprefix(f"{LABEL}/").partition("/")
            labels.setdefault(name, []).append((tag, text))
    return {
        f"{folder}/{name}": next((_parsed(text) for there, text in labels.get(name, ()) if there == tag), None)
        for name, tag in tags.items()
    }


def _parsed(text: str) -> Label | None:
    try:
        found = parse_object(b'{"label": %s}' % unpacked(text))["label"]
        kind, fingerprint, facts = found
    except (ValueError, TypeError):
        return None
    is_right = isinstance(kind, str) and isinstance(fingerprint, str) and isinstance(facts, dict)
    return Label(kind, fingerprint, facts) if is_right and _are_numbers(facts.values()) else None


def _are_numbers(values: Iterable[object]) -> bool:
    return all(type(value) in (int, float) for value in values)
