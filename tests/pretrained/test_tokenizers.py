"""Tokenizers of pretrained models: other spellings of bytes, settings of both generations, ends of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from modularforge.data.adopted_tokenizer import adopt_tokenizer, portable_settings
from modularforge.data.tokenizer import load_tokenizer, token_byte_lengths, vocabulary_size
from modularforge.errors import DataError


def sentencepiece_kind() -> Tokenizer:
    """Llama 2's kind: blanks are ▁, unknown characters fall back to bytes; one id is not in use."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "é"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)} | {"ab": len(pieces) + 1}
    model = models.BPE(vocabulary, [("▁", "a"), ("a", "b")], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("text", ["a b ab", "été 日本 ab", "</s> is text"])
def test_byte_lengths_of_sentencepiece_tokens_add_up(text: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save(sentencepiece_kind(), tmp_path))
    lengths = token_byte_lengths(tokenizer)
    assert len(lengths) == vocabulary_size(tokenizer) == 266 > tokenizer.get_vocab_size()
    assert lengths[tokenizer.encode(text).ids].sum() == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_files_that_cut_and_pad_do_so_no_longer(tmp_path: Path) -> None:
    tokenizer = sentencepiece_kind()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    loaded = load_tokenizer(save(tokenizer, tmp_path))
    assert len(loaded.encode("a").ids) == 1
    assert len(loaded.encode("b b b b b b").ids) > 4


@pytest.mark.parametrize("spelling", ["</s>", {"content": "</s>", "special": True}])
def test_the_end_of_a_text_is_named_by_the_settings(spelling: Any, tmp_path: Path) -> None:
    source = save(sentencepiece_kind(), tmp_path / "source", eos_token=spelling)
    (tmp_path / "output").mkdir()
    assert adopt_tokenizer(source, tmp_path / "output")[1] == 2


@pytest.mark.parametrize("value", [2, [2, 1]])
def test_or_else_by_the_models_config(value: Any, tmp_path: Path) -> None:
    source = save(sentencepiece_kind(), tmp_path / "source")
    (tmp_path / "output").mkdir()
    (source / "config.json").write_text(json.dumps({"eos_token_id": value}))
    assert adopt_tokenizer(source, tmp_path / "output")[1] == 2


def test_no_end_of_a_text_and_no_tokenizer_are_refused(tmp_path: Path) -> None:
    source = save(sentencepiece_kind(), tmp_path / "source", eos_token="<never>")
    (tmp_path / "output").mkdir()
    with pytest.raises(DataError, match="must name the token that ends a text"):
        adopt_tokenizer(source, tmp_path / "output")
    (source / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"must hold tokenizer\.json, but does not"):
        adopt_tokenizer(source, tmp_path / "output")


def test_settings_of_transformers_5_are_put_in_words_that_4_knows() -> None:
    newer = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "eos_token": "</s>"}
    older = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"], "eos_token": "</s>"}
    assert portable_settings(newer) == older
    assert portable_settings(older) == older
    assert portable_settings({"tokenizer_class": "Qwen2Tokenizer"}) == {"tokenizer_class": "Qwen2Tokenizer"}
