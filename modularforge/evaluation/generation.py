"""Continue a text, greedy or sampled, with a key-value cache; load a model folder for it, and ask for prompts."""

# T tokens  V vocabulary

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer
from torch import Tensor

from checkpoints.screen import literal
from modularforge.data.packing import PADDING
from modularforge.data.tokenizer import EOS, PAD, load_tokenizer
from modularforge.errors import DataError, MismatchError
from modularforge.model.backbone import Decoder, FixedCache, KeyValueCache
from modularforge.model.hub_config import end_tokens as ends_of
from modularforge.model.text_router import TextState
from modularforge.stored_models import stored_model
from modularforge.training.distributed import default_device

# Below this, float32 cannot divide by the temperature, and the likeliest token is certain anyway.
COLDEST = 1e-5
PROMPTS_AT_ONCE = 16

FixedStep = Callable[[Tensor, FixedCache], Tensor]
"""`Decoder.fixed_logits` of a model, as it is, compiled or captured."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    new_tokens: int,
    sampling: Sampling,
    end_tokens: Collection[int] = (EOS,),
) -> str:
    """The continuation of `prompt` (without it), at most `new_tokens` long, ending early at one of `end_tokens`."""
    ids = open_prompt(tokenizer, prompt, end_tokens)
    text: str = tokenizer.decode(continue_tokens(model, ids, new_tokens, sampling, end_tokens))
    return text


def open_prompt(tokenizer: Tokenizer, prompt: str, end_tokens: Collection[int]) -> list[int]:
    """The ids of a prompt that something can follow; raises DataError."""
    ids = prompt_tokens(tokenizer, prompt)
    if ids[-1] in end_tokens:
        raise DataError("a prompt must not end with the end of a text, since nothing follows that; shorten the prompt")
    return ids


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt, at least one; raises DataError."""
    try:
        ids: list[int] = tokenizer.encode(prompt).ids
    except TypeError as error:  # what tokenizers says of text with halves of characters
        raise DataError("a prompt must be valid Unicode, but is not; type it again in UTF-8") from error
    if not ids:
        raise DataError("a prompt must have at least one token, but is empty; type a word")
    return ids


def continue_tokens(
    model: Decoder, ids: list[int], new_tokens: int, sampling: Sampling, end_tokens: Collection[int] = (EOS,)
) -> list[int]:
    """The tokens that follow `ids`, at most `new_tokens`, ending early before one of `end_tokens`."""
    return list(following_tokens(model, ids, new_tokens, sampling, end_tokens))


@torch.inference_mode()
def following_tokens(
    model: Decoder, ids: list[int], new_tokens: int, sampling: Sampling, end_tokens: Collection[int] = (EOS,)
) -> Iterator[int]:
    """The same, each as soon as it is chosen."""
    device = model.lm_head.weight.device
    generator = torch.Generator().manual_seed(sampling.seed)
    model.eval()
    limit = model.config.context_length
    said, begins = list(ids), max(0, len(ids) - max(1, limit - 1))  # what is in the context begins there
    before = _read(model, said[:begins], None)
    room = min(limit, len(said) - begins + new_tokens)
    cache, pending, new = KeyValueCache(before, room), said[begins:], list[int]()
    for _ in range(new_tokens):
        if cache.length + len(pending) > limit:
            # Rotary angles end at the context length: start again from the second half of what was said.
            said, gone = ids + new, begins
            begins = len(said) - (limit + 1) // 2
            before = _read(model, said[gone:begins], before)
            pending, cache = said[begins:], KeyValueCache(before, limit)
        logits_1V = model.next_logits(torch.tensor([pending], device=device), cache)
        token = choose_token(logits_1V[0], sampling, generator)
        if token in end_tokens:
            return
        new.append(token)
        pending = [token]
        yield token


