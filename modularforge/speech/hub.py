"""Speech models on the Hub: the trained part alone, which names encoder and language model."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from checkpoints import find_artifact, open_artifact, paths
from modularforge.errors import DataError
from modularforge.model.hub_config import CONFIG_NAME, TOKENIZER_FILES, write_json
from modularforge.pretrained.hub import snapshot, upload
from modularforge.pretrained.sources import HUB_NAME, hub_name, published_name
from modularforge.speech.folder import Part, Parts, load_speech, named_parts, parts_in, read_speech_config
from modularforge.speech.model import SpeechModel

CARD_NAME = "README.md"
WANTED = [CONFIG_NAME, "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]


def speech_folder(model: str) -> Path:
    """The local folder of a speech model: a folder, an artifact of any store, or a name on the Hub."""
    if not paths.is_local(model) or find_artifact(model) is not None:
        return open_artifact(model).local_folder()
    folder = paths.local_path(model)
    if folder.exists() or not HUB_NAME.fullmatch(model) or "/" not in model:
        return folder
    return snapshot(hub_name(model), WANTED)


def load_published(model: str, encoder: str | None = None, decoder: str | None = None) -> SpeechModel:
    """A model from a folder, a store or the Hub, ready for evaluation.

    `encoder` and `decoder` say where these lie here; they must be the very ones that the model was trained with. Raises
    DataError, MismatchError, StoreError.
    """
    folder = speech_folder(model)
    return load_speech(folder, parts=placed(parts_in(folder), encoder, decoder))


def placed(parts: Parts, encoder: str | None, decoder: str | None) -> Parts:
    """The parts where somebody has them."""
    return Parts(_placed(parts.encoder, encoder), _placed(parts.decoder, decoder))


def _placed(part: Part, source: str | None) -> Part:
    return part if source is None or part.source is None else replace(part, source=source)


def push_speech(folder: Path, name: str, is_private: bool = False) -> None:
    """Upload a model folder; encoder and language model are named as the Hub knows them where that is known."""
    values, parts = read_speech_config(folder), parts_in(folder)
    if not HUB_NAME.fullmatch(name) or "/" not in name:
        raise DataError(f"a model's name on the Hub must be owner/name, but is {name!r:.80}; give it so")
    with tempfile.TemporaryDirectory(prefix="modularforge-push-") as scratch:
        target = Path(scratch)
        for pattern in WANTED:
            for path in folder.glob(pattern):
                shutil.copyfile(path, target / path.name)
        published = Parts(_published(parts.encoder), _published(parts.decoder))
        write_json(target / CONFIG_NAME, {**values, **named_parts(published)})
        (target / CARD_NAME).write_text(_card(name, published), encoding="utf-8")
        upload(hub_name(name), {path.name: path for path in sorted(target.iterdir())}, is_private)


def _published(part: Part) -> Part:
    return _placed(part, published_name(part.source) if part.source else None)


def _card(name: str, parts: Parts) -> str:
    between = ", ".join(part.source or "a random one" for part in (parts.encoder, parts.decoder))
    return (
        f"---\nlibrary_name: modularforge\npipeline_tag: automatic-speech-recognition\n---\n# {name}\n\n"
        f"The trained part of a speech model between a frozen encoder and a frozen language model ({between}).\n\n"
        f"```python\nfrom modularforge.speech.hub import load_published\n\nmodel = load_published({name!r})\n```\n"
    )
