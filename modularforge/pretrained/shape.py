"""Settings of a run on a pretrained model: its config.json gives the shape, the user only the context length."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from checkpoints import find_artifact, paths
from checkpoints.redact import redact
from checkpoints.screen import shown_command
from modularforge.errors import ConfigError, StoreError
from modularforge.model.hub_config import CONFIG_NAME, model_config_of, parse_config
from modularforge.pretrained import hub
from modularforge.pretrained.fetch import cached_url, fetch
from modularforge.pretrained.sources import hub_name, is_folder, is_gguf, require_no_other_format

OWN = ("pretrained", "context_length")
"""Settings of the model that are the user's beside a pretrained one."""


def with_pretrained_shape(values: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The same settings with shape and vocabulary of a pretrained model; raises ConfigError on those that differ.

    Settings may repeat what config.json says, so that a resolved file can be fed back.
    """
    found = read_pretrained_config(model)
    given = dict(values.get("model") or {})
    shape = check_shape(given, found, model)
    own = {name: given[name] for name in OWN if name in given}
    data = {**values["data"], "vocab_size": found["vocab_size"]}
    return {**values, "data": data, "model": {**shape, **own}}


def check_shape(given: Mapping[str, Any], found: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The shape that a config.json says, as settings; raises ConfigError when the settings given contradict it."""
    shape = model_config_of(found).model_dump(mode="json")
    shape["max_positions"] = shape.pop("context_length")
    given = {name: value for name, value in given.items() if name not in OWN and value is not None}
    wrong = [name for name, value in given.items() if name in shape and value != shape[name]]
    if wrong:
        listed = ", ".join(f"model.{name} ({shape[name]!r:.80}, but is {given[name]!r:.80})" for name in wrong)
        raise ConfigError(
            f"settings must be those of the pretrained model {redact(model)} or be left out: {listed}; delete them"
        )
    return shape


def read_pretrained_config(model: str) -> dict[str, Any]:
    """config.json of a pretrained model, without fetching its weights; raises DataError, ConfigError or StoreError."""
    if is_gguf(model):
        return parse_config(_of_gguf(model), redact(model))
    if not is_folder(model):
        cached = cached_url(model)
        artifact = find_artifact(cached)
        if artifact is not None:
            return parse_config(artifact.read_bytes(CONFIG_NAME), cached)
        return parse_config(_from_hub(model), model)
    artifact = find_artifact(model)
    url = artifact.file_url(CONFIG_NAME) if artifact else paths.join(model, CONFIG_NAME)
    try:
        return parse_config(paths.read_bytes(url), redact(url))
    except FileNotFoundError as error:
        require_no_other_format(paths.list_folder(model), redact(model))
        raise ConfigError(
            f"model.pretrained must be a model folder, but {redact(model)} has no {CONFIG_NAME}; name the folder that "
            "holds it"
        ) from error


def _of_gguf(model: str) -> bytes:
    """From the file's metadata, so that its values need not be written yet; a file at a URL is brought here whole."""
    if not paths.is_local(model) or find_artifact(cached_url(model)) is not None:
        return fetch(model).read_bytes(CONFIG_NAME)
    from modularforge.pretrained.gguf_file import GgufFile

    return json.dumps(GgufFile(paths.local_path(model), model).config()).encode()


def _from_hub(model: str) -> bytes:
    try:
        return hub.download_config(hub_name(model)).read_bytes()
    except ConnectionError as error:
        raise StoreError(
            f"model.pretrained {model} must be a folder, cached, or reachable on the Hub, but is neither of them "
            f"({error}); run `{shown_command('modularforge', 'fetch', model)}` where there is a network"
        ) from error
