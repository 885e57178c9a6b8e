"""Speech models on the Hub: the trained part alone, which names encoder and language model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from checkpoints import find_artifact, open_artifact, paths
from modularforge.model.hub_config import CONFIG_NAME, TOKENIZER_FILES, json_text
from modularforge.pretrained.hub import Upload, snapshot
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


def published_files(folder: Path, name: str, licence: str | None = None) -> dict[str, Upload]:
    """What goes to the Hub of a model folder; encoder and language model are called as the Hub knows them."""
    values, parts = read_speech_config(folder), parts_in(folder)
    files: dict[str, Upload] = {path.name: path for pattern in WANTED for path in sorted(folder.glob(pattern))}
    published = Parts(_published(parts.encoder), _published(parts.decoder))
    files[CONFIG_NAME] = json_text({**values, **named_parts(published)}).encode()
    files[CARD_NAME] = _card(name, published, licence).encode()
    return files


def _published(part: Part) -> Part:
    return _placed(part, published_name(part.source) if part.source else None)


def _card(name: str, parts: Parts, licence: str | None) -> str:
    licensed = f"license: {licence}\n" if licence else ""
    between = ", ".join(part.source or "a random one" for part in (parts.encoder, parts.decoder))
    return (
        f"---\nlibrary_name: modularforge\npipeline_tag: automatic-speech-recognition\n{licensed}---\n# {name}\n\n"
        f"The trained part of a speech model between a frozen encoder and a frozen language model ({between}).\n\n"
        f"```python\nfrom modularforge.speech.hub import load_published\n\nmodel = load_published({name!r})\n```\n"
    )