def continue_each(
    model: Decoder,
    prompts: Sequence[list[int]],
    new_tokens: int,
    sampling: Sampling,
    end_tokens: Collection[int],
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """The tokens that follow each of several prompts, as `continue_tokens` gives them, and as many at once as can be.

    A continuation that would leave the context goes on without its beginning, which only one alone can. `seeds` are as
    in `continue_batch`.
    """
    room = model.config.context_length - new_tokens
    seeds = _seeds(sampling, len(prompts)) if seeds is None else seeds
    together = [place for place, ids in enumerate(prompts) if len(ids) <= room]
    found: dict[int, list[int]] = {}
    for first in range(0, len(together), PROMPTS_AT_ONCE):
        places = together[first : first + PROMPTS_AT_ONCE]
        asked, own = [prompts[place] for place in places], [seeds[place] for place in places]
        found |= zip(places, continue_batch(model, asked, new_tokens, sampling, end_tokens, own), strict=True)
    for place in set(range(len(prompts))) - set(together):
        own_sampling = replace(sampling, seed=seeds[place])
        found[place] = continue_tokens(model, prompts[place], new_tokens, own_sampling, end_tokens)
    return [found[place] for place in range(len(prompts))]


def _seeds(sampling: Sampling, count: int) -> list[int]:
    return [sampling.seed + place for place in range(count)]


def continue_batch(
    model: Decoder,
    prompts: Sequence[list[int]],
    new_tokens: int,
    sampling: Sampling,
    end_tokens: Collection[int],
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """The tokens that follow each of several prompts, as `continue_tokens` gives them one at a time.

    Rows are padded on the left, and leave the batch when they end. A prompt that leaves no room in the context loses
    its beginning. What is sampled follows from the seed and the prompt's place, or from `seeds`, one for each prompt.
    """
    device, room = model.lm_head.weight.device, max(1, model.config.context_length - new_tokens)
    asked = [ids if len(ids) <= room else [ids[0], *ids[len(ids) - room + 1 :]] for ids in prompts]
    width = max(map(len, asked))
    tokens_BT = torch.tensor([[PAD] * (width - len(ids)) + ids for ids in asked], device=device)
    examples_BT = torch.tensor([[PADDING] * (width - len(ids)) + [0] * len(ids) for ids in asked], device=device)
    seeds = _seeds(sampling, len(asked)) if seeds is None else seeds
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    new: list[list[int]] = [[] for _ in asked]
    active, cache = list(range(len(asked))), KeyValueCache(room=width + new_tokens)
    model.eval()
    with torch.inference_mode():
        for _ in range(min(new_tokens, model.config.context_length - 1)):
            logits_BV = model.next_logits(tokens_BT, cache, examples_BT)
            chosen = _choose_each(logits_BV, sampling, [generators[row] for row in active])
            going = [i for i, token in enumerate(chosen) if token not in end_tokens]
            for i in going:
                new[active[i]].append(chosen[i])
            if len(going) < len(active):
                cache.keep(torch.tensor(going, dtype=torch.long, device=device))
                active = [active[i] for i in going]
            if not active:
                break
            tokens_BT = torch.tensor([[chosen[i]] for i in going], device=device)
            examples_BT = torch.zeros_like(tokens_BT)
    return new


@torch.inference_mode()
def continue_fixed(
    model: Decoder, prompts: Sequence[list[int]], new_tokens: int, end_tokens: Collection[int], step: FixedStep
) -> list[list[int]]:
    """The likeliest tokens that follow each prompt, as `continue_batch` gives them, by steps of the same shapes.

    All rows stay until the last has ended. Between two steps the host asks for the chosen ids, to see whether all have
    ended; within one it asks for nothing. Raises MismatchError for a model with experts, and DataError where prompts
    and `new_tokens` do not fit into the context together.
    """
    device, width, limit = model.lm_head.weight.device, max(map(len, prompts)), model.config.context_length
    if not model.goes_one_way:
        raise MismatchError(
            "generation in steps of fixed shapes needs a model without experts, but this one has some; use "
            "continue_batch"
        )
    if width + new_tokens > limit:
        raise DataError(
            f"a prompt and its continuation must fit into the context of {limit} tokens, but have {width} and "
            f"{new_tokens}; ask for fewer, or use continue_each"
        )
    tokens_BT = torch.tensor([[PAD] * (width - len(ids)) + ids for ids in prompts], device=device)
    examples_BT = torch.tensor([[PADDING] * (width - len(ids)) + [0] * len(ids) for ids in prompts], device=device)
    filled, rows = KeyValueCache(room=width + new_tokens), [list[int]() for _ in prompts]
    is_over = [False] * len(rows)
    model.eval()
    token_B1 = model.next_logits(tokens_BT, filled, examples_BT).argmax(dim=-1, keepdim=True)
    cache = FixedCache(filled)
    for count in range(1, new_tokens + 1):
        for index, token in enumerate(token_B1[:, 0].tolist()):
            is_over[index] |= token in end_tokens
            if not is_over[index]:
                rows[index].append(token)
        if all(is_over) or count == new_tokens:
            break
        token_B1.copy_(step(token_B1, cache).argmax(dim=-1, keepdim=True))
        cache.advance()
    return rows


def captured(model: Decoder) -> FixedStep:
    """Steps of a model on a GPU as one CUDA graph for each cache, which is captured when that cache is first seen.

    The last cache and its graph are kept.
    """
    held: list[tuple[FixedCache, torch.cuda.CUDAGraph, Tensor, Tensor]] = []

    def step(token_B1: Tensor, cache: FixedCache) -> Tensor:
        if not held or held[0][0] is not cache:
            held.clear()  # before the next takes its memory
            own_B1 = token_B1.clone()  # what the graph reads, whatever it is called with
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries settle before a capture, as torch asks; a step may be repeated
                model.fixed_logits(own_B1, cache)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits_BV = model.fixed_logits(own_B1, cache)
            held.append((cache, graph, own_B1, logits_BV))
        _, graph, own_B1, logits_BV = held[0]
        own_B1.copy_(token_B1)
        graph.replay()
        return logits_BV

    return step


def _read(model: Decoder, ids: list[int], before: TextState | None) -> TextState | None:
    """What a text router knows behind tokens that leave the context; `before` is what it knew in front of them."""
    if model.text_router is None or not ids:
        return before
    state: TextState = model.text_router(torch.tensor([ids], device=model.lm_head.weight.device), before)[1]
    return state


def _choose_each(logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """The next token's id of each row; of a GPU's logits, ids alone are fetched where the likeliest are wanted."""
    if sampling.temperature < COLDEST:
        likeliest: list[int] = logits_BV.argmax(dim=-1).tolist()
        return likeliest
    on_cpu_BV = logits_BV.cpu()
    return [choose_token(logits_V, sampling, one) for logits_V, one in zip(on_cpu_BV, generators, strict=True)]


def choose_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token's id."""
    if sampling.temperature < COLDEST:
        return int(logits_V.argmax())
    logits_V = logits_V.float().cpu()
    probabilities_V = keep_likely(logits_V / sampling.temperature, sampling.top_k, sampling.top_p).softmax(dim=-1)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def keep_likely(logits_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """The logits with all but the likeliest tokens at -inf: the top k of them, then the fewest that hold `top_p`.

    Each token keeps its place in the vocabulary, and the likeliest one is always kept (Holtzman et al.,
    arXiv 1904.09751, section 3.1).
    """
    if 0 < top_k < len(logits_V):
        threshold = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < threshold, float("-inf"))
    if top_p < 1:
        sorted_V, token_V = logits_V.sort(descending=True)
        mass_V = sorted_V.softmax(dim=-1).cumsum(dim=-1)
        before_V = mass_V - sorted_V.softmax(dim=-1)
        logits_V = logits_V.scatter(0, token_V, sorted_V.masked_fill(before_V >= top_p, float("-inf")))
    return logits_V


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and the tokens that end a text."""

    model: Decoder
    tokenizer: Tokenizer
    end_tokens: tuple[int, ...]


def load_for_generation(url: str) -> Loaded:
    """Read a model folder: an artifact of any store, or any folder with config, weights and tokenizer."""
    stored = stored_model(url)
    model = stored.load().to(default_device())
    return Loaded(model, load_tokenizer(stored.file("tokenizer.json")), ends_of(stored.values))


def continue_text(loaded: Loaded, prompt: str, tokens: int, sampling: Sampling) -> str:
    """The continuation of a prompt."""
    return generate(loaded.model, loaded.tokenizer, prompt, tokens, sampling, loaded.end_tokens)


def continue_texts(loaded: Loaded, prompts: Sequence[str], tokens: int, sampling: Sampling) -> list[str]:
    """The continuations of prompts, in batches where they have room in the context."""
    asked = [open_prompt(loaded.tokenizer, prompt, loaded.end_tokens) for prompt in prompts]
    if len(asked) == 1:
        return [continue_text(loaded, prompts[0], tokens, sampling)]
    texts: list[str] = loaded.tokenizer.decode_batch(
        continue_each(loaded.model, asked, tokens, sampling, loaded.end_tokens)
    )
    return texts


def spoken(loaded: Loaded, ids: list[int], tokens: int, sampling: Sampling) -> Iterator[str]:
    """The continuation of ids in pieces of text, each as soon as its characters are whole."""
    new: list[int] = []
    said = ""
    for token in following_tokens(loaded.model, ids, tokens, sampling, loaded.end_tokens):
        new.append(token)
        text: str = loaded.tokenizer.decode(new)
        # A character of several bytes may need several tokens; until it is whole it is decoded as this one.
        if not text.endswith("\ufffd") and text.startswith(said):
            yield text[len(said) :]
            said = text
    yield loaded.tokenizer.decode(new)[len(said) :]


def show(text: str, end: str = "\n") -> None:
    """Print what a model wrote: as it is into a file, without terminal escapes on a terminal."""
    print(literal(text) if sys.stdout.isatty() else text, end=end, flush=True)


def show_pieces(pieces: Iterable[str]) -> str:
    """Print what a model writes while it writes it; returns all of it. Ctrl-C ends it there."""
    said = ""
    try:
        for piece in pieces:
            said += piece
            show(piece, end="")
    except KeyboardInterrupt:
        pass
    print(flush=True)
    return said
