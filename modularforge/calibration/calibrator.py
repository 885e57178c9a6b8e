"""Fit norm gains, router rows or shared weights with all else frozen, and keep them only if they help.

LayerNorms hold no running statistics, so what can be calibrated are their gains (REPAIR, arXiv 2211.08403). The text is
split by documents: one half is trained on, the other decides.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from checkpoints import Artifact, ArtifactWriter
from checkpoints.hashing import describe_file
from checkpoints.safetensors import INDEX_NAME, read_spans
from modularforge.assembly import parts
from modularforge.assembly.card import CARD_NAME, calibration_note
from modularforge.assembly.plan import OutputTensor, output_tensors, spans_of
from modularforge.config import Config
from modularforge.data.token_files import Stream, TokenFile
from modularforge.errors import DataError
from modularforge.evaluation.bench import PROBE_SHARE, Bench
from modularforge.evaluation.extras import Extras, read_texts
from modularforge.evaluation.probes import GENERAL, SWITCH
from modularforge.evaluation.scoring import even_loss, summarise, summed_losses
from modularforge.experts.calibrated import masks_of
from modularforge.experts.kind import kind_of, kind_of_artifact
from modularforge.experts.trainable import ParameterGroup, Trainable
from modularforge.model.adapter_config import ADAPTER_WEIGHTS, ADAPTERS_NAME, parse_composite
from modularforge.model.backbone import Decoder
from modularforge.model.folder import Weight, cast_like, save_tensors
from modularforge.model.lora import is_adapter
from modularforge.model.lora_mixture import adapters_apart
from modularforge.model.shards import host_tensors, in_company, own_piece
from modularforge.stage_outputs import Corpus, derived_seed, joined_beginnings
from modularforge.tasks.task import Examples, task_of
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.precision import keeps_types, measuring
from modularforge.training.sharding import shard

MODE_OF: dict[bool, parts.Mode] = {True: "auto", False: "merge"}
"""A calibrated model has a file per part where the assembled one has."""


@dataclass(frozen=True)
class Calibration:
    """Equal-weight mean loss on the selection split before and after, and the tensors that changed (by name)."""

    before: float
    after: float
    tensors: Mapping[str, Weight]
    beside: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Losses before and after on what must not become worse, by the probe's name."""

    adapters: Sequence[Mapping[str, Weight]] = ()
    """What was trained of each adapter beside the model, by PEFT's names."""

    what: str = ""
    """What was done, for the card."""

    @property
    def kept(self) -> bool:
        """Whether the held-out loss improved, and nothing beside it became worse."""
        return self.after < self.before and all(after <= before for before, after in self.beside.values())

    @property
    def facts(self) -> dict[str, Any]:
        """What manifests and studies say of it."""
        beside = {"beside": {name: list(losses) for name, losses in self.beside.items()}} if self.beside else {}
        return {"kept": self.kept, "loss_before": self.before, "loss_after": self.after, **beside}


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


Measure = Callable[[Decoder], Mapping[str, float]]
"""Losses of a model by name."""


def calibrate(
    model: Decoder,
    config: Config,
    fit_stream: Stream,
    decide: Mapping[str, Stream],
    job: Job,
    seed: int,
    world: World,
    measure: Measure = lambda _: {},
) -> Calibration:
    """Train the chosen parameters on `fit_stream`; `decide` holds the streams per domain that judge the result.

    `measure` tells what must not become worse.
    """
    size = min(config.model.context_length, model.config.positions), config.calibration.batch_size
    examples = task_of(config).of_stream(config, fit_stream, *size, seed, "the calibration half of validation")
    return calibrate_on(examples, model, config, decide, job, world, measure)


def calibrate_on(
    examples: Examples,
    model: Decoder,
    config: Config,
    decide: Mapping[str, Stream],
    job: Job,
    world: World,
    measure: Measure,
) -> Calibration:
    """The same on examples."""
    context = min(config.model.context_length, model.config.positions)
    limits = config.evaluation.batch_size, config.evaluation.tokens_per_domain

    def held_out() -> float:
        with measuring(config.training, world.device), in_company(model, world.total):
            sums = summed_losses(model, decide, context, *limits, world.rank, world.size)
        return even_loss(world.total(sums))

    return calibrate_by(examples, model, config, held_out, job, world, measure)


