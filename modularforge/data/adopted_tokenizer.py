"""Take over the tokenizer of a pretrained model: its files as they are, and its token that ends a text.

Only the settings beside ``tokenizer.json`` are touched, where transformers 5 writes what 4 cannot read, and in it the
token that ends a text where it is not marked as special: typed in a text it would end it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from checkpoints.parsing import parse_object
from modularforge.data.tokenizer import load_tokenizer, vocabulary_size
from modularforge.errors import DataError, one_line

COPIED = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
SETTINGS_NAME = "tokenizer_config.json"


def adopt_tokenizer(source: Path, output: Path) -> tuple[Tokenizer, int]:
    """Copy the tokenizer of the model folder `source`; returns it and the id of its end of text. Raises DataError."""
    if not (source / "tokenizer.json").is_file():
        raise DataError(
            f"{source} must hold tokenizer.json, but does not; load its tokenizer with transformers' AutoTokenizer and "
            "save it there with save_pretrained"
        )
    tokenizer = load_tokenizer(source)
    end_token = find_end_token(source, tokenizer)
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    if not _is_special(tokenizer, end_token):
        _mark_special(output / "tokenizer.json", str(tokenizer.id_to_token(end_token)), end_token)
        tokenizer = load_tokenizer(output)
    settings = portable_settings(_read(source / SETTINGS_NAME))
    (output / SETTINGS_NAME).write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return tokenizer, end_token


def find_end_token(folder: Path, tokenizer: Tokenizer) -> int:
    """The id of the token that ends a text: by the tokenizer's settings, else by the model's config.json."""
    for name in (SETTINGS_NAME, "special_tokens_map.json"):
        token = _read(folder / name).get("eos_token")
        content = token.get("content") if isinstance(token, dict) else token
        index = tokenizer.token_to_id(content) if isinstance(content, str) else None
        if index is not None:
            return int(index)
    index = _read(folder / "config.json").get("eos_token_id")
    index = index[0] if isinstance(index, list) and index else index
    if type(index) is int and 0 <= index < vocabulary_size(tokenizer):
        return index
    raise DataError(
        f"{folder} must name the token that ends a text (eos_token in {SETTINGS_NAME}), but names none that its "
        "tokenizer has; add it"
    )


def portable_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json in words that transformers 4 and 5 both know."""
    if settings.get("tokenizer_class") in (None, "TokenizersBackend"):  # the name that 5 gave PreTrainedTokenizerFast
        settings = {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):  # 4 wants names for them there
        settings = {key: value for key, value in settings.items() if key != "extra_special_tokens"}
        settings |= {"additional_special_tokens": extra} if extra else {}
    return settings


def _is_special(tokenizer: Tokenizer, index: int) -> bool:
    token = tokenizer.get_added_tokens_decoder().get(index)
    return token is not None and token.special


def _mark_special(file: Path, content: str, index: int) -> None:
    """Mark a token as special in ``tokenizer.json``."""
    values = _read(file)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    others = [token for token in values.get("added_tokens") or [] if token["id"] != index]
    added = [*others, {"id": index, "content": content, **plain, "special": True}]
    values["added_tokens"] = sorted(added, key=lambda token: int(token["id"]))
    file.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} must be a JSON object, but cannot be read ({one_line(error)}); fetch the model again"
        ) from error
