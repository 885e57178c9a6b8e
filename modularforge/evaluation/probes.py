"""The windows that models are measured on, with the domain, the document and the place of every target.

Plain text of one domain flatters a router that cannot leave a domain, so there are two more probes, made of the same
text: behind a *switch* of domain, and in documents of *mixed* passages. A probe is the same for every model.
"""

# R rows (windows)  T tokens of a window

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from modularforge.data.loader import IGNORED_TARGET, evaluation_batches
from modularforge.data.packing import Rows
from modularforge.data.token_files import ExampleTokens, Stream, Tokens

PROBES = TEXT, SWITCH, MIXED, GENERAL, CHAT = "text", "switch", "mixed", "general", "chat"
FIRST_POSITIONS = 16  # within them no router can know the domain; the ranges behind them double
# A sentence or two: a router must have time to see what it reads, and none to rest on it.
SHORTEST_PASSAGE, LONGEST_PASSAGE = 16, 96
UNCOUNTED = -1
MIXED_SEED = 0  # one for all runs and seeds, whose rows are compared document by document
# Of a domain's text as many times what is measured may lie before what a switch and mixed documents are taken from: a
# few long documents at its beginning would say little of others.
SPREAD = 10
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Probe:
    """Windows to score; all tensors are [R, T] of int32.

    `labels_RT` is the domain of a target by its place in `labels`, or UNCOUNTED where its loss does not count;
    `documents_RT` the document it belongs to, `places_RT` its position: in the window, or since the switch or since the
    beginning of the passage. With `shares_documents` one document has targets of several domains.
    """

    name: str
    labels: tuple[str, ...]
    inputs_RT: Tensor
    targets_RT: Tensor
    labels_RT: Tensor
    documents_RT: Tensor
    places_RT: Tensor
    shares_documents: bool = False
    examples_RT: Tensor | None = None
    """Where rows hold examples that do not see each other: the number of each token's example in its row."""

    def only(self, label: str) -> Probe:
        """The windows in which targets of one domain count."""
        rows_R = (self.labels_RT == self.labels.index(label)).any(dim=1)
        names = ["inputs_RT", "targets_RT", "labels_RT", "documents_RT", "places_RT"]
        names += [] if self.examples_RT is None else ["examples_RT"]
        return replace(self, **{name: getattr(self, name)[rows_R] for name in names})


def domain_probes(
    streams: Mapping[str, Stream], context_length: int, end_token: int, max_tokens: int, max_probe_tokens: int
) -> dict[str, Probe]:
    """The text itself, at most `max_tokens` a domain, and the other two with about `max_probe_tokens` targets a domain.

    The text is the beginning of each stream, the others are spread over all of it, so that many documents take part.
    With a single domain there is nothing to switch to. Of examples there is the first alone: what they learn.
    """
    found = {TEXT: plain_probe(streams, context_length, end_token, max_tokens)}
    long_enough = {label: tokens for label, tokens in streams.items() if len(tokens) > context_length}
    if len(long_enough) > 1 and not ExampleTokens.among(streams):
        found[SWITCH] = switch_probe(long_enough, context_length, end_token, max_probe_tokens)
        found[MIXED] = mixed_probe(long_enough, context_length, max_probe_tokens)
    return found


def plain_probe(streams: Mapping[str, Stream], context_length: int, end_token: int, max_tokens: int) -> Probe:
    """The streams as they are, text or examples."""
    if examples := ExampleTokens.among(streams):
        return example_probe(examples, context_length, max_tokens)
    return text_probe(TEXT, streams, context_length, end_token, max_tokens)


