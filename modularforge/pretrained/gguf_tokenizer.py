"""The tokenizer that the metadata of a GGUF file describes, as Hugging Face's `tokenizer.json`; and back.

Two models: byte-level BPE with its merges (`gpt2`), cut into words as `tokenizer.ggml.pre` says, and SentencePiece's
BPE (`llama`), whose merges follow from the pieces' scores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from modularforge.errors import DataError, one_line

KEY = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # of `token_type`
SPACE = "\u2581"  # SentencePiece's blank
IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
SMOLLM, LLAMA3, QWEN2 = "smollm", "llama3", "qwen2"
PRE = {
    "default": "", "gpt-2": "", "gpt2": "", "smollm": SMOLLM,
    "llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3, "qwen2": QWEN2,
}  # fmt: skip
# How Llama 3's and Qwen 2's own tokenizer.json cut a text into words; they differ in how many digits are one.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def build_tokenizer(metadata: Mapping[str, Any], model: str) -> Tokenizer:
    """The tokenizer of these `tokenizer.*` keys; raises DataError, in which `model` names the file."""
    kind = metadata.get(f"{KEY}model")
    if kind not in BUILDERS:
        known = " or ".join(BUILDERS)
        raise DataError(
            f"{model} must have a tokenizer of the model {known}, but has {kind!r:.60}; name the folder or Hub name of "
            "the model that it was made from"
        )
    with _whole(model):
        tokenizer = BUILDERS[kind](metadata, model)
        _add_special(tokenizer, metadata)
        _add_begin(tokenizer, metadata)
        return tokenizer


@contextmanager
def _whole(model: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"{model} must have a tokenizer that fits together, but has none ({one_line(error)}); take another copy"
        ) from error


def _byte_level(metadata: Mapping[str, Any], model: str) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in metadata[f"{KEY}merges"]]
    pre = metadata.get(f"{KEY}pre", "default")
    if pre not in PRE:
        raise DataError(
            f"{model} must cut text into words as one of {', '.join(PRE)} (tokenizer.ggml.pre), but does as "
            f"{pre!r:.60}; name the folder or Hub name of the model that it was made from"
        )
    tokenizer = Tokenizer(models.BPE(_vocabulary(metadata), merges, ignore_merges=PRE[pre] == LLAMA3))
    tokenizer.pre_tokenizer = _words(PRE[pre])
    if PRE[pre] == QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _words(kind: str) -> Any:
    if kind in (LLAMA3, QWEN2):
        words = Regex(WORDS.replace("DIGITS", "{1,3}" if kind == LLAMA3 else ""))
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), whole])
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, whole]) if kind == SMOLLM else whole


def _sentence_pieces(metadata: Mapping[str, Any], _model: str) -> Tokenizer:
    vocabulary, scores = _vocabulary(metadata), metadata[f"{KEY}scores"]
    unknown = metadata[f"{KEY}tokens"][metadata.get(f"{KEY}unknown_token_id", 0)]
    merges = merges_of(vocabulary, scores)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    has_prefix = metadata.get(f"{KEY}add_space_prefix", True)
    blanks = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), blanks]) if has_prefix else blanks
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if has_prefix else parts)
    return tokenizer


def merges_of(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges of SentencePiece's BPE: every way to make a piece of two others, the best scores first."""
    found = []
    for piece, index in vocabulary.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        own = [(vocabulary[left], vocabulary[right], left, right) for left, right in halves
               if left in vocabulary and right in vocabulary]  # fmt: skip
        found += [(-scores[index], left, right) for _, _, left, right in sorted(own)]
    return [(left, right) for _, left, right in sorted(found, key=lambda merge: merge[0])]


Builder = Callable[[Mapping[str, Any], str], Tokenizer]
BUILDERS: dict[str, Builder] = {"gpt2": _byte_level, "llama": _sentence_pieces}


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    return {token: index for index, token in enumerate(metadata[f"{KEY}tokens"])}


def _add_special(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Control tokens, and the one for what is unknown, are special; those that a user defined are whole words."""
    kinds = zip(metadata[f"{KEY}tokens"], metadata.get(f"{KEY}token_type", ()), strict=False)
    for token, kind in kinds:
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind != USER_DEFINED, normalized=False)])


def _add_begin(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Texts begin with a token where the file says so; SentencePiece's and Llama 3's do unless it says no."""
    is_usual = metadata[f"{KEY}model"] == "llama" or PRE.get(metadata.get(f"{KEY}pre", "")) == LLAMA3
    index = metadata.get(f"{KEY}bos_token_id")
    if index is None or not metadata.get(f"{KEY}add_bos_token", is_usual):
        return
    token = metadata[f"{KEY}tokens"][index]
    template = {"single": f"{token}:0 $A:0", "pair": f"{token}:0 $A:0 {token}:1 $B:1"}
    tokenizer.post_processor = processors.TemplateProcessing(**template, special_tokens=[(token, index)])


def special_ids(key: Callable[[str], Any]) -> dict[str, int]:
    """The ids of begin, end and padding that there are, as config.json calls them."""
    found = {name: key(f"{KEY}{ours}") for name, ours in IDS.items()}
    return {name: int(index) for name, index in found.items() if index is not None}


def tokenizer_settings(metadata: Mapping[str, Any], positions: int, model: str) -> dict[str, Any]:
    """tokenizer_config.json, with the chat template where there is one; raises DataError as `build_tokenizer` does."""
    ids = special_ids(metadata.get)
    ids |= {"unk_token_id": index} if (index := metadata.get(f"{KEY}unknown_token_id")) is not None else {}
    with _whole(model):
        named = {name.removesuffix("_id"): metadata[f"{KEY}tokens"][index] for name, index in ids.items()}
    template = metadata.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
        **named,
        **({"chat_template": template} if template else {}),
    }


