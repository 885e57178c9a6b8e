"""One tokenizer for backbone and experts, stored as Hugging Face's ``tokenizer.json``: a byte-level BPE trained here.

Nothing is ever unknown, because all 256 bytes are in the vocabulary, and decoding gives back the exact text. Special
tokens come from us alone: ``<eos>`` (or WikiText's ``<unk>``) typed in a text is ordinary text of ordinary tokens.

A pretrained model brings a tokenizer of its own, whose special tokens are ours to guard too. It is taken over as it
is, but for settings beside ``tokenizer.json`` that transformers 5 writes and 4 cannot read, and for the token that ends
a text where it is not marked as special: typed in a text it would end it. `encode_special_tokens` keeps the tokenizers
library from matching special tokens in texts, but a model may hold their spelling as an entry of its own (Unigram,
WordPiece, word lists). Then the spelling is cut in two before the model sees it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from checkpoints import paths
from checkpoints.parsing import parse_object
from modularforge.data.background import still_at_it
from modularforge.errors import DataError, one_line
from modularforge.log import logger

SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>")
PAD, UNK, BOS, EOS = range(4)
LONGEST_TEXT = 1 << 22  # characters that are encoded at once
WORD_END = re.compile(r"(?<=\S)(?= \S)|(?<=[^\W\d_])(?=\n[^\W\d_])")
LONGEST_WORD = 1024  # characters; only while a vocabulary is learned
WORD_LETTERS = (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]", r"\s")  # what words are of, for the byte-level pre-tokenizer
MAX_VOCABULARY = 1_000_000  # as data.vocab_size
# Where a spelling may stand: alone, within words, after a blank, twice.
CONTEXTS = ("{0}", "a{0}b", "a {0} b", "{0}{0}", ".{0}.")
COPIED = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
SETTINGS_NAME = "tokenizer_config.json"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a vocabulary from texts, the same from the same texts; it is smaller when they hold fewer merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B:1", special_tokens=[("<bos>", BOS)]
    )
    whole_words = tokenizer.pre_tokenizer
    # Merging within a word takes time by the square of its length, and some texts are one word.
    cut = pre_tokenizers.Split(Regex("|".join(f"{kind}{{{LONGEST_WORD}}}" for kind in WORD_LETTERS)), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, whole_words])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with still_at_it("learning the tokenizer"):
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = whole_words
    tokenizer.encode_special_tokens = True
    if tokenizer.get_vocab_size() < vocab_size:
        logger.warning(
            "data.vocab_size is %d, but the sample text holds only %d entries; the smaller vocabulary is used",
            vocab_size,
            tokenizer.get_vocab_size(),
        )
    return tokenizer


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read ``tokenizer.json`` (or the folder that holds it); raises DataError."""
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    try:
        return parse_tokenizer(paths.read_bytes(str(file)).decode())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file} must be a tokenizer, but cannot be read ({one_line(error)}); run prepare-data again, or take "
            "the file of another copy of the model"
        ) from error


def parse_tokenizer(content: str) -> Tokenizer:
    """A tokenizer from the text of its file, for whole documents as plain text; raises ValueError.

    What the file does not say every reader must set: text never becomes a special token.
    """
    try:
        _check_prefix(json.loads(content))
        tokenizer = Tokenizer.from_str(content)
        # Files of pretrained models may carry both; documents are neither cut nor padded here.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if not 0 < vocabulary_size(tokenizer) <= MAX_VOCABULARY:
            raise ValueError(f"its ids must be from 0 to {MAX_VOCABULARY}, and it must have some")
        guard_special_tokens(tokenizer)
        tokenizer.encode("Where its parts do not fit, it fails here.")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and panics are no Exception
        raise ValueError(str(error)) from error
    return tokenizer


