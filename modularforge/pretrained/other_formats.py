"""Weights in files that we do not read, such as GGUF and pickles: recognised, so that an error says what to do."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from checkpoints import paths
from checkpoints.safetensors import INDEX_NAME, WEIGHTS_NAME
from modularforge.errors import DataError
from modularforge.model.hub_config import CONFIG_NAME

SAVE_AGAIN = "load it with transformers and save it with save_pretrained, which writes safetensors"


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
        (".gguf", ".ggml"),
        "a GGUF file (llama.cpp), mostly quantised",
        "name the folder or Hub name of the model it was made from, or convert it to safetensors (transformers: "
        "from_pretrained(FOLDER, gguf_file=NAME), then save_pretrained)",
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