PROBES = (
    "The capital of France isn't  Paris;", " x1 = 34567890;\n\n\treturn  'na\u00efve' \u4f60\u597d \U0001f600",
    "e\u0301 \u00b2\u00bd a.b,c\r\n!!\n ", "'S I'LL \u0661\u0662\u0663", "", " ",
)  # fmt: skip
"""Texts that ways of cutting text into words, and of preparing it, tell apart."""


def tokenizer_keys(path: Path, values: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The `tokenizer.*` keys from which a tokenizer is built that reads texts as that of `path` does.

    `values` are those of config.json. Raises DataError where the format has no such tokenizer.
    """
    tokenizer, stored = Tokenizer.from_file(str(path)), json.loads(path.read_bytes())
    added = [token["content"] for token in stored["added_tokens"] if token["id"] < values["vocab_size"]]
    texts = [*PROBES, *(f"a {token}b" for token in added)]
    expected = [_read(tokenizer, text) for text in texts]
    for keys in _possible_keys(tokenizer, stored, values):
        built = build_tokenizer(keys, model)
        if [_read(built, text) for text in texts] == expected:
            return keys
    raise DataError(
        f"{model} must have a tokenizer that GGUF can say, byte-level BPE cut into words as GPT-2, SmolLM, Llama 3 or "
        "Qwen 2 do, or SentencePiece's BPE, but has another; convert it with llama.cpp's own convert_hf_to_gguf.py"
    )


def _read(tokenizer: Tokenizer, text: str) -> tuple[list[str], list[int]]:
    """The words that a text is cut into, which its ids need not show, and these."""
    clean = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    words = tokenizer.pre_tokenizer.pre_tokenize_str(clean) if tokenizer.pre_tokenizer else [(clean, None)]
    return [word for word, _ in words], tokenizer.encode(text).ids


def _possible_keys(
    tokenizer: Tokenizer, stored: Mapping[str, Any], values: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    if stored["model"].get("type") != "BPE":
        return
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]]
    common = _token_keys(stored, int(values["vocab_size"])) | _special_keys(tokenizer, values)
    if stored["model"].get("byte_fallback"):
        unknown = tokenizer.token_to_id(stored["model"].get("unk_token") or "<unk>")
        common |= {f"{KEY}model": "llama", f"{KEY}pre": "default", f"{KEY}unknown_token_id": unknown or 0}
        common[f"{KEY}scores"] = _scores(common[f"{KEY}tokens"], merges)
        yield from ({**common, f"{KEY}add_space_prefix": has_prefix} for has_prefix in (True, False))
        return
    common |= {f"{KEY}model": "gpt2", f"{KEY}merges": merges}
    yield from ({**common, f"{KEY}pre": pre} for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"))


def _token_keys(stored: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Spellings and kinds of all rows of the embedding; those that the tokenizer does not know are unused."""
    tokens, kinds = [f"[PAD{index}]" for index in range(rows)], [UNUSED] * rows
    for token, index in stored["model"]["vocab"].items():
        is_byte = stored["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
        tokens[index], kinds[index] = token, BYTE if is_byte else NORMAL
    for added in stored["added_tokens"]:
        if added["id"] < rows:  # a tokenizer may know tokens that the model has not
            tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    return {f"{KEY}tokens": tokens, f"{KEY}token_type": kinds}


def _special_keys(tokenizer: Tokenizer, values: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of begin, end and padding, the first where there are several, and whether texts begin with one."""
    found = {name: values.get(name) for name in IDS}
    ids = {name: index[0] if isinstance(index, list) else index for name, index in found.items()}
    begin = tokenizer.encode("").ids
    ids |= {"bos_token_id": begin[0]} if begin else {}
    known = {f"{KEY}{IDS[name]}": index for name, index in ids.items() if isinstance(index, int) and index >= 0}
    return known | {f"{KEY}add_bos_token": bool(begin)}


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece merges what has the best score first: earlier merges have better ones."""
    ranks = {merge.replace(" ", ""): rank for rank, merge in reversed([*enumerate(merges)])}
    return [-float(ranks.get(token, len(merges))) for token in tokens]
