"""Where a pretrained model may be: a folder or URL, or a name on the Hub; and which of its files make a model.

`model.pretrained` and `modularforge fetch` take the same names: `models/qwen3`, `s3://bucket/qwen3`, `Qwen/Qwen3-0.6B`,
`Qwen/Qwen3-0.6B@revision`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from checkpoints import find_artifact, paths
from modularforge.errors import DataError
from modularforge.model.hub_config import CONFIG_NAME, GENERATION_NAME, INDEX_NAME, TOKENIZER_FILES, WEIGHTS_NAME

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
    return not paths.is_local(model) or paths.local_path(model).is_dir()


def hub_name(model: str) -> HubName:
    """The name on the Hub; raises DataError when there is no such folder and the name cannot be one of the Hub."""
    if not HUB_NAME.fullmatch(model):
        raise DataError(
            f"{model} must be a model folder, a URL or a name on the Hub such as Qwen/Qwen3-0.6B, but there is no such "
            "folder; mend the path"
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


def model_files(names: Iterable[str], model: str) -> list[str]:
    """Of the files of a model, those that are needed: settings, tokenizer, and one set of safetensors weights.

    Raises DataError when something is missing; `model` is only named in errors.
    """
    present = set(names)
    for name in NEEDED:
        if name not in present:
            raise DataError(
                f"{model} must hold {name}, but does not; choose a model that does, or save model and tokenizer with "
                "transformers' save_pretrained"
            )
    shards = sorted(name for name in present if SHARD_NAME.fullmatch(name))
    weights = [WEIGHTS_NAME] if WEIGHTS_NAME in present else [INDEX_NAME, *shards] if INDEX_NAME in present else []
    if not weights:
        raise DataError(
            f"{model} must hold its weights as safetensors ({WEIGHTS_NAME}, or {INDEX_NAME} and its shards), but does "
            "not; save it again with transformers' save_pretrained"
        )
    small = [name for name in (CONFIG_NAME, GENERATION_NAME, *TOKENIZER_FILES) if name in present]
    return [*small, *weights]