def text_probe(name: str, streams: Mapping[str, Tokens], context_length: int, end_token: int, max_tokens: int) -> Probe:
    """Each stream in order, each token predicted once; a domain's last window is padded."""
    rows = []
    for index, tokens in enumerate(streams.values()):
        count = min(len(tokens) - 1, max_tokens)
        inputs_RT, targets_RT = next(evaluation_batches(tokens, context_length, -(-count // context_length), count))
        documents_N = _document_numbers(tokens[:count], end_token)
        documents_RT = np.pad(documents_N, (0, inputs_RT.numel() - count)).reshape(inputs_RT.shape)
        labels_RT = np.where(targets_RT.numpy() == IGNORED_TARGET, UNCOUNTED, index)
        places_RT = np.broadcast_to(np.arange(context_length), labels_RT.shape)
        rows.append((inputs_RT.numpy(), targets_RT.numpy(), labels_RT, documents_RT, places_RT))
    return make_probe(name, tuple(streams), rows)


def example_probe(streams: Mapping[str, ExampleTokens], context_length: int, max_tokens: int) -> Probe:
    """The examples of each stream's beginning, about `max_tokens` of it, in rows; what is learned of them counts.

    An example is a document, and a place is counted from its first token.
    """
    blocks = []
    for index, stream in enumerate(streams.values()):
        rows = Rows(stream.first(max_tokens), context_length)
        found = {name: t.numpy() for name, t in rows.tensors(range(len(rows)), context_length).items()}
        examples_RT, targets_RT = found["examples"], found["targets"]
        first_R = np.cumsum([0, *map(len, rows.examples)])[:-1]
        documents_RT = np.where(examples_RT < 0, 0, examples_RT + first_R[:, None])
        labels_RT = np.where(targets_RT == IGNORED_TARGET, UNCOUNTED, index)
        blocks.append((found["inputs"], targets_RT, labels_RT, documents_RT, _places(examples_RT), examples_RT))
    examples = torch.from_numpy(np.concatenate([block[5] for block in blocks]).astype(np.int32))
    return replace(make_probe(TEXT, tuple(streams), [block[:5] for block in blocks]), examples_RT=examples)


def _places(examples_RT: Tokens) -> Tokens:
    """Places of tokens in their examples."""
    places_T = np.arange(examples_RT.shape[1])
    is_first_RT = np.diff(examples_RT, axis=1, prepend=-2) != 0
    return places_T - np.maximum.accumulate(np.where(is_first_RT, places_T, 0), axis=1)


def switch_probe(streams: Mapping[str, Tokens], context_length: int, end_token: int, max_tokens: int) -> Probe:
    """Windows whose first half is another domain's text: what counts is the second half.

    The first half cycles over the other domains; both halves are spread evenly over their streams. The first token
    behind the switch is read, not predicted, since no model can know that it comes.
    """
    labels, half = list(streams), context_length // 2
    rest = context_length - half
    rows = []
    for index, label in enumerate(labels):
        others = [streams[other] for other in (*labels[index + 1 :], *labels[:index])]
        documents_N = _document_numbers(streams[label][:-1], end_token)
        count = min((len(streams[label]) - 1) // rest, max(1, max_tokens // rest))
        for row in range(count):
            before = _passage(others[row % len(others)], row, half)
            first = row * (len(streams[label]) - 1) // count
            window = np.concatenate([before, streams[label][first : first + rest + 1]])
            unseen = np.full(half, UNCOUNTED)
            labels_T = np.concatenate([unseen, np.full(rest, index)])
            documents_T = np.concatenate([unseen, documents_N[first : first + rest]])
            rows.append((window[:-1], window[1:], labels_T, documents_T, np.arange(context_length) - half))
    return make_probe(SWITCH, tuple(labels), rows)


def mixed_probe(streams: Mapping[str, Tokens], context_length: int, max_tokens: int) -> Probe:
    """Documents of one window each: passages of different domains in turn, cut at whatever token.

    Lengths, 16 to 96 tokens (at most half a window), and domains are drawn by a fixed seed; passages are spread evenly
    over their streams. The first passage does not count, and the first token of a passage is read, not predicted.
    """
    labels, random = list(streams), np.random.default_rng(MIXED_SEED)
    longest = max(1, min(LONGEST_PASSAGE, context_length // 2))
    taken = [0] * len(labels)
    rows = []
    for document in range(max(1, max_tokens * len(labels) // context_length)):
        pieces: list[Tokens] = []
        owners: list[int] = []
        places: list[int] = []
        while len(places) <= context_length:
            index = _other(random, len(labels), owners[-1] if owners else None)
            length = int(random.integers(min(SHORTEST_PASSAGE, longest), longest + 1))
            piece = _passage(streams[labels[index]], taken[index], length)
            taken[index] += 1
            is_first = not pieces
            pieces.append(piece)
            owners += [index] * len(piece)
            places += [UNCOUNTED if is_first else place - 1 for place in range(len(piece))]
        window, owner, place = (
            np.asarray(item)[: context_length + 1] for item in (np.concatenate(pieces), owners, places)
        )
        labels_T = np.where(place[1:] < 0, UNCOUNTED, owner[1:])
        rows.append((window[:-1], window[1:], labels_T, np.full(context_length, document), place[1:]))
    return make_probe(MIXED, tuple(labels), rows, shares_documents=True)


def position_ranges(context_length: int) -> list[tuple[int, int]]:
    """Ranges [first, end) of positions in a window, each as long as all before it."""
    ends = [FIRST_POSITIONS]
    while ends[-1] < context_length:
        ends.append(ends[-1] * 2)
    return [(first, min(end, context_length)) for first, end in zip([0, *ends], ends, strict=False)]


def _document_numbers(ids: Tokens, end_token: int) -> Tokens:
    """For each id the number of the document that its target is of: every document ends with `end_token`."""
    return np.cumsum(np.asarray(ids) == end_token)


def _other(random: np.random.Generator, count: int, last: int | None) -> int:
    """A domain that is not the last one."""
    drawn = int(random.integers(count if last is None else count - 1))
    return drawn + int(last is not None and drawn >= last)


def _passage(tokens: Tokens, number: int, length: int) -> Tokens:
    """Passage number so and so of a stream: however many are taken, they lie evenly in it (golden ratio)."""
    start = int((number + 1) * GOLDEN % 1 * max(1, len(tokens) - length))
    return np.asarray(tokens[start : start + length])


def make_probe(
    name: str, labels: tuple[str, ...], rows: Sequence[tuple[Tokens, ...]], shares_documents: bool = False
) -> Probe:
    """A probe of rows (or blocks of rows) of inputs, targets, labels, documents and places, each [T] or [R, T]."""
    columns = (np.concatenate([np.atleast_2d(row[place]) for row in rows]).astype(np.int32) for place in range(5))
    inputs_RT, targets_RT, labels_RT, documents_RT, places_RT = map(torch.from_numpy, columns)
    return Probe(name, labels, inputs_RT, targets_RT, labels_RT, documents_RT, places_RT, shares_documents)
