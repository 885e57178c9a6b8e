"""M1: a sample of the corpus goes all the way to batches and back; where data is prepared already, that is checked."""

# B batch  T tokens

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from checkpoints import find_artifact
from modularforge.artifacts import Corpus
from modularforge.config import Config
from modularforge.data.corpus import SPLITS, read_documents
from modularforge.data.loader import batches
from modularforge.data.token_files import TokenFile, TokenFileWriter, Tokens, open_token_file
from modularforge.data.tokenizer import BOS, EOS, train_tokenizer
from modularforge.pipeline import stage_url
from modularforge.sanity.findings import SanityError

QUICK_DOCUMENTS, DOCUMENTS = 8, 60
QUICK_VOCABULARY, VOCABULARY = 512, 2048
DOCUMENT_CHARACTERS = 8_000
CONTEXT, BATCH = 64, 4


def check_data(config: Config, quick: bool) -> Iterator[str]:
    """Findings about the sources and the prepared data; raises DataError or SanityError."""
    artifact = find_artifact(stage_url(config, "corpus"))
    if artifact is not None:
        yield from _check_prepared(Corpus(artifact), config.model.context_length)
        return
    texts = []
    for source in config.data.sources:
        for split in SPLITS:
            count = (QUICK_DOCUMENTS if quick else DOCUMENTS) if split == "train" else 1
            found = [document.text for document in itertools.islice(read_documents(source, split, config.data), count)]
            texts += [text[:DOCUMENT_CHARACTERS] for text in found if split == "train"]
        yield f"{source.name}: documents of all three splits can be read"
    tokenizer, tokens = tokenise_sample(texts, QUICK_VOCABULARY if quick else VOCABULARY)
    yield f"{len(texts)} documents decode to the same text ({tokenizer.get_vocab_size()} entries, {len(tokens)} tokens)"
    yield _check_batches(tokens, tokenizer.get_vocab_size(), min(CONTEXT, config.model.context_length))


def sample_texts(config: Config, count: int) -> list[str]:
    """The beginnings of the first training documents, `count` of each source."""
    return [
        document.text[:DOCUMENT_CHARACTERS]
        for source in config.data.sources
        for document in itertools.islice(read_documents(source, "train", config.data), count)
    ]


def tokenise_sample(texts: list[str], vocab_size: int) -> tuple[Tokenizer, Tokens]:
    """A tokenizer learned from the texts, and their token ids by way of a token file; raises SanityError."""
    tokenizer = train_tokenizer(texts, vocab_size)
    ids = [np.array([BOS, *tokenizer.encode(text, add_special_tokens=False).ids, EOS]) for text in texts]
    for text, encoded in zip(texts, ids, strict=True):
        _check_round_trip(tokenizer, text, encoded)
    with tempfile.TemporaryDirectory() as folder:
        with TokenFileWriter(Path(folder), "sample", tokenizer.get_vocab_size()) as writer:
            for encoded in ids:
                writer.add(encoded, np.array([len(encoded)]), np.array([0]))
        file = open_token_file(Path(folder), "sample")
        if file.num_documents != len(ids) or not np.array_equal(file.tokens, np.concatenate(ids)):
            raise SanityError("a token file must hold what was written to it, but does not; check the temporary disk")
        return tokenizer, np.array(file.tokens)


def _check_round_trip(tokenizer: Tokenizer, text: str, ids: Tokens) -> None:
    decoded = tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)
    if decoded != text:
        place = next((i for i, (a, b) in enumerate(zip(decoded, text, strict=False)) if a != b), len(decoded))
        raise SanityError(
            f"text must decode to itself, but differs at character {place}: {decoded[place : place + 20]!r} instead of "
            f"{text[place : place + 20]!r}; is the tokenizer that of this data?"
        )


def _check_batches(tokens: Tokens, vocab_size: int, context: int) -> str:
    """Windows are packed without gaps, targets are the inputs one later, ids lie within the vocabulary."""
    first = next(batches(tokens, context, BATCH, seed=0, name="the sample of the training data"))
    again = next(batches(tokens, context, BATCH, seed=0))
    inputs_BT, targets_BT, _ = first
    if not torch.equal(inputs_BT[:, 1:], targets_BT[:, :-1]):
        raise SanityError("targets must be the inputs one token later, but are not; a bug in the loader")
    if not torch.equal(inputs_BT, again[0]):
        raise SanityError("the same seed must give the same batch, but gives another; a bug in the loader")
    if int(tokens.max()) >= vocab_size:
        raise SanityError(
            f"token ids must be below {vocab_size}, but one is {int(tokens.max())}; prepare the data again"
        )
    return f"batches of {BATCH} x {context} tokens are packed, shifted by one, and the same twice"


def _check_prepared(corpus: Corpus, context: int) -> Iterator[str]:
    """The committed corpus: token files whole, ids within the vocabulary, text that encodes to the stored ids."""
    yield f"prepared data of {len(corpus.labels)} domains: {corpus.artifact.url}"
    for split in SPLITS:
        file = corpus.tokens(split)
        yield f"{split}: {file.num_documents:,} documents, {len(file.tokens):,} tokens"
        _check_documents(corpus.tokenizer, corpus.end_token, file)
    yield "stored tokens decode to text and encode to the same tokens"
    yield _check_batches(np.asarray(corpus.tokens("train").tokens[:1_000_000]), corpus.vocab_size, context)


def _check_documents(tokenizer: Tokenizer, end_token: int, file: TokenFile) -> None:
    for index in range(min(5, file.num_documents)):
        stored = [int(token) for token in file.document(index)]
        text = tokenizer.decode(stored, skip_special_tokens=True)
        if [*tokenizer.encode(text).ids, end_token] != stored:
            raise SanityError(
                f"document {index} of {file.name} must encode to the stored tokens, but does not; the tokenizer is "
                "not that of this data: prepare it again"
            )
