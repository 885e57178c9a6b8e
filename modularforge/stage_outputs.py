"""What lies in the artifacts of each stage, as objects: the corpus, the backbone, the experts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from checkpoints import Artifact
from modularforge.config import Config
from modularforge.data.loader import label_tokens
from modularforge.data.token_files import ExampleTokens, PartitionRow, Stream, TokenFile, check_metadata
from modularforge.data.tokenizer import EOS, load_tokenizer, token_byte_lengths
from modularforge.experts.kind import kind_of_artifact
from modularforge.model.backbone import Decoder
from modularforge.model.folder import load_model, read_tensors
from modularforge.model.hub_config import read_config
from modularforge.stored_tokens import partition_row, partition_rows, partition_url, token_file


def derived_seed(seed: int, *names: object) -> int:
    """A seed for one purpose: the same names give the same seed, whatever ran before."""
    digest = hashlib.sha256(":".join(str(name) for name in (seed, *names)).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def example_seeds(seed: int, job: str, *index: int) -> tuple[int, int]:
    """Seeds of the order of a job's examples, and of the sample of them that its routers are solved from."""
    return derived_seed(seed, f"{job} order", *index), derived_seed(seed, f"{job} statistics", *index)


@dataclass(frozen=True)
class Corpus:
    """Prepared data: tokenizer, labels and token files; documents are read one by one where they are `apart`."""

    artifact: Artifact
    apart: bool = False

    def file(self, name: str) -> Path:
        """Local path of one file."""
        return self.artifact.local_file(name)

    def tokens(self, split: str) -> TokenFile:
        """The token file of a split."""
        return token_file(self.artifact, split, self.apart)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The one tokenizer of all models."""
        return load_tokenizer(self.file("tokenizer.json"))

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """metadata.json."""
        name = "metadata.json"
        return check_metadata(self.artifact.read_bytes(name), self.artifact.file_url(name))

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary."""
        return int(self.metadata["vocab_size"])

    @property
    def end_token(self) -> int:
        """The token after every document."""
        return int(self.metadata.get("end_token", EOS))

    @property
    def labels(self) -> list[str]:
        """Names of the domains, by label id."""
        return list(self.metadata["labels"])

    @cached_property
    def byte_lengths(self) -> Tensor:
        """Bytes that each token stands for, [V]."""
        return torch.from_numpy(token_byte_lengths(self.tokenizer))

    def domains(self, split: str, max_tokens: int | None = None) -> dict[str, Stream]:
        """The token stream of each domain that has documents in the split."""
        file = self.tokens(split)
        streams = {label: label_tokens(file, index, max_tokens) for index, label in enumerate(self.labels)}
        return {label: tokens for label, tokens in streams.items() if len(tokens) > 1}


def partition_labels(config: Config, partitions: Artifact, index: int) -> list[str]:
    """Names of the domains by label id, as all partitions have them; nothing is read where none is told from others."""
    named = config.mixes or config.partition.everywhere
    return list(partition_row(partitions, index).tokens_by_label) if named else []


OWN_SHARE = 0.05  # clusters take stray documents of every domain, which none of them stands for


def own_domains(partitions: Artifact) -> list[list[str]]:
    """By partition: the labels of more than a trace of its tokens, which are its expert's own domains."""
    return [_own(row) for row in partition_rows(partitions)]


def domains_of(partitions: Artifact, index: int) -> list[str]:
    """The same of one partition, of many without a look at the others; none of one that is not there."""
    is_there = partition_url(partitions, index) or index < len(partition_rows(partitions))
    return _own(partition_row(partitions, index)) if is_there else []


def _own(row: PartitionRow) -> list[str]:
    return [label for label, count in row.tokens_by_label.items() if count >= OWN_SHARE * row.tokens]


def even_streams(domains: Mapping[str, Stream], max_tokens: int) -> Stream:
    """The streams one after another, each cut to the same length, together at most `max_tokens`."""
    return joined_beginnings(domains, max(2, max_tokens // max(1, len(domains))))


def joined_beginnings(domains: Mapping[str, Stream], tokens: int) -> Stream:
    """About so many tokens of each stream, one after another; examples are not cut."""
    if examples := ExampleTokens.among(domains):
        return ExampleTokens.joined([stream.first(tokens) for stream in examples.values()])
    return np.concatenate([stream[:tokens] for stream in domains.values()])


@dataclass(frozen=True)
class Backbone:
    """A committed backbone: config.json and weights."""

    artifact: Artifact

    @cached_property
    def values(self) -> dict[str, Any]:
        """config.json."""
        self.artifact.local_file("model.safetensors")
        return read_config(self.artifact.local_folder())

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Weights by name."""
        return read_tensors(self.artifact.local_folder())

    def model(self) -> Decoder:
        """The backbone itself."""
        return load_model(self.artifact.local_folder())

    def expert(self, artifact: Artifact) -> Decoder:
        """An expert's own model on this backbone, whatever its kind."""
        return kind_of_artifact(artifact).load(self, artifact)
