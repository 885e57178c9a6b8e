"""A run as commands see it: settings, and what is committed of it. Every manifest is read once for each command."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from checkpoints import Artifact, find_artifact, paths
from checkpoints.artifact import find_each, open_each
from checkpoints.errors import CorruptArtifactError, MissingArtifactError
from checkpoints.labels import Label, label_of, look_at_each
from modularforge.config import Config
from modularforge.errors import ConfigError, MismatchError
from modularforge.pipeline import (
    CHOSEN_FACT,
    CLEANING,
    ROUNDS,
    SHARE,
    SHARED_WORK,
    STAGES,
    JobName,
    Plan,
    contents,
    stage_settings,
    stage_url,
)

if TYPE_CHECKING:
    from modularforge.stage_outputs import Backbone, Corpus

LOOKS, SECONDS_BETWEEN_LOOKS = 30, 2.0  # attribute caches of NFS last up to a minute


class Run:
    """A run's artifacts by stage and index. What was found, or found missing, is remembered while the command lasts.

    Artifacts are immutable, so that only what this process commits or removes itself is told to it (`forget`). What is
    missing is looked for again after it was asked for in vain (`require`) and when something is made, not for each of
    ten thousand experts that lack a backbone. A command that waits for other processes looks with a new `Run`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._found: dict[str, Artifact | None] = {}
        self._labels: dict[str, Label] = {}
        self._settings: dict[str, dict[str, Any]] = {}
        self._pretrained: dict[str, dict[str, str]] = {}
        self._partitions: dict[int, str] = {}  # identities, where each is an artifact of its own
        self._wholes: dict[str, Artifact] = {}  # what is not indexed, and was compared with what it is made from

    def find(self, url: str) -> Artifact | None:
        """The committed artifact at a URL, or None."""
        if url not in self._found:
            self._found[url] = find_artifact(url)
        return self._found[url]

    def look_ahead(self, urls: Iterable[str], keeps: bool = False) -> None:
        """Learn what is there of ten thousand artifacts on an object store, by listings and their labels.

        Manifests of those without a label are read side by side, and kept only where they will be wanted: ten thousand
        are 400 MB.
        """
        unknown = (url for url in urls if url not in self._found and url not in self._labels)
        for url, one in look_at_each(url for url in unknown if not paths.is_local(url)).items():
            if one is None or (keeps and isinstance(one, Artifact)):
                self._found[url] = one
            if one is not None:
                self._labels[url] = label_of(one.manifest) if isinstance(one, Artifact) else one

    def _read_ahead(self, urls: Iterable[str]) -> None:
        """Read manifests that are not known yet side by side; damaged ones are left to who asks for them."""
        unknown = [url for url in urls if url not in self._found and not paths.is_local(url)]
        there = open_each(url for url in unknown if url in self._labels)
        self._found |= {url: one for url, one in there.items() if not isinstance(one, CorruptArtifactError)}
        self._found |= find_each(url for url in unknown if url not in there)

    def forget(self, url: str) -> None:
        """Look again at a place that has changed.

        What was committed just now is read back rather than kept: a manifest that was read has its entries in another
        order than one in memory, and model cards list them.
        """
        self._found.pop(url, None)
        self._labels.pop(url, None)
        self._partitions = {}
        # What a merge is made of are thousands of experts, and it never changes; the others are compared again.
        self._wholes = {name: one for name, one in self._wholes.items() if STAGES[name].round and one.url != url}

    def url(self, stage: str, index: int | None = None) -> str:
        """URL of a stage's artifact."""
        return stage_url(self.config, stage, index)

    def plan(self, stage: str, index: int | None = None, inputs: dict[str, str] | None = None) -> Plan:
        """What a stage will make; raises MissingArtifactError when an input is not there yet.

        `inputs` are given only for the evaluation, which reads whatever models there are. Raises ConfigError for an
        index that no partition has.
        """
        count = STAGES[stage].number(self.config)
        if index is not None and not 0 <= index < count:
            raise ConfigError(
                f"--index must be between 0 and {count - 1} ({STAGES[stage].count} is {count}), but is {index}; choose "
                "one of these"
            )
        if STAGES[stage].round >= self.config.experts.rounds:
            raise ConfigError(
                f"{stage} must come before the last round, but experts.rounds is {self.config.experts.rounds}, whose "
                "last round is the job expert; choose an earlier one, or change it"
            )
        found = self._inputs(stage, index) if inputs is None else inputs
        if stage not in self._settings:  # alike for all of ten thousand experts
            self._settings[stage] = stage_settings(self.config, stage)
        return Plan(stage, self.url(stage, index), self._settings[stage], found)

    def finished(self, plan: Plan) -> Artifact | None:
        """The committed artifact of a plan, or None; raises MismatchError when another config's lies there."""
        artifact = self.find(plan.url)
        if artifact is None and (occupant := _occupant(plan.url)):
            self.forget(plan.url)  # a job elsewhere may have committed since, between the two looks
            artifact = self.find(plan.url)
            if artifact is None:
                raise MismatchError(
                    f"{plan.url} must be free or a committed artifact, but it is {occupant} without a manifest; move "
                    "it away, or use another --output-dir"
                )
        if artifact is None or artifact.manifest.fingerprint == plan.fingerprint:
            return artifact
        if plan.is_outgrown(artifact):
            return None
        self.forget(plan.url)  # it may be deleted, as the sentence says, while a notebook keeps this run
        raise MismatchError(
            f"{plan.url} must have been made with these settings and inputs, but {plan.difference(artifact)}; "
            "use another --output-dir, or delete that folder to make it again"
        )

    def artifact(self, stage: str, index: int | None = None) -> Artifact | None:
        """The artifact of a stage, or None where it or something it is made from is missing."""
        try:
            return self.finished(self.plan(stage, index))
        except MissingArtifactError:
            return None

    def done(self, stage: str, index: int | None = None) -> Label | None:
        """What is known of a stage's artifact, or None as for `artifact`; one that has a label is not read for it."""
        try:
            return self._label(self.plan(stage, index))
        except MissingArtifactError:
            return None

    def _label(self, plan: Plan) -> Label | None:
        label = self._labels.get(plan.url)
        if label is None or label.fingerprint != plan.fingerprint:  # its manifest says what differs
            artifact = self.finished(plan)
            return None if artifact is None else label_of(artifact.manifest)
        return label

    def require(self, stage: str, index: int | None = None) -> Artifact:
        """The artifact of an earlier stage; raises MissingArtifactError with the command that makes it."""
        try:
            return self._required(stage, index)
        except MissingArtifactError:
            self.look_again()
            raise

    def look_again(self) -> None:
        """Forget what was missing."""
        self._found = {url: artifact for url, artifact in self._found.items() if artifact is not None}

    def _required(self, stage: str, index: int | None = None) -> Artifact:
        artifact = self.finished(self.plan(stage, index))
        if artifact is None:
            row = STAGES[stage]
            where = row.job_in(self.config) + ("" if index is None else f" --index {index}")
            raise MissingArtifactError(
                f"{JobName(row.kind, index)} must be finished first, but there is none at {self.url(stage, index)}; "
                f"run `modularforge {where}`, or `run-all` for everything, with the same --config, --output-dir and "
                "--data-dir"
            )
        return artifact

    def _known(self, stage: str, index: int | None = None) -> Label:
        """As `_required`, of what has a label without its manifest."""
        return self._label(self.plan(stage, index)) or label_of(self._required(stage, index).manifest)

    def made(self, stage: str, index: int | None = None) -> Artifact:
        """The artifact that was made just now, perhaps by rank 0 on another node, where storage may show it later.

        Caches of network file systems remember for seconds that a file was not there.
        """
        for _ in range(LOOKS):
            self.forget(self.url(stage, index))
            if found := self.artifact(stage, index):
                return found
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return self.require(stage, index)

    def make(self, stage: str, index: int | None = None) -> Any:
        """Run what makes a stage, unless that is done; returns what it returns, mostly the artifact."""
        self.look_again()
        return STAGES[stage].function(self.config.task)(self, *([] if index is None else [index]))

    def require_each(self, stage: str, indices: Iterable[int] | None = None) -> list[Artifact]:
        """The artifacts of all partitions, or of these."""
        chosen = list(STAGES[stage].indices(self.config) if indices is None else indices)
        self._read_ahead(self.url(stage, index) for index in chosen)
        return [self.require(stage, index) for index in chosen]

    @cached_property
    def corpus(self) -> Corpus:
        """The prepared data."""
        from modularforge.stage_outputs import Corpus

        return Corpus(self.require("prepare-data"), self.config.reads_documents)

    @cached_property
    def backbone(self) -> Backbone:
        """The trained backbone."""
        from modularforge.stage_outputs import Backbone

        return Backbone(self.require("backbone"))

    def chosen_experts(self) -> dict[int, Label]:
        """The experts of the assembled model, by index: those that a committed one names, else all that are finished.

        A model whose experts were chosen by hand (`modularforge experts`) is left as it is. Raises MissingArtifactError
        with the missing ones when fewer than `cluster.min_experts` are finished.
        """
        return self._chosen("expert", "assemble")

    def merged_experts(self, number: int) -> dict[int, Label]:
        """What experts had learned at the end of a round, of those that its merge takes; as for `chosen_experts`."""
        return self._chosen(f"round_{number}", f"merge_{number}")

    def _chosen(self, stage: str, whole: str) -> dict[int, Label]:
        config, job = self.config, "assembly" if whole == "assemble" else whole
        indices = range(config.experts.count)
        self.look_ahead((self.url(stage, index) for index in indices), keeps=True)
        ready = {index: label for index in indices if (label := self._ready(stage, index))}
        if len(ready) < config.needed_experts:
            missing = ", ".join(str(index) for index in indices if index not in ready)
            raise MissingArtifactError(
                f"{job} needs {config.needed_experts} of {config.experts.count} experts, but {len(ready)} are "
                f"finished (missing: {missing}); train them, or lower cluster.min_experts to go on without"
            )
        made = self.find(self.url(whole))
        return ready if made is None else self._named(stage, made, ready)

    def _ready(self, stage: str, index: int) -> Label | None:
        """What an expert's label says, or None where it, or its round before, or that one's merge, is not finished."""
        for needed in STAGES[stage].inputs_of(self.config):
            if needed in STAGES and STAGES[needed].round:
                where = self.url(needed, index if STAGES[needed].is_indexed else None)
                if where not in self._labels and self.find(where) is None:
                    return None
        return self._label(self.plan(stage, index))

    def _named(self, stage: str, made: Artifact, ready: dict[int, Label]) -> dict[int, Label]:
        """The experts that a committed model names, where they are all here and enough; else all that are ready."""
        inputs = made.manifest.inputs
        named = {
            index: label
            for index, label in ready.items()
            if inputs.get(str(JobName(stage, index))) == label.fingerprint
        }
        is_whole = len(named) == sum(JobName.parse(key).index is not None for key in inputs)
        # A merge stays what it is, since experts have gone on from it.
        is_kept = stage in ROUNDS or bool(made.manifest.facts.get(CHOSEN_FACT))
        return named if is_whole and (is_kept or len(named) >= self.config.needed_experts) else ready

    def _inputs(self, stage: str, index: int | None) -> dict[str, str]:
        """Fingerprints of what a stage reads, from their manifests; an expert knows only its own partition."""
        found: dict[str, str] = {}
        for needed in STAGES[stage].inputs_of(self.config):
            found |= self._input(needed, index)
        return found

    def _input(self, needed: str, index: int | None) -> dict[str, str]:
        if needed == SHARE:
            return {SHARE: f"{index} of {self.config.cluster.prepare_tasks}"}
        # What follows is the same, in however many shares it was made.
        if needed in ("tokenise", "assign") or (needed in CLEANING and STAGES[needed].is_indexed):
            return {}
        if needed == "partition" and index is not None:
            return {needed: self._partition_identity(index)}
        if needed == "expert" or (needed in ROUNDS and index is None):
            chosen = self.chosen_experts() if needed == "expert" else self.merged_experts(STAGES[needed].round)
            return {str(JobName(needed, k)): label.fingerprint for k, label in chosen.items()}
        if needed == "branch":
            branches = enumerate(self._known(needed, k) for k in STAGES[needed].indices(self.config))
            return {str(JobName(needed, k)): label.fingerprint for k, label in branches}
        if needed in ("tokenizer", "pretrained", "encoder", "cmvn"):
            if needed not in self._pretrained:  # hashes of whole models, and a look at the Hub's cache
                self._pretrained[needed] = _pretrained_input(self.config, needed)
            return self._pretrained[needed]
        if needed in STAGES and STAGES[needed].is_off(self.config):
            return {}
        if needed in STAGES and STAGES[needed].round:
            return self._of_round(needed, index)
        artifact = self._whole(needed)
        identity = (
            contents(artifact) if needed in ("clean", "prepare-data", *SHARED_WORK) else artifact.manifest.fingerprint
        )
        return {STAGES[needed].kind: identity}

    def _partition_identity(self, index: int) -> str:
        """Identity of one partition. Of many, an expert asks its own; who asks for several reads one file of all."""
        from modularforge.stored_tokens import IDENTITIES_NAME, partition_artifact, partition_identity

        partitions = self._whole("partition")
        if IDENTITIES_NAME not in partitions.manifest.files:
            return partition_identity(partitions, index)
        if index not in self._partitions:
            if self._partitions:
                self._partitions = dict(enumerate(partitions.read_json(IDENTITIES_NAME)))
            else:
                self._partitions[index] = partition_identity(partition_artifact(partitions, index), index)
        return self._partitions[index]

    def _of_round(self, needed: str, index: int | None) -> dict[str, str]:
        """Identity of what the expert itself, or the merge, has made in a round before."""
        if STAGES[needed].is_indexed:
            return {str(JobName(needed, index)): self._known(needed, index).fingerprint}
        return {needed: self._whole(needed).manifest.fingerprint}

    def _whole(self, stage: str) -> Artifact:
        """As `_required`, of what all of ten thousand experts read: looked at once."""
        if stage not in self._wholes:
            self._wholes[stage] = self._required(stage)
        return self._wholes[stage]


