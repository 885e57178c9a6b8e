"""The pipeline from Python, for notebooks.

`open_run` gives a run of a settings file, whose stages are made and found as the commands make and find them. The
classes are for texts and loaders of one's own, over the machinery that the stages use. What they write are the same
artifacts, under the same fingerprints where they were made from the same settings and inputs: an expert of a
partition's very texts, put where a run looks for it, is that run's expert.
"""

# B batch  T tokens

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from checkpoints import Artifact, ArtifactWriter, open_artifact, paths, write_artifact
from modularforge.assembly.assemble import assemble
from modularforge.calibration.calibrator import Calibration, calibrate, even_mixture, write_calibrated
from modularforge.config import Config
from modularforge.config_files import load_config
from modularforge.data.token_files import Tokens, token_dtype
from modularforge.data.tokenizer import token_byte_lengths
from modularforge.errors import ConfigError, DataError
from modularforge.evaluation.scoring import Measurement, measure
from modularforge.experts.job import save_expert, train_expert
from modularforge.experts.kind import ExpertJob
from modularforge.facts import fact
from modularforge.model.backbone import Decoder, cross_entropy
from modularforge.model.folder import load_model
from modularforge.model.hub_config import CONFIG_NAME, end_tokens, read_config
from modularforge.pipeline import JobName, Plan, stage_settings
from modularforge.routing.gathering import gather_statistics
from modularforge.run import Run
from modularforge.stage_outputs import Backbone, derived_seed
from modularforge.tasks.task import Batch
from modularforge.tasks.text import TEXT, TextValidation, text_batches
from modularforge.training.backbone_job import save_backbone, train_backbone
from modularforge.training.distributed import World, default_device
from modularforge.training.job import Job
from modularforge.training.precision import measuring

__all__ = ["Evaluator", "LayerNormCalibrator", "ModuleTrainer", "SharedTrainer", "StreamingAssembler", "open_run"]

Texts = Sequence[str]


def open_run(path: str, changes: Mapping[str, Any] | None = None, output_dir: str | None = None) -> Run:
    """The run of a settings file, with `changes` by dotted name; raises ConfigError.

    `run.make("prepare-data")`, `run.make("expert", 3)` and so on make a stage unless it is there;
    `run.require("expert", 3)`, `run.corpus` and `run.backbone` give what is there.
    """
    return Run(load_config(path, list((changes or {}).items()), output_dir=output_dir))


def _plan(config: Config, stage: str, url: str, inputs: dict[str, str]) -> Plan:
    """What a stage of a run with these settings and inputs would be, at a place of its own."""
    return Plan(stage, url, stage_settings(config, stage), inputs)


def _writing(plan: Plan) -> AbstractContextManager[ArtifactWriter]:
    return write_artifact(plan.url, plan.kind, plan.fingerprint, plan.settings, plan.inputs)