def _check_prefix(values: Any) -> None:
    """Refuse merges without the prefix of their model: the library cuts it off unseen, which can end the process."""
    model = values.get("model") if isinstance(values, dict) else None
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not prefix:
        return
    ends = [merge.split(" ")[-1] if isinstance(merge, str) else merge[-1] for merge in model.get("merges") or ()]
    if not prefix.isascii() or not all(end.startswith(prefix) for end in ends):
        raise ValueError(f"its merges must go on with the prefix {prefix!r:.40}, which must be plain characters")


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[Encoding]:
    """The ids of many texts; raises DataError for what a tokenizer of other people cannot encode."""
    try:
        found: list[Encoding] = tokenizer.encode_batch_fast(texts)
        return found
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # as in parse_tokenizer
        raise DataError(
            f"the tokenizer must encode any text, but fails ({one_line(error)}); take another, or another model"
        ) from error


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[Encoding | npt.NDArray[np.uint32]]:
    """The same of documents of any length: of a long one the ids alone, since an Encoding takes 100 bytes a token.

    A long text goes through the tokenizer in pieces, which end before a single blank where there is one: words end
    there in byte-level vocabularies, so that the ids are those of the whole.
    """
    short = iter(encode_texts(tokenizer, [text for text in texts if len(text) <= LONGEST_TEXT]))
    return [next(short) if len(text) <= LONGEST_TEXT else _long_ids(tokenizer, text) for text in texts]


def _long_ids(tokenizer: Tokenizer, text: str) -> npt.NDArray[np.uint32]:
    around = encode_texts(tokenizer, [text[:1]])[0]
    own = [place for place, is_special in enumerate(around.special_tokens_mask) if not is_special]
    before, after = around.ids[: own[0]], around.ids[own[-1] + 1 :]
    pieces = [before, *(_plain_ids(tokenizer, piece) for piece in _cut(text)), after]
    return np.concatenate([np.array(piece, np.uint32) for piece in pieces])


def _plain_ids(tokenizer: Tokenizer, piece: str) -> npt.NDArray[np.uint32]:
    return np.array(tokenizer.encode(piece, add_special_tokens=False).ids, np.uint32)


