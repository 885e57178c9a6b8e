"""Fit norm gains and router rows on validation data with all else frozen, and keep them only if they help.

LayerNorms hold no running statistics, so what can be calibrated are their gains (REPAIR, arXiv 2211.08403). The text is
split by documents: one half is trained on, the other decides.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from checkpoints import Artifact, ArtifactWriter
from checkpoints.hashing import describe_file
from checkpoints.safetensors import INDEX_NAME, read_spans
from modularforge.assembly import parts
from modularforge.assembly.card import CARD_NAME, calibration_note
from modularforge.assembly.plan import OutputTensor, output_tensors, spans_of
from modularforge.config import Config
from modularforge.data.token_files import Stream, TokenFile
from modularforge.errors import DataError
from modularforge.evaluation.scoring import even_loss
from modularforge.experts.kind import kind_of, kind_of_artifact
from modularforge.experts.trainable import ParameterGroup, Trainable
from modularforge.model.backbone import Decoder
from modularforge.model.folder import save_tensors
from modularforge.stage_outputs import Corpus, derived_seed, joined_beginnings
from modularforge.tasks.task import Examples, task_of
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.loop import fit

MODE_OF: dict[bool, parts.Mode] = {True: "auto", False: "merge"}
"""A calibrated model has a file per part where the assembled one has."""


@dataclass(frozen=True)
class Calibration:
    """Equal-weight mean loss on the selection split before and after, and the tensors that changed (by name)."""

    before: float
    after: float
    tensors: dict[str, Tensor]

    @property
    def kept(self) -> bool:
        """Whether the held-out loss improved."""
        return self.after < self.before

    @property
    def facts(self) -> dict[str, Any]:
        """What manifests and studies say of it."""
        return {"kept": self.kept, "loss_before": self.before, "loss_after": self.after}


def split_documents(file: TokenFile, labels: list[str]) -> tuple[dict[str, Stream], dict[str, Stream]]:
    """Two halves of a split by alternating documents, as streams per label; a lone document decides.

    Examples with one prompt go together.
    """
    fit_half: dict[str, Stream] = {}
    decide_half: dict[str, Stream] = {}
    for index, label in enumerate(labels):
        documents = np.flatnonzero(file.labels == index)
        turns = np.arange(len(documents)) if file.learned is None else _prompt_numbers(file, documents)
        for half, chosen in ((decide_half, documents[turns % 2 == 0]), (fit_half, documents[turns % 2 == 1])):
            if len(chosen):
                half[label] = file.stream(chosen)
    return fit_half, decide_half


def _prompt_numbers(file: TokenFile, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A number for each document, the same for those that ask the same."""
    assert file.learned is not None
    numbers: dict[bytes, int] = {}
    found = []
    for document in documents:
        span = slice(*file.offsets[document : document + 2])
        prompt = file.tokens[span][: int(np.argmax(file.learned[span]))].tobytes()
        found.append(numbers.setdefault(prompt, len(numbers)))
    return np.array(found)


def calibrate(
    model: Decoder,
    config: Config,
    fit_stream: Stream,
    decide: Mapping[str, Stream],
    job: Job,
    seed: int,
) -> Calibration:
    """Train the chosen parameters on `fit_stream`; `decide` holds the streams per domain that judge the result.

    It computes in float32, but what it returns and judges has the types that the model came with.
    """
    context = min(config.model.context_length, model.config.positions)
    limits = config.evaluation.batch_size, config.evaluation.tokens_per_domain
    name, batch = "the calibration half of validation", config.calibration.batch_size
    examples = task_of(config).of_stream(config, fit_stream, context, batch, seed, name)
    device = model.lm_head.weight.device
    return calibrate_on(model, config, examples, lambda: even_loss(model, decide, context, *limits), job, device)


def calibrate_on(
    model: Any, config: Config, examples: Examples, held_out: Callable[[], float], job: Job, device: torch.device
) -> Calibration:
    """The same on any examples, judged by the loss that `held_out` measures of the model."""
    stored = {name: weight.dtype for name, weight in model.named_parameters()}
    model.float()
    learns = choose_parameters(model, config)
    before = held_out()
    # Its best steps would be chosen by the half that then judges them.
    job = replace(job, training=job.training.model_copy(update={"patience": None}))
    trained = Trainable(model, task_of(config).loss, [ParameterGroup(learns)])
    fit(trained, examples, job, held_out, World(device=device))
    changed = {}
    for name, weight in learns.items():
        changed[name] = weight.detach().cpu().to(stored[name])
        weight.data.copy_(changed[name])  # judged as it will be stored
    return Calibration(before, held_out(), changed)


def choose_parameters(model: Any, config: Config) -> Mapping[str, nn.Parameter]:
    """Let only those parameters learn that the experts' kind lets a calibration touch; returns them by name."""
    model.requires_grad_(False)
    learns = kind_of(config).calibrates(model, config.calibration)
    for weight in learns.values():
        weight.requires_grad_(True)
    return learns


def even_mixture(streams: Mapping[str, Stream]) -> Stream:
    """The streams one after another, each cut to the length of the shortest, so that all domains weigh alike."""
    return joined_beginnings(streams, min(len(tokens) for tokens in streams.values()))


def calibrate_on_validation(model: Decoder, config: Config, corpus: Corpus, job: Job) -> Calibration:
    """Calibrate on one half of the validation documents, judged by the other; raises DataError for too few."""
    fit_half, decide_half = split_documents(corpus.tokens("validation"), corpus.labels)
    if not fit_half:
        raise DataError(
            "calibration needs at least two validation documents of a domain, but there are fewer; add validation text "
            "or leave it out (assemble --no-calibrate, run-all --skip-calibration)"
        )
    seed = derived_seed(config.seed, "calibration order")
    return calibrate(model, config, even_mixture(fit_half), decide_half, job, seed)


def write_calibrated(assembled: Artifact, result: Calibration, writer: ArtifactWriter, max_shard_bytes: int) -> None:
    """Stream the assembled weights to the writer, with the calibrated tensors in place of the old ones."""
    files, has_parts = assembled.manifest.files, parts.KEYS_FACT in assembled.manifest.facts
    weights = [name for name in files if name.endswith(".safetensors") and "/" not in name]  # deeper lie adapters
    spans = [spans_of(assembled, name) for name in weights]
    tensors = output_tensors({name: span for found in spans for name, span in found.items()})
    with tempfile.TemporaryDirectory() as scratch:
        changed = Path(scratch) / "changed.safetensors"
        save_tensors({name: tensor.contiguous() for name, tensor in result.tensors.items()}, changed)
        for name, span in read_spans(str(changed), describe_file(changed).tensors).items():
            tensors[name] = OutputTensor(span, tensors[name].dtype)
        part_of, mode = kind_of_artifact(assembled).part_of, MODE_OF[has_parts]
        parts.write_weights(tensors, part_of, parts.parts_of(assembled), writer, mode, max_shard_bytes)
    for name in files:
        if name not in (*weights, INDEX_NAME):
            (writer.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(assembled.local_file(name), writer.folder / name)
    with open(writer.folder / CARD_NAME, "a", encoding="utf-8") as card:
        card.write(calibration_note(result.before, result.after))