def _identity(values: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()[:32]


def encode(tokenizer: Tokenizer, texts: Texts, end_token: int) -> Tokens:
    """Texts as one stream of ids, each as the tokenizer encodes it and the token that ends a text."""
    if not texts:
        raise DataError("texts must hold at least one text, but is empty; pass some")
    return np.concatenate([np.array([*found.ids, end_token]) for found in tokenizer.encode_batch_fast(list(texts))])


class SharedTrainer:
    """Trains the backbone; `vocab_size` is the tokenizer's (`data.vocab_size` when not given)."""

    def __init__(self, config: Config, vocab_size: int | None = None) -> None:
        self.config = config
        self.vocab_size = vocab_size or config.data.vocab_size
        self.model: Decoder | None = None
        self._sample: list[Tensor] = []
        self._seen = ""

    def train(
        self, train_loader: Iterable[Tensor], validation_loader: Iterable[Tensor], output_dir: str
    ) -> dict[str, float | None]:
        """Train `config.backbone.steps` steps and return the final losses.

        A loader is anything that can be iterated repeatedly and gives ids [B, T + 1]; batches are taken in turn, from
        the start again when they end. Metrics and checkpoints go to `output_dir`; a second call continues there.
        """
        world = World(device=default_device())
        job = Job(
            "backbone",
            self.config.backbone,
            self.config.training,
            "notebook",
            paths.join(output_dir, "checkpoints", "backbone"),
            paths.join(output_dir, "metrics", "backbone.jsonl"),
        )

        examples, sizes = _Loaded(train_loader), (self.config, self.vocab_size)
        self.model, losses = train_backbone(*sizes, TEXT.loss, job, examples, _Held(list(validation_loader)), world)
        first = list(itertools.islice(train_loader, 8))
        self._sample = [ids_BT[:, :-1] for ids_BT in first]
        self._seen = _identity(np.concatenate([ids_BT.numpy().ravel() for ids_BT in first]))
        return losses

    def save(self, path: str, tokenizer: Tokenizer | None = None) -> Artifact:
        """Commit the backbone as a Hugging Face folder at `path`, with the tokenizer when it is given.

        Of a loader nobody knows all that it gave: the first batches stand for it in the backbone's identity.
        """
        if self.model is None:
            raise ConfigError("SharedTrainer must be trained before it is saved, but is not; call train first")
        with _writing(_plan(self.config, "backbone", path, {"loader": self._seen})) as writer:
            with measuring(self.config.training, World().device):
                statistics = gather_statistics(self.model, self._sample, World().device)
            facts = save_backbone(self.config, self.model, writer.folder, tokenizer, statistics)
            return writer.commit(facts)


class ModuleTrainer:
    """Trains experts on a saved backbone, each alone on its own texts."""

    def __init__(self, config: Config, shared_path: str, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.backbone = Backbone(open_artifact(shared_path))

    def train_all(self, partitions: Sequence[Texts], validation_texts: Texts, output_dir: str) -> list[Artifact]:
        """Train one expert per partition, one after another; returns their artifacts in `output_dir`/expert-K."""
        return [self.train(index, texts, validation_texts, output_dir) for index, texts in enumerate(partitions)]

    def train(self, index: int, texts: Texts, validation_texts: Texts, output_dir: str) -> Artifact:
        """Train expert `index`; its result does not depend on the other experts. Raises ConfigError for rounds."""
        if (rounds := self.config.experts.rounds) > 1:
            raise ConfigError(
                f"experts.rounds must be 1 where an expert is trained without a run, since nothing is merged, but is "
                f"{rounds}; set it to 1, or make the stages of a run (open_run, run.make)"
            )
        world, name = World(device=default_device()), str(JobName("expert", index))
        end = _end_token(self.backbone.values)
        tokens, held_out = (encode(self.tokenizer, chosen, end) for chosen in (texts, validation_texts))
        metrics = paths.join(output_dir, "metrics", f"{name}.jsonl")
        job = Job(name, self.config.experts, self.config.training, metrics_url=metrics)
        examples = TEXT.part_of(self.config, tokens, index)
        expert = ExpertJob(self.config, index, self.backbone, TEXT, examples, world.device)
        validation = TextValidation(held_out, self.config.model.context_length, self.config.evaluation.batch_size)
        model, losses = train_expert(expert, validation, job, world)
        kind = token_dtype(self.tokenizer.get_vocab_size())  # as a partition's file has them
        inputs = {"backbone": self.backbone.artifact.manifest.fingerprint, "partition": _identity(tokens.astype(kind))}
        with _writing(_plan(self.config, "expert", paths.join(output_dir, name), inputs)) as writer:
            return writer.commit({**losses, **save_expert(expert, model, writer.folder)})


class StreamingAssembler:
    """Merges a backbone and experts into one model folder without loading them."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def assemble(self, shared_path: str, expert_paths: Sequence[str], output_dir: str) -> Artifact:
        """Write the model folder at `output_dir`; router and experts per token are those of `config.assembly`."""
        experts = self.config.experts.model_copy(update={"count": len(expert_paths)})
        config = self.config.model_copy(update={"experts": experts})
        artifacts = [open_artifact(path) for path in expert_paths]
        backbone = open_artifact(shared_path)
        names = [str(JobName("expert", fact(artifact, "index"))) for artifact in artifacts]
        inputs = {name: artifact.manifest.fingerprint for name, artifact in zip(names, artifacts, strict=True)}
        inputs["backbone"] = backbone.manifest.fingerprint
        with _writing(_plan(config, "assemble", output_dir, inputs)) as writer:
            facts = assemble(config, backbone, artifacts, writer)
            return writer.commit(facts)


class LayerNormCalibrator:
    """Fits norm gains, and the router if the settings say so, and keeps the result only if held-out loss improves."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer

    def calibrate(self, model_path: str, validation_texts: Texts, output_dir: str | None = None) -> Calibration:
        """Losses before and after on every second text; the others are trained on.

        The calibrated model is written to `output_dir` when that is given and the loss improved.
        """
        if len(validation_texts) < 2:
            raise DataError(f"validation_texts must hold at least 2 texts, but holds {len(validation_texts)}; add some")
        artifact = open_artifact(model_path)
        end = _end_token(artifact.read_json(CONFIG_NAME))
        decide, fitted = (encode(self.tokenizer, validation_texts[start::2], end) for start in (0, 1))
        model, world = load_model(artifact.local_folder()), World(device=default_device())
        job = Job("calibrate", self.config.calibration, self.config.training)
        seed = derived_seed(self.config.seed, "calibration order")
        result = calibrate(model, self.config, even_mixture({"": fitted}), {"": decide}, job, seed, world)
        if output_dir is not None and result.kept:
            inputs = {"assembled": artifact.manifest.fingerprint, "texts": _identity(np.concatenate([decide, fitted]))}
            with _writing(_plan(self.config, "calibrate", output_dir, inputs)) as writer:
                write_calibrated(artifact, result, writer, self.config.assembly.max_shard_bytes)
                writer.commit(result.facts)
        return result


class Evaluator:
    """Measures a model folder on texts per domain."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer

    def evaluate(self, model_path: str, texts: Mapping[str, Texts]) -> Measurement:
        """Loss, perplexity and bits per byte of each domain (by name), and routing counts of an assembled model."""
        folder = open_artifact(model_path).local_folder() if not Path(model_path).is_dir() else Path(model_path)
        end = _end_token(read_config(folder))
        domains = {label: encode(self.tokenizer, found, end) for label, found in texts.items()}
        limit, lengths = self.config.evaluation.tokens_per_domain, _byte_lengths(self.tokenizer)
        model, batch_size = load_model(folder).to(default_device()), self.config.evaluation.batch_size
        with measuring(self.config.training, default_device()):
            return measure(model, domains, lengths, batch_size, limit, self.config.model.context_length)


def _end_token(values: Mapping[str, Any]) -> int:
    """The token that ends a text, from a model's config.json; raises DataError."""
    if found := end_tokens(values):
        return found[0]
    raise DataError("the model's config.json must name an eos_token_id, but names none; add the id that ends a text")


def _byte_lengths(tokenizer: Tokenizer) -> Tensor:
    return torch.from_numpy(token_byte_lengths(tokenizer))


@dataclass(frozen=True)
class _Loaded:
    """Batches of ids [B, T + 1] as somebody's loader gives them, over and over; positions count batches."""

    loader: Iterable[Tensor]

    def batches(self, position: Any = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """All batches from that number on."""
        return text_batches(_forever(self.loader, position))


@dataclass(frozen=True)
class _Held:
    """Batches of ids [B, T + 1] to validate on, which weigh alike."""

    batches: list[Tensor]

    def summed_loss(self, model: Decoder, rank: int = 0, ranks: int = 1) -> tuple[float, float]:
        """Sum of the batches' mean losses, and the number of batches."""
        batches = [ids_BT.to(model.lm_head.weight.device) for ids_BT in self.batches]
        losses = [float(cross_entropy(model(ids_BT[:, :-1]), ids_BT[:, 1:])) for ids_BT in batches]
        return sum(losses), float(len(losses))


def _forever(loader: Iterable[Tensor], position: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    number = 0
    while True:
        before = number
        for ids_BT in loader:
            number += 1
            if number > position:
                yield ids_BT[:, :-1], ids_BT[:, 1:], number
        if number == before:
            raise DataError(
                "train_loader must give batches again and again, but gave none; pass a list or a DataLoader"
            )
