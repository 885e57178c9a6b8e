"""Speech models as folders: the trained part alone, and what it stands between, by name and identity.

`model.safetensors` holds the projector and what steers. A pretrained encoder and language model stay where they are:
`config.json` names them with a hash of their bytes, which is compared when they are loaded. Random ones, of smoke
tests, are in the folder itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from checkpoints.redact import redact
from checkpoints.safetensors import WEIGHTS_NAME
from modularforge.config import Config, ModelConfig
from modularforge.errors import DataError, MismatchError
from modularforge.model.backbone import Decoder, build_backbone
from modularforge.model.folder import load_pretrained, read_tensors, save_tensors
from modularforge.model.hub_config import CONFIG_NAME, read_values, write_json
from modularforge.model.supported import SPEECH_TYPE
from modularforge.pretrained.fetch import local_model, model_identity
from modularforge.speech.conformer import MODEL_TYPE as CONFORMER
from modularforge.speech.conformer import ConformerEncoder, conformer_tensors
from modularforge.speech.encoder import WhisperEncoder, WhisperShape, whisper_shape, whisper_tensors
from modularforge.speech.encoder_files import check_features, encoder_folder, encoder_identity
from modularforge.speech.model import SpeechModel, SpeechShape
from modularforge.speech.projector import Pooling
from modularforge.speech.steering import SteeringShape

MODEL_TYPE = SPEECH_TYPE
FROZEN = ("encoder.", "decoder.")


@dataclass(frozen=True)
class Part:
    """An encoder or language model: where a pretrained one lies, with its identity, or the sizes of a random one."""

    source: str | None
    identity: str | None
    sizes: Mapping[str, Any]


@dataclass(frozen=True)
class Parts:
    """What a speech model stands between."""

    encoder: Part
    decoder: Part


def parts_of(config: Config, vocab_size: int) -> Parts:
    """The frozen parts that the settings name; reads their identities. Raises DataError for features that the encoder
    cannot read."""
    settings, pretrained = config.speech.model, config.model.pretrained
    check_features(config.speech)
    width = settings.encoder_width
    encoder = WhisperShape(config.speech.data.bins, width, settings.encoder_layers, max(1, width // 32), 4 * width)
    decoder = {**config.model.model_dump(mode="json"), "pretrained": None}
    random = Parts(Part(None, None, asdict(encoder)), Part(None, None, {"model": decoder, "vocab_size": vocab_size}))
    return Parts(
        Part(settings.encoder, encoder_identity(settings.encoder), {}) if settings.encoder else random.encoder,
        Part(pretrained, model_identity(pretrained), {}) if pretrained else random.decoder,
    )


def build_speech(
    shape: SpeechShape,
    parts: Parts,
    tensors: Mapping[str, Tensor] | None = None,
    is_fresh: bool = True,
    start_scale: float = 0.1,
) -> SpeechModel:
    """A speech model in float32: frozen parts as they are, what learns drawn from torch's global generator.

    `tensors`, where given, are those of a folder; with `is_fresh` some may be missing, which then begin anew. Raises
    MismatchError when a pretrained part is not the one that they were trained with, or when tensors do not fit.
    """
    found = dict(tensors or {})
    encoder, decoder = _encoder(parts.encoder, found), _decoder(parts.decoder, found)
    model = SpeechModel(shape, encoder, decoder, start_scale)
    fill_trained(model, {name: tensor for name, tensor in found.items() if not _is_frozen(name)}, is_fresh)
    return model


def fill_trained(model: SpeechModel, tensors: Mapping[str, Tensor], is_fresh: bool = False) -> None:
    """Put a folder's tensors into a model; raises MismatchError unless they are all that it trains."""
    own = trained_tensors(model)
    missing = set() if is_fresh else own.keys() - tensors.keys()
    others = {name for name, item in tensors.items() if name not in own or own[name].shape != item.shape}
    wrong = sorted(missing | others)
    if wrong:
        raise MismatchError(
            f"weights of a speech model must be those of its shape, but {wrong[0]} ({len(wrong)} differ) does not fit; "
            "make the artifact again"
        )
    model.load_state_dict(dict(tensors), strict=False)


def trained_tensors(model: SpeechModel) -> dict[str, Tensor]:
    """What a job of the model trains, and what routes among experts: all that a folder must hold."""
    return {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items() if not _is_frozen(name)
    }


def _is_frozen(name: str) -> bool:
    return name.startswith(FROZEN)


def encoder_sizes(parts: Parts) -> tuple[int, int]:
    """Width and layers of the encoder."""
    encoder = _new_encoder(parts.encoder)
    return encoder.width, encoder.num_layers


def _new_encoder(part: Part) -> WhisperEncoder | ConformerEncoder:
    """The encoder with any weights."""
    if part.source is None:
        return WhisperEncoder(WhisperShape(**part.sizes))
    folder = encoder_folder(part.source)
    _check(part.source, part.identity, encoder_identity(part.source), "encoder")
    values = read_values(folder)
    if values.get("model_type") == CONFORMER:
        return ConformerEncoder(values)
    return WhisperEncoder(whisper_shape(values, str(folder)))


