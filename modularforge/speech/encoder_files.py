"""Where a pretrained speech encoder lies: its config.json and weights, in a folder or on the Hub; needs no torch."""

from __future__ import annotations

from pathlib import Path

from checkpoints import find_artifact, open_artifact, paths
from checkpoints.redact import redact
from checkpoints.safetensors import weight_files
from modularforge.config import SpeechConfig
from modularforge.errors import DataError, StoreError, one_line
from modularforge.model.hub_config import CONFIG_NAME, read_values
from modularforge.pretrained.fetch import files_identity
from modularforge.pretrained.sources import hub_name, is_folder

WANTED = (CONFIG_NAME, "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")

READS = {"whisper": ("whisper", "num_mel_bins", 1), "wav2vec2-bert": ("fbank", "feature_projection_input_dim", 2)}
"""By model_type: features, and what of config.json says how many bins so many frames have together."""


def encoder_folder(source: str) -> Path:
    """The local folder of an encoder; raises DataError or StoreError."""
    if "://" in source and find_artifact(source) is not None:
        return open_artifact(source).local_folder()
    folder = paths.local_path(source) if paths.is_local(source) and is_folder(source) else _from_hub(source)
    if not (folder / CONFIG_NAME).is_file() or not weight_files(folder):
        raise DataError(
            f"speech.model.encoder must be a model folder with {CONFIG_NAME} and safetensors weights, but "
            f"{redact(source)} is not; name another"
        )
    return folder


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download

    name = hub_name(source)
    try:
        return Path(snapshot_download(name.repository, revision=name.revision, allow_patterns=list(WANTED)))
    except Exception as error:  # the Hub's client has a class for each refusal
        raise StoreError(
            f"speech.model.encoder {redact(source)} must be a folder, cached, or reachable on the Hub, but is none of "
            f"them ({one_line(str(error))}); name a folder"
        ) from error


def check_features(settings: SpeechConfig) -> None:
    """Raise DataError unless features are what the encoder reads: others of the same size would train in vain."""
    if settings.model.encoder is None:
        return
    values = read_values(encoder_folder(settings.model.encoder))
    kind, name, frames = READS.get(str(values.get("model_type")), ("", "", 1))
    expected = (kind, int(values.get(name) or 0) // frames)
    if kind and expected != (settings.data.features, settings.data.bins):
        raise DataError(
            f"speech.data.features must be {kind} and speech.data.bins {expected[1]} for the encoder "
            f"{redact(settings.model.encoder)}, but they are {settings.data.features} and {settings.data.bins}; change "
            "them"
        )


def encoder_identity(source: str) -> str:
    """Identity of an encoder's files, 32 hexadecimal digits."""
    folder = encoder_folder(source)
    return files_identity(folder, [CONFIG_NAME, *(path.name for path in weight_files(folder))])
