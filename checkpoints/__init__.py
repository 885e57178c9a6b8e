"""The store: immutable artifacts and training checkpoints on any storage that fsspec knows.

An artifact is a folder of files plus a ``manifest.json`` that makes it exist. Nothing without a manifest is ever read.
Importing this package loads neither torch nor network code.
"""

from checkpoints.artifact import Artifact, find_artifact, open_artifact
from checkpoints.errors import (
    AccessError,
    ArtifactExistsError,
    CorruptArtifactError,
    MissingArtifactError,
    MissingBucketError,
    StoreError,
    StoreFullError,
    UnreachableError,
    UserError,
)
from checkpoints.hashing import FileEntry
from checkpoints.manifest import Manifest
from checkpoints.writer import ArtifactWriter, plain_folder, write_artifact

__all__ = [
    "AccessError",
    "Artifact",
    "ArtifactExistsError",
    "ArtifactWriter",
    "CorruptArtifactError",
    "FileEntry",
    "Manifest",
    "MissingArtifactError",
    "MissingBucketError",
    "StoreError",
    "StoreFullError",
    "UnreachableError",
    "UserError",
    "find_artifact",
    "open_artifact",
    "plain_folder",
    "write_artifact",
]
