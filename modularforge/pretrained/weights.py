"""Whether the weight files of a pretrained model are whole and have the tensors that its config.json says.

Only headers are read; it needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from checkpoints.safetensors import FLOATS, TensorSpan, read_spans, weight_files
from modularforge.errors import DataError
from modularforge.model import names
from modularforge.model.hub_config import is_dense, model_config_of, read_config
from modularforge.model.sizes import dense_shapes


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
