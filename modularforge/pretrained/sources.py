"""Where a pretrained model may be: a folder or URL, or a name on the Hub; and which of its files make a model.

`model.pretrained` and `modularforge fetch` take the same names: `models/qwen3`, `s3://bucket/qwen3`, `Qwen/Qwen3-0.6B`,
`Qwen/Qwen3-0.6B@revision`, `models/llama.gguf`. Whether its weight files are whole and have the tensors that its
config.json says is told by their headers. Needs no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from checkpoints import find_artifact, paths
from checkpoints.redact import redact
from checkpoints.safetensors import FLOATS, INDEX_NAME, WEIGHTS_NAME, TensorSpan, read_spans, shard_names, weight_files
from modularforge.errors import DataError
from modularforge.model import names
from modularforge.model.hub_config import (
    CONFIG_NAME,
    GENERATION_NAME,
    TOKENIZER_FILES,
    is_dense,
    model_config_of,
    read_config,
)
from modularforge.model.sizes import dense_shapes

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
GGUF = ".gguf"
NEEDED = (CONFIG_NAME, "tokenizer.json")
CONVERTED = ("models/smollm2", "models/whisper-tiny-en")  # of configs/speech.yaml: made here, on no Hub
SAVE_AGAIN = "load it with transformers and save it with save_pretrained, which writes safetensors"


@dataclass(frozen=True)
class HubName:
    """A model on the Hub, at a branch, tag or commit."""

    repository: str
    revision: str = "main"


def is_folder(model: str) -> bool:
    """Whether a model's name is a folder of this machine that exists, or a URL."""
    return not paths.is_local(model) or os.path.isdir(paths.local_path(model))  # False also for what no name can be


def is_gguf(model: str) -> bool:
    """Whether a model's name is that of a GGUF file, here or at a URL."""
    return model.lower().endswith(GGUF) and not (paths.is_local(model) and os.path.isdir(paths.local_path(model)))


def hub_name(model: str) -> HubName:
    """The name on the Hub; raises DataError for a file, or a name that is no folder and cannot be one of the Hub."""
    require_no_file(model)
    if model in CONVERTED:
        raise DataError(f"{model} must be a folder, but there is none; run `make quickstart-speech`, which makes it")
    if not HUB_NAME.fullmatch(model):
        raise DataError(
            f"{model:.200} must be a model folder, a URL or a name on the Hub such as Qwen/Qwen3-0.6B, but there is no "
            "such folder; fix the path"
        )
    repository, _, revision = model.partition("@")
    return HubName(repository, revision or "main")


def published_name(model: str) -> str | None:
    """What a model is called on the Hub, also when it was fetched from there into a folder; None when nobody knows."""
    if is_gguf(model):
        return None
    if is_folder(model):
        artifact = find_artifact(model)
        origin = artifact.manifest.settings.get("model") if artifact else None
        return published_name(origin) if isinstance(origin, str) and not is_folder(origin) else None
    return hub_name(model).repository if HUB_NAME.fullmatch(model) and model not in CONVERTED else None


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


@dataclass(frozen=True)
class OtherFormat:
    """Weights in files that we do not read: how they end, what they are, and what makes a model of them."""

    endings: tuple[str, ...]
    what: str
    cure: str

    def fits(self, name: str) -> bool:
        """Whether a file's name ends so."""
        return name.lower().endswith(self.endings)


OTHER_FORMATS = (
    OtherFormat(
        (GGUF, ".ggml"),
        "a GGUF file (llama.cpp), mostly quantised",
        "name the file itself as model.pretrained, or make a folder of it: `modularforge fetch FILE --output FOLDER`",
    ),
    OtherFormat(
        ("pytorch_model.bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin"),
        "a pickle of PyTorch, which can run code when it is loaded",
        SAVE_AGAIN,
    ),
    OtherFormat((".h5", ".msgpack", ".onnx", ".tflite"), "weights of another framework", SAVE_AGAIN),
)


def require_no_file(model: str, setting: str = "a pretrained model") -> None:
    """Raise DataError if a model's name is a file of this machine, with what it is and what is wanted instead."""
    if not paths.is_local(model) or not os.path.isfile(paths.local_path(model)):
        return
    kind = next((kind for kind in OTHER_FORMATS if kind.fits(model)), None)
    what, cure = (kind.what, kind.cure) if kind else ("a file", f"name the folder that holds it and {CONFIG_NAME}")
    raise DataError(f"{setting} must be a model folder with safetensors weights, but {model} is {what}; {cure}")


def require_no_other_format(names: Iterable[str], model: str) -> None:
    """Raise DataError if a folder without safetensors has weights that we do not read."""
    for name in sorted(names):
        for kind in OTHER_FORMATS:
            if kind.fits(name):
                raise DataError(
                    f"{model} must hold its weights as safetensors ({WEIGHTS_NAME}, or {INDEX_NAME} and its shards), "
                    f"but has {name}: {kind.what}; {kind.cure}"
                )


def check_weights(folder: Path) -> dict[str, TensorSpan]:
    """Spans of all tensors of a dense model by name, a tied head left out; raises DataError on what does not fit."""
    values = read_config(folder)
    if not is_dense(values):
        raise DataError(
            f"{folder} must hold a dense model to be a backbone, but is a mixture of experts ({values['model_type']}); "
            "choose a model of type llama, mistral or qwen3"
        )
    spans: dict[str, TensorSpan] = {}
    for path in weight_files(folder):
        spans.update(read_spans(str(path)))
    model = model_config_of(values)
    kept = {name: span for name, span in spans.items() if not names.is_redundant(name, model.tied_head)}
    _check_tensors(folder, kept, dense_shapes(model, values["vocab_size"]))
    return kept


def _check_tensors(folder: Path, spans: Mapping[str, TensorSpan], expected: Mapping[str, tuple[int, ...]]) -> None:
    found = {name: span.shape for name, span in spans.items()}
    wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise DataError(
            f"{name} in {folder} must have shape {expected.get(name, 'of no tensor: it has none such')}, "
            f"but has {found.get(name, 'none, as it is missing')} ({len(wrong)} tensors differ); fetch it again, "
            "or choose another"
        )
    types = sorted({span.dtype for span in spans.values()} - {*FLOATS})
    if types:
        raise DataError(
            f"{folder} must have weights of type {', '.join(FLOATS)}, but has {', '.join(types)}; choose a "
            "version that is not quantised"
        )
