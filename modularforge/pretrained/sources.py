"""Where a pretrained model may be: a folder or URL, or a name on the Hub; and which of its files make a model.

`model.pretrained` and `modularforge fetch` take the same names: `models/qwen3`, `s3://bucket/qwen3`, `Qwen/Qwen3-0.6B`,
`Qwen/Qwen3-0.6B@revision`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from checkpoints import find_artifact, paths
from checkpoints.redact import redact
from checkpoints.safetensors import INDEX_NAME, WEIGHTS_NAME, shard_names
from modularforge.errors import DataError
from modularforge.model.hub_config import CONFIG_NAME, GENERATION_NAME, TOKENIZER_FILES
from modularforge.pretrained.other_formats import require_no_file, require_no_other_format

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
NEEDED = (CONFIG_NAME, "tokenizer.json")


@dataclass(frozen=True)
class HubName:
    """A model on the Hub, at a branch, tag or commit."""

    repository: str
    revision: str = "main"


def is_folder(model: str) -> bool:
    """Whether a model's name is a folder of this machine that exists, or a URL."""
    return not paths.is_local(model) or os.path.isdir(paths.local_path(model))  # False also for what no name can be


def hub_name(model: str) -> HubName:
    """The name on the Hub; raises DataError for a file, or a name that is no folder and cannot be one of the Hub."""
    require_no_file(model)
    if not HUB_NAME.fullmatch(model):
        raise DataError(
            f"{model:.200} must be a model folder, a URL or a name on the Hub such as Qwen/Qwen3-0.6B, but there is no "
            "such folder; mend the path"
        )
    repository, _, revision = model.partition("@")
    return HubName(repository, revision or "main")


def published_name(model: str) -> str | None:
    """What a model is called on the Hub, also when it was fetched from there into a folder; None when nobody knows."""
    if is_folder(model):
        artifact = find_artifact(model)
        origin = artifact.manifest.settings.get("model") if artifact else None
        return published_name(origin) if isinstance(origin, str) and not is_folder(origin) else None
    return hub_name(model).repository if HUB_NAME.fullmatch(model) else None


def model_files(names: Iterable[str], model: str, read: Callable[[str], bytes] | None = None) -> list[str]:
    """Of the files of a model, those that are needed: settings, tokenizer, and one set of safetensors weights.

    Raises DataError when something is missing; `model` is only named in errors. `read` gives the bytes of the index,
    which names the weight files; without it they are known by their usual names.
    """
    present, model = set(names), redact(model)
    weights = _weight_names(present, model, read)
    if not weights:
        require_no_other_format(present, model)
    for name in NEEDED:
        if name not in present:
            raise DataError(
                f"{model} must hold {name}, but does not; choose a model that does, or save model and tokenizer with "
                "transformers' save_pretrained"
            )
    if not weights:
        raise DataError(
            f"{model} must hold its weights as safetensors ({WEIGHTS_NAME}, or {INDEX_NAME} and its shards), but does "
            "not; save it again with transformers' save_pretrained"
        )
    small = [name for name in (CONFIG_NAME, GENERATION_NAME, *TOKENIZER_FILES) if name in present]
    return [*small, *weights]


def folder_files(folder: Path, model: str) -> list[str]:
    """The same of a folder of this machine."""
    return model_files(
        [path.name for path in folder.iterdir()], model, lambda name: paths.read_bytes(str(folder / name))
    )


def _weight_names(present: set[str], model: str, read: Callable[[str], bytes] | None) -> list[str]:
    if WEIGHTS_NAME in present:
        return [WEIGHTS_NAME]
    if INDEX_NAME not in present:
        return []
    if read is None:
        return [INDEX_NAME, *sorted(name for name in present if SHARD_NAME.fullmatch(name))]
    shards = shard_names(read(INDEX_NAME), f"{INDEX_NAME} of {model}")
    if missing := [name for name in shards if name not in present]:
        raise DataError(
            f"{model} must hold the {len(shards)} weight files that {INDEX_NAME} names, but lacks {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; copy or fetch it whole"
        )
    return [INDEX_NAME, *shards]
