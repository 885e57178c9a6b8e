"""Which weight files a model folder has, by its index where it is sharded; needs no torch."""

from __future__ import annotations

from pathlib import Path

from checkpoints.parsing import parse_object
from checkpoints.urls import checked_part
from modularforge.errors import DataError, one_line
from modularforge.model.hub_config import INDEX_NAME, WEIGHTS_NAME


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, all there; raises DataError. A single file counts before an index."""
    files = [folder / name for name in _names(folder)]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise DataError(f"{folder} must hold {missing[0]:.80}, but does not; make or fetch the model again")
    return files


def _names(folder: Path) -> list[str]:
    index = folder / INDEX_NAME
    if (folder / WEIGHTS_NAME).is_file() or not index.is_file():
        return [WEIGHTS_NAME]
    return shard_names(index.read_bytes(), str(index))


def shard_names(content: bytes, origin: str) -> list[str]:
    """The weight files that an index names, sorted; raises DataError. `origin` names the index."""
    try:
        places = parse_object(content).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(f"weight_map must name files by tensor, but is {places!r:.60}")
        # Hugging Face's indices name files beside them, never files in folders.
        return sorted({checked_part(name) for name in places.values()})
    except (ValueError, TypeError) as error:  # a list cannot be part of a set
        raise DataError(
            f"{origin} must be an index of weight files, but is not ({one_line(error)}); fetch the model again"
        ) from error
