"""One tokenizer for backbone and experts, stored as Hugging Face's ``tokenizer.json``: a byte-level BPE trained here.

Nothing is ever unknown, because all 256 bytes are in the vocabulary, and decoding gives back the exact text. Special
tokens come from us alone: ``<eos>`` (or WikiText's ``<unk>``) typed in a text is ordinary text of ordinary tokens.
A pretrained model brings a tokenizer of its own (adopted_tokenizer.py), of which only the last sentence holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from modularforge.errors import DataError
from modularforge.log import logger

SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>")
PAD, UNK, BOS, EOS = range(4)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a vocabulary from texts, the same from the same texts; it is smaller when they hold fewer merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B:1", special_tokens=[("<bos>", BOS)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
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
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception on malformed files
        raise DataError(f"{file} must be a tokenizer, but cannot be read ({error}); run prepare-data again") from error
    # Not part of the file, so every reader must set it: text never becomes a special token.
    tokenizer.encode_special_tokens = True
    # Files of pretrained models may carry both; documents are neither cut nor padded here.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id: pretrained vocabularies may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


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