def is_kept(artifact: Artifact) -> bool:
    """Whether a model is one to use: a calibration that did not help leaves an artifact that says so."""
    return bool(artifact.manifest.facts.get("kept", True))


def _pretrained_input(config: Config, needed: str) -> dict[str, str]:
    """Identity of a pretrained model, its tokenizer, a speech encoder (nothing of one that has random weights), or of
    statistics of features."""
    if needed in ("encoder", "cmvn"):
        return _speech_input(config, needed)
    if config.model.pretrained is None:
        return {}
    from modularforge.pretrained.fetch import model_identity, template_identity, tokenizer_identity

    identity: Any = tokenizer_identity if needed == "tokenizer" else model_identity
    found = {needed: identity(config.model.pretrained)}
    if needed == "tokenizer" and any(
        example and example.is_chat for example in map(config.example, config.data.sources)
    ):
        found["chat_template"] = template_identity(config.model.pretrained)
    return found


def _speech_input(config: Config, needed: str) -> dict[str, str]:
    if config.task == "speech" and needed == "cmvn":
        from modularforge.speech.cmvn import statistics_identity

        return statistics_identity(config.speech.data)
    if config.task != "speech" or config.speech.model.encoder is None:
        return {}
    from modularforge.speech.encoder_files import encoder_identity

    return {"encoder": encoder_identity(config.speech.model.encoder)}


def _occupant(url: str) -> str:
    """What lies at a place: somebody's files are refused before the work, not when its result finds no place."""
    path = paths.local_path(url) if paths.is_local(url) else None
    if path is None or not path.exists():
        return ""
    return "a file" if path.is_file() else "a folder" if any(path.iterdir()) else ""
