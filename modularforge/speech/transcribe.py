"""Write down what recordings say with a trained speech model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modularforge.data.files import find_files, open_bytes
from modularforge.data.tokenizer import load_tokenizer
from modularforge.errors import DataError
from modularforge.model.hub_config import TOKENIZER_NAME
from modularforge.speech.audio import UnusableAudio, decode
from modularforge.speech.features import Features, features, normalised
from modularforge.speech.folder import Parts, load_speech, read_speech_config
from modularforge.speech.model import NO_TOKEN


def transcribe_files(
    folder: Path, names: Sequence[str], prompt: str = "", max_tokens: int = 64, parts: Parts | None = None
) -> Iterator[str]:
    """What each recording says, in order; raises DataError for one that cannot be used.

    `prompt` must be the one that the model was trained with; `parts` say where encoder and language model lie here.
    """
    model, tokenizer = load_speech(folder, parts=parts), load_tokenizer(folder / TOKENIZER_NAME)
    settings = read_speech_config(folder)["features"]
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [NO_TOKEN]
    for url in find_files(list(names)):
        try:
            with open_bytes(url) as file:
                found_FM = features_of(file.read(), settings)
        except UnusableAudio as error:
            raise DataError(f"{url} must be a recording that can be used, but {error}; name another") from error
        inputs = torch.from_numpy(found_FM)[None], torch.tensor([len(found_FM)]), torch.tensor([ids])
        (written,) = model.transcribe(*inputs, settings["end_token"], max_tokens)
        yield tokenizer.decode(written)


def features_of(content: bytes, settings: Mapping[str, Any]) -> Features:
    """Frames [F, M] of a recording as a model with these `features` in its config.json reads them; raises
    UnusableAudio.
    """
    found_FM = features(decode(content), settings["kind"], settings["bins"])
    if not len(found_FM):
        raise UnusableAudio("short", "it is shorter than one frame")
    if settings["normalise"] == "utterance":
        return normalised(found_FM)
    if settings["normalise"] == "none":
        return found_FM
    mean_M, std_M = np.asarray(settings["statistics"], np.float32)
    found: Features = (found_FM - mean_M) / std_M
    return found