def calibrate_by(
    examples: Examples,
    model: Any,
    config: Config,
    held_out: Callable[[], float],
    job: Job,
    world: World,
    measure: Measure = lambda _: {},
) -> Calibration:
    """The same, judged by the loss that `held_out` measures of the model (called on every rank).

    What learns is float32, but what is returned and judged has the types that the model came with. Of a model in pieces
    the tensors are made whole when they are written, in company.
    """
    stored = {name: weight.dtype for name, weight in model.named_parameters()}
    _widen_frozen(model, job, world)
    learns = choose_parameters(model, config)
    # Decay would reach what the evidence router has put around shared matrices.
    group = ParameterGroup(learns, weight_decay=0.0 if _reaches_far(config) else None)
    masks = masks_of(model, learns) if isinstance(model, Decoder) else {}
    # Its best steps would be chosen by the half that then judges them.
    job = replace(job, training=job.training.model_copy(update={"patience": None}))
    trained = shard(Trainable(model, task_of(config).loss, [group], masks=masks), job.training, world)
    model.to(world.device)

    def beside() -> Mapping[str, float]:
        with in_company(model, world.total):  # all ranks measure the same
            return measure(model)

    before, beside_before = held_out(), beside()
    fit(trained, examples, job, held_out, world)
    for name, weight in trained.parameters.items():  # judged as it will be stored
        piece = own_piece(weight.detach())
        piece.copy_(piece.to(stored[name]))
    beside_after = beside()
    losses = {name: (beside_before[name], beside_after[name]) for name in beside_before}
    tensors = cast_like(host_tensors(trained.parameters), stored)
    adapters = adapters_apart(model, tensors) if config.calibration.adapters else []
    inside = {name: tensor for name, tensor in tensors.items() if not (adapters and is_adapter(name))}
    return Calibration(before, held_out(), inside, losses, adapters, _what(config))


def _widen_frozen(model: Any, job: Job, world: World) -> None:
    if isinstance(model, Decoder) and keeps_types(job.training, world.device):
        model.has_half_blocks = model.has_float_stream = True
    else:
        model.float()


def _what(config: Config) -> str:
    shared = ", embeddings, attention and head" if config.calibration.shared else ""
    adapters = ", and the adapters together," if config.calibration.adapters else ""
    return f"Norm gains and router rows{shared}{adapters} were fitted on {config.calibration.text} text"


def _reaches_far(config: Config) -> bool:
    """Whether so much learns that text of no domain, or behind a switch, may become worse by it."""
    return config.calibration.shared or config.calibration.adapters


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


def calibrate_as_set(
    model: Decoder, config: Config, corpus: Corpus, partitions: Artifact, job: Job, world: World
) -> Calibration:
    """Calibrate on one half of the validation documents, or on training text; the other half of validation decides.

    Raises DataError for too few documents. Called on every rank.
    """
    fit_half, decide_half = split_documents(corpus.tokens("validation"), corpus.labels)
    if not fit_half:
        raise DataError(
            "calibration needs at least two validation documents of a domain, but there are fewer; add validation text "
            "or leave it out (assemble --no-calibrate, run-all --skip-calibration)"
        )
    settings, measure = config.calibration, _beside(config, corpus, decide_half)
    if settings.text == "training":
        skipped = config.experts.steps * config.experts.batch_size
        examples = task_of(config).mixture(config, partitions, "calibrate", settings, skipped)
        return calibrate_on(examples, model, config, decide_half, job, world, measure)
    seed = derived_seed(config.seed, "calibration order")
    return calibrate(model, config, even_mixture(fit_half), decide_half, job, seed, world, measure)


def _beside(config: Config, corpus: Corpus, decide: Mapping[str, Stream]) -> Measure:
    """Losses behind a switch of domain, and on text of no domain where there is some; none where matrices rest."""
    if not _reaches_far(config):
        return lambda _: {}
    limit, texts = config.evaluation.tokens_per_domain, read_texts(config.evaluation.general or [])
    bench = Bench(config, corpus, decide, limit, limit // PROBE_SHARE, Extras(texts))

    def measure(model: Decoder) -> dict[str, float]:
        probes, scores = bench.probes(model), bench.score(model, (SWITCH, GENERAL))
        return {name: summarise(probes[name], item, corpus.byte_lengths)["mean_loss"] for name, item in scores.items()}

    return measure


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
    if result.adapters:
        places = parse_composite((writer.folder / ADAPTERS_NAME).read_bytes(), ADAPTERS_NAME).folders
        for place, tensors_of_one in zip(places, result.adapters, strict=True):
            save_tensors(tensors_of_one, writer.folder / place / ADAPTER_WEIGHTS)
    with open(writer.folder / CARD_NAME, "a", encoding="utf-8") as card:
        card.write(calibration_note(result.before, result.after, result.what))
