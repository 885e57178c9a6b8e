"""Models for evaluation and generation: files are mapped instead of copied, and read no earlier than they are needed.

Of an artifact, every tensor is compared with its hash when it is handed out, so an expert that no token visits is
neither read nor, on an object store where it has a file of its own, fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from checkpoints import Artifact, digests, find_artifact, open_artifact, paths
from checkpoints.errors import CorruptArtifactError
from modularforge.errors import DataError
from modularforge.model.backbone import Decoder
from modularforge.model.folder import load_model, load_on_demand, with_own_rows, with_text_router
from modularforge.model.hub_config import CONFIG_NAME, OWN_ROWS_NAME, TABLES_NAME, is_moe, parse_config, read_config
from modularforge.pretrained.sources import require_no_file


class MappedWeights:
    """The tensors of a committed model by name, mapped from local files and compared with their hashes when read."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.file_of = {tensor: name for name, entry in artifact.manifest.files.items() for tensor in entry.tensors}
        self._open: dict[str, Any] = {}

    def __call__(self, name: str) -> Tensor:
        """One tensor; raises CorruptArtifactError when its bytes are not those that were committed."""
        file = self.file_of[name]
        if file not in self._open:
            # Its tensors are checked one by one, so here the size is enough.
            self._open[file] = safe_open(self.artifact.local_file(file, verify=False), framework="pt")
        tensor: Tensor = self._open[file].get_tensor(name)
        recorded = self.artifact.manifest.files[file].tensors[name]
        found = digests.like(recorded)
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
        if found.text() != recorded:
            raise CorruptArtifactError(
                f"{name} in {self.artifact.file_url(file)} must have the hash that its manifest says, but has "
                "another: a bit flipped, or another version is in its place; restore it from a copy, or make it again"
            )
        return tensor


@dataclass(frozen=True)
class StoredModel:
    """A committed model of any store, or (`artifact` None) any model folder of this machine."""

    url: str
    artifact: Artifact | None = None

    def file(self, name: str) -> Path:
        """Local path of one file, of an artifact compared with its hash; it may not be there in other folders."""
        return self.artifact.local_file(name) if self.artifact else paths.local_path(self.url) / name

    def bytes_of(self, name: str) -> bytes | None:
        """Content of one file, or None where there is none."""
        if self.artifact is not None:
            return self.artifact.read_bytes(name) if name in self.artifact.manifest.files else None
        file = paths.local_path(self.url) / name
        return file.read_bytes() if file.is_file() else None

    @cached_property
    def values(self) -> dict[str, Any]:
        """config.json."""
        if self.artifact is None:
            return read_config(paths.local_path(self.url))
        return parse_config(self.artifact.read_bytes(CONFIG_NAME), self.artifact.file_url(CONFIG_NAME))

    def load(self) -> Decoder:
        """The model; the experts of an assembled one are read on demand."""
        if self.artifact is None:
            return load_model(paths.local_path(self.url))
        if not is_moe(self.values):
            return load_model(self.artifact.local_folder())
        weights = MappedWeights(self.artifact)
        decoder = load_on_demand(self.values, weights.file_of, weights)
        names = self.artifact.manifest.files
        if TABLES_NAME in names:
            decoder = with_text_router(decoder, self.artifact.local_file(TABLES_NAME))
        return with_own_rows(decoder, self.artifact.local_file(OWN_ROWS_NAME)) if OWN_ROWS_NAME in names else decoder


def stored_model(url: str) -> StoredModel:
    """The model at a URL: an artifact of any store, or any model folder of this machine; raises DataError."""
    if not paths.is_local(url):
        return StoredModel(url, open_artifact(url))
    require_no_file(url, "--model")
    if not paths.local_path(url).is_dir():
        raise DataError(f"--model must be a model folder, but {url} does not exist; name the folder with config.json")
    return StoredModel(url, find_artifact(url))
