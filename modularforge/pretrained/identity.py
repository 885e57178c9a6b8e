"""What a pretrained model is called in a fingerprint: a hash of its files' bytes, wherever they lie.

A file is hashed once; the result is kept in our cache with the file's size, time and inode, and in the manifest of a
model that was fetched.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from checkpoints import find_artifact, paths
from checkpoints.environment import cache_folder
from modularforge.model.hub_config import read_config
from modularforge.pretrained.fetch import local_model
from modularforge.pretrained.sources import folder_files

TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CHUNK_BYTES = 1 << 20


def model_identity(model: str) -> str:
    """Identity of all files of a model that we read, 32 hexadecimal digits."""
    folder = local_model(model)
    return _digest(_hashes(folder, folder_files(folder, model)))


def tokenizer_identity(model: str) -> str:
    """Identity of a model's tokenizer and of what its config.json says about the end of a text."""
    folder = local_model(model)
    present = [name for name in TOKENIZER_NAMES if (folder / name).is_file()]
    return _digest({**_hashes(folder, present), "eos_token_id": read_config(folder).get("eos_token_id")})


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    artifact = find_artifact(str(folder))
    known = artifact.manifest.files if artifact else {}
    return {name: known[name].sha256 if name in known else _hash_once(folder / name) for name in names}


def _hash_once(path: Path) -> str:
    """sha256 of a file, from the cache unless the file changed since."""
    path = path.resolve()
    status = path.stat()
    stamp = [str(path), status.st_size, status.st_mtime_ns, status.st_ino]
    record = cache_folder() / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    try:
        found = json.loads(record.read_text())
        if found["stamp"] == stamp:
            return str(found["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not hashed yet, or by another version
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    content = json.dumps({"stamp": stamp, "sha256": digest.hexdigest()}).encode()
    paths.replace_bytes(str(record), content)
    return digest.hexdigest()
