"""Tokenizer and generation settings, which every model of a run shares, and which of its tokens are no text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints import Artifact
from checkpoints.parsing import parse_object
from modularforge.errors import DataError
from modularforge.model.hub_config import CONFIG_NAME, GENERATION_NAME, TOKENIZER_FILES, end_tokens

TOKENIZER_NAME = "tokenizer.json"


def copy_text_files(backbone: Artifact, folder: Path) -> None:
    """Copy those that the backbone has into a model folder."""
    for name in (GENERATION_NAME, *TOKENIZER_FILES):
        if name in backbone.manifest.files:
            (folder / name).write_bytes(backbone.read_bytes(name))


def special_tokens(backbone: Artifact) -> tuple[int, ...]:
    """Ids of the tokens that are no text: those that the tokenizer calls special, and those that settings name."""
    tokenizer = backbone.read_bytes(TOKENIZER_NAME) if TOKENIZER_NAME in backbone.manifest.files else b"{}"
    return special_ids(backbone.read_json(CONFIG_NAME), tokenizer)


def special_ids(values: Mapping[str, Any], tokenizer: bytes) -> tuple[int, ...]:
    """The same from the contents of config.json and tokenizer.json; raises DataError."""
    named = [values.get(name) for name in ("bos_token_id", "pad_token_id")]
    found = {*end_tokens(values), *(token for token in named if isinstance(token, int))}
    try:
        added = parse_object(tokenizer).get("added_tokens", [])
        found |= {int(token["id"]) for token in added if token.get("special")}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"tokenizer.json must list its added tokens with ids, but does not ({error}); make its artifact again"
        ) from error
    return tuple(sorted(found))
