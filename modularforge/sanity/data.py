"""M1: a sample of the corpus goes all the way to batches and back; where data is prepared already, that is checked."""

# B batch  T tokens

from __future__ import annotations

import itertools
import ssl
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from checkpoints import find_artifact
from modularforge.config import Config
from modularforge.data.corpus import SPLITS, read_documents
from modularforge.data.examples import ExampleWriter, example_writers
from modularforge.data.loader import batches
from modularforge.data.token_files import TokenFile, TokenFileWriter, Tokens, open_token_file
from modularforge.data.tokenizer import BOS, EOS, train_tokenizer
from modularforge.errors import DataError
from modularforge.pipeline import stage_url
from modularforge.pretrained.fetch import local_model
from modularforge.sanity.checks import SanityError
from modularforge.stage_outputs import Corpus

# Few and short, so that M1 takes seconds of one core.
QUICK_DOCUMENTS, DOCUMENTS = 8, 60
QUICK_VOCABULARY, VOCABULARY = 512, 2048
DOCUMENT_CHARACTERS = 8_000
CONTEXT, BATCH = 64, 4
EXAMPLES_ARE_WHOLE = "examples begin with a prompt and end with a response that is learned"
HUB_SECONDS = 4.0  # for one answer of any kind; whoever needs longer would time out in the middle of a corpus


def check_data(config: Config, quick: bool) -> Iterator[str]:
    """Findings about the sources and the prepared data; raises DataError or SanityError."""
    artifact = find_artifact(stage_url(config, "prepare-data"))
    if artifact is not None:
        yield from _check_prepared(Corpus(artifact), config.model.context_length)
        return
    require_hub(config)
    texts, writers = [], writers_of(config)
    for source in config.data.sources:
        for split in SPLITS:
            count = (QUICK_DOCUMENTS if quick else DOCUMENTS) if split == "train" else 1
            documents = read_documents(source, split, config.data, writer=writers.get(source.name))
            found = [document.text for document in itertools.islice(documents, count)]
            texts += [text[:DOCUMENT_CHARACTERS] for text in found if split == "train"]
        yield f"{source.name}: documents of all three splits can be read"
    tokenizer, tokens = tokenise_sample(texts, QUICK_VOCABULARY if quick else VOCABULARY)
    yield f"{len(texts)} documents decode to the same text ({tokenizer.get_vocab_size()} entries, {len(tokens)} tokens)"
    yield _check_batches(tokens, tokenizer.get_vocab_size(), min(CONTEXT, config.model.context_length))


def sample_texts(config: Config, count: int) -> list[str]:
    """The beginnings of the first training documents, `count` of each source."""
    writers = writers_of(config)
    return [
        document.text[:DOCUMENT_CHARACTERS]
        for source in config.data.sources
        for document in itertools.islice(
            read_documents(source, "train", config.data, writer=writers.get(source.name)), count
        )
    ]


def writers_of(config: Config) -> dict[str, ExampleWriter]:
    """How records become examples; the tokenizer of a pretrained model is looked at where its template is wanted."""
    examples = [config.example(source) for source in config.data.sources]
    wants_template = config.model.pretrained is not None and any(example and example.is_chat for example in examples)
    return example_writers(config, local_model(str(config.model.pretrained)) if wants_template else None)


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
        if file.learned is None:
            _check_documents(corpus.tokenizer, corpus.end_token, file)
        else:
            _check_examples(corpus.end_token, file, file.learned)
    yield "stored tokens decode to text and encode to the same tokens" if file.learned is None else EXAMPLES_ARE_WHOLE
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


def _check_examples(end_token: int, file: TokenFile, learned: Tokens) -> None:
    for index in range(min(1000, file.num_documents)):
        mask = learned[file.offsets[index] : file.offsets[index + 1]]
        if mask[0] or not mask[-1] or file.document(index)[-1] != end_token:
            raise SanityError(
                f"example {index} of {file.name} must begin with a prompt and end with a response, but does not; "
                "prepare the data again"
            )


def require_hub(config: Config) -> None:
    """Raise DataError when a source lies on the Hub and it does not answer within seconds.

    It is asked once: its own library tries for half a minute before it gives up.
    """
    sources = [source for source in config.data.sources if source.hub and not Path(source.hub).exists()]
    if not sources:
        return
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    if reason := _why_silent(constants.ENDPOINT):
        raise DataError(
            f"the Hub must answer for source {sources[0].name} ({sources[0].hub}), but {constants.ENDPOINT} does not "
            f"({reason}); check the network and HF_ENDPOINT, or name files that are here in data.sources"
        )


def _why_silent(url: str) -> str:
    """Why there is no answer, or nothing; in a thread, because the lookup of a name knows no time limit."""
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(_ask(url)), daemon=True)
    asking.start()
    asking.join(HUB_SECONDS + 1)
    return found[0] if found else f"nothing within {HUB_SECONDS:.0f} s"


def _ask(url: str) -> str:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError:
        return ""  # an answer, whatever it says
    except OSError as error:  # URLError too
        cause = getattr(error, "reason", error)
        return "" if isinstance(cause, ssl.SSLError) else f"{cause}"  # other libraries know other certificates
    except ValueError as error:
        return f"{error}"
    return ""