def _cut(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > LONGEST_TEXT:
        limit = start + LONGEST_TEXT
        breaks = [found.start() for found in WORD_END.finditer(text, max(start + 1, limit - LONGEST_WORD), limit)]
        end = breaks[-1] if breaks else limit
        yield text[start:end]
        start = end
    yield text[start:]


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id: pretrained vocabularies may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def token_byte_lengths(tokenizer: Tokenizer) -> npt.NDArray[np.int32]:
    """Bytes of text that each token stands for, [V]; 0 for special tokens. Bits per byte divides by their sum."""
    lengths_V = np.zeros(vocabulary_size(tokenizer), dtype=np.int32)
    # A byte-level token is written with one stand-in character for each of its bytes.
    length_of = len if "ByteLevel" in str(tokenizer.decoder) else _plain_length
    for token, index in tokenizer.get_vocab().items():
        lengths_V[index] = length_of(token)
    for index, added in tokenizer.get_added_tokens_decoder().items():
        lengths_V[index] = 0 if added.special else len(added.content.encode())
    return lengths_V


def _plain_length(token: str) -> int:
    """Bytes of a token in SentencePiece's spelling: a blank is ▁, a lone byte is <0x0A>."""
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return 1 if is_byte else len(token.replace("▁", " ").encode())


def take_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Texts until they hold `limit` bytes; the last one is cut."""
    for text in texts:
        content = text.encode()
        yield content[:limit].decode(errors="ignore")
        limit -= len(content)
        if limit <= 0:
            return


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context_length: int | None = None) -> None:
    """Write ``tokenizer.json`` and the configuration with which transformers' AutoTokenizer loads the folder.

    `context_length` is that of the model beside it; prepared data belongs to no model yet.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    if context_length is not None:
        settings["model_max_length"] = context_length
    settings |= {f"{token.strip('<>')}_token": token for token in SPECIAL_TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


class SpecialTokenError(ValueError):
    """A tokenizer makes special tokens of text whatever is done; says which."""


def guard_special_tokens(tokenizer: Tokenizer) -> None:
    """Change a tokenizer in place so that no text becomes a special token; raises SpecialTokenError.

    One whose model does not do that (any byte-level BPE) stays as it is, and as fast.
    """
    tokenizer.encode_special_tokens = True
    special = _special_tokens(tokenizer)
    _require_own_ids(tokenizer, special)
    if typed := [text for text, index in special.items() if _becomes(tokenizer, text, index)]:
        cut = pre_tokenizers.Split(Regex("|".join(_first_letter(text) for text in typed)), "isolated")
        own: Any = tokenizer.pre_tokenizer
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([own, cut]) if own else cut
    for text in typed:
        if _becomes(tokenizer, text, special[text]):
            raise SpecialTokenError(f"it turns the text {text!r:.80} into its special token {special[text]}")


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Spelling and id, without the token for what is unknown, which stands for any text; Unigram hides which it is."""
    unknown = getattr(tokenizer.model, "unk_token", None)
    added = tokenizer.get_added_tokens_decoder()
    found = {token.content: index for index, token in added.items() if token.special and token.content}
    return {text: index for text, index in found.items() if text != unknown and "unk" not in text.lower()}


def _require_own_ids(tokenizer: Tokenizer, special: dict[str, int]) -> None:
    shared = {index: text for text, index in tokenizer.get_vocab().items() if special.get(text) != index}
    for text, index in special.items():
        if index in shared:
            raise SpecialTokenError(f"its special token {text!r:.80} has the id {index} of {shared[index]!r:.80}")


def _becomes(tokenizer: Tokenizer, text: str, index: int) -> bool:
    texts = (context.format(text) for context in CONTEXTS)
    return any(index in tokenizer.encode(typed, add_special_tokens=False).ids for typed in texts)


def _first_letter(text: str) -> str:
    """A pattern for the first letter of a spelling where the others follow."""
    first, *rest = (f"\\x{{{ord(letter):x}}}" for letter in text)
    return f"{first}(?={''.join(rest)})"


def adopt_tokenizer(source: Path, output: Path) -> tuple[Tokenizer, int]:
    """Copy the tokenizer of the model folder `source`; returns it and the id of its end of text. Raises DataError."""
    if not (source / "tokenizer.json").is_file():
        raise DataError(
            f"{source} must hold tokenizer.json, but does not; load its tokenizer with transformers' AutoTokenizer and "
            "save it there with save_pretrained"
        )
    tokenizer = load_tokenizer(source)
    end_token = find_end_token(source, tokenizer)
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    if not _is_special(tokenizer, end_token):
        _mark_special(output / "tokenizer.json", str(tokenizer.id_to_token(end_token)), end_token)
        tokenizer = load_tokenizer(output)
    settings = portable_settings(_read(source / SETTINGS_NAME))
    (output / SETTINGS_NAME).write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return tokenizer, end_token


def find_end_token(folder: Path, tokenizer: Tokenizer) -> int:
    """The id of the token that ends a text: by the tokenizer's settings, else by the model's config.json."""
    for name in (SETTINGS_NAME, "special_tokens_map.json"):
        token = _read(folder / name).get("eos_token")
        content = token.get("content") if isinstance(token, dict) else token
        index = tokenizer.token_to_id(content) if isinstance(content, str) else None
        if index is not None:
            return int(index)
    index = _read(folder / "config.json").get("eos_token_id")
    index = index[0] if isinstance(index, list) and index else index
    if type(index) is int and 0 <= index < vocabulary_size(tokenizer):
        return index
    raise DataError(
        f"{folder} must name the token that ends a text (eos_token in {SETTINGS_NAME}), but names none that its "
        "tokenizer has; add it"
    )


def portable_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json in words that transformers 4 and 5 both know."""
    if settings.get("tokenizer_class") in (None, "TokenizersBackend"):  # the name that 5 gave PreTrainedTokenizerFast
        settings = {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):  # 4 wants names for them there
        settings = {key: value for key, value in settings.items() if key != "extra_special_tokens"}
        settings |= {"additional_special_tokens": extra} if extra else {}
    return settings


def _is_special(tokenizer: Tokenizer, index: int) -> bool:
    token = tokenizer.get_added_tokens_decoder().get(index)
    return token is not None and token.special


def _mark_special(file: Path, content: str, index: int) -> None:
    """Mark a token as special in ``tokenizer.json``."""
    values = _read(file)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    others = [token for token in values.get("added_tokens") or [] if token["id"] != index]
    added = [*others, {"id": index, "content": content, **plain, "special": True}]
    values["added_tokens"] = sorted(added, key=lambda token: int(token["id"]))
    file.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} must be a JSON object, but cannot be read ({one_line(error)}); fetch the model again"
        ) from error