def _encoder(part: Part, tensors: Mapping[str, Tensor]) -> nn.Module:
    encoder = _new_encoder(part)
    if part.source is None:
        return _filled(encoder, tensors, "encoder.")
    folder = encoder_folder(part.source)
    found, name = read_tensors(folder), str(folder)
    is_strict = isinstance(encoder, WhisperEncoder)
    weights = whisper_tensors(found, name) if is_strict else conformer_tensors(found, encoder, name)
    try:
        encoder.load_state_dict(weights, strict=is_strict)
    except RuntimeError as error:
        raise DataError(f"{name} must hold the weights that its config.json says, but does not ({error})") from error
    return encoder.float()


def _decoder(part: Part, tensors: Mapping[str, Tensor]) -> Decoder:
    if part.source is not None:
        return load_pretrained(_checked_folder(part, "language model")).float()
    shape = ModelConfig.model_validate(part.sizes["model"])
    decoder = build_backbone(shape, int(part.sizes["vocab_size"]))
    _filled(decoder, tensors, "decoder.")
    return decoder


def _filled(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> nn.Module:
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and _is_frozen(name)
    }
    if own:
        module.load_state_dict(own, strict=False)  # a tied head is there once
    return module


def _checked_folder(part: Part, what: str) -> Path:
    """The local folder of a pretrained language model; raises MismatchError when it is not that trained with."""
    assert part.source is not None
    _check(part.source, part.identity, model_identity(part.source), what)
    return local_model(part.source)


def _check(source: str, expected: str | None, found: str, what: str) -> None:
    if found != expected:
        raise MismatchError(
            f"the {what} at {redact(source)} must be the one that was trained with ({expected}), but is another "
            f"({found}); put that one there again"
        )


def save_speech(model: SpeechModel, parts: Parts, folder: Path, features: Mapping[str, Any]) -> None:
    """Write a model folder: the trained part, random frozen ones, and what names the others."""
    tensors = trained_tensors(model)
    for prefix, part in (("encoder.", parts.encoder), ("decoder.", parts.decoder)):
        if part.source is None:
            tensors |= _frozen_tensors(model, prefix)
    save_tensors(tensors, folder / WEIGHTS_NAME)
    write_json(folder / CONFIG_NAME, folder_config(model.shape, parts, features))


def _frozen_tensors(model: SpeechModel, prefix: str) -> dict[str, Tensor]:
    tied = {"decoder.lm_head.weight"} if model.decoder.config.tied_head else set()
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith(prefix) and _is_frozen(name) and name not in tied
    }


def folder_config(shape: SpeechShape, parts: Parts, features: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a speech model."""
    return {
        "architectures": ["ModularForgeSpeech"],
        "model_type": MODEL_TYPE,
        "shape": asdict(shape),
        "features": dict(features),
        **named_parts(parts),
    }


def named_parts(parts: Parts) -> dict[str, Any]:
    """What config.json says of the frozen parts."""
    return {name: {**asdict(part), "source": part.source and redact(part.source)} for name, part in _named(parts)}


def _named(parts: Parts) -> list[tuple[str, Part]]:
    return [("encoder", parts.encoder), ("decoder", parts.decoder)]


def load_speech(
    folder: Path,
    shape: SpeechShape | None = None,
    more: Mapping[str, Tensor] | None = None,
    is_fresh: bool = False,
    start_scale: float = 0.1,
    parts: Parts | None = None,
) -> SpeechModel:
    """The model in a folder, ready for evaluation.

    `shape` outranks its own, and `more` are tensors that this shape has beside the folder's; with `is_fresh` what it
    has beside them begins anew. `parts` are those that the folder names, where they lie here.
    """
    found = shape or shape_of(read_speech_config(folder))
    tensors = {**read_tensors(folder), **(more or {})}
    return build_speech(found, parts or parts_in(folder), tensors, is_fresh, start_scale).eval()


def parts_in(folder: Path) -> Parts:
    """The frozen parts that a folder names."""
    values = read_speech_config(folder)
    return Parts(*(Part(**values[name]) for name in ("encoder", "decoder")))


def read_speech_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; raises DataError when it is no speech model's."""
    values = read_values(folder)
    if values.get("model_type") != MODEL_TYPE:
        raise DataError(
            f"{folder} must be a speech model, but its config.json says model_type {values.get('model_type')!r:.60}; "
            "name the folder of a run with task speech"
        )
    return values


def shape_of(values: Mapping[str, Any]) -> SpeechShape:
    """The shape in a config.json."""
    own = dict(values["shape"])
    steering = own.get("steering")
    return SpeechShape(
        **{**own, "pooling": Pooling(**own["pooling"]), "steering": SteeringShape(**steering) if steering else None}
    )


def shape_from(config: Config, steering: SteeringShape | None, variant: Any) -> SpeechShape:
    """The shape that settings ask for, with this steering."""
    settings = config.speech.model
    pooling = Pooling(settings.pool_kernel, settings.pool_kind, settings.pool_layer)
    return SpeechShape(variant, settings.projector_width, pooling, steering)
