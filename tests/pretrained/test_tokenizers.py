"""Tokenizers of pretrained models: other spellings of bytes, settings of both generations, ends of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from modularforge.data.tokenizer import (
    adopt_tokenizer,
    encode_texts,
    load_tokenizer,
    portable_settings,
    token_byte_lengths,
    vocabulary_size,
)
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


SPECIAL = ["<unk>", "<s>", "</s>"]
TYPED = "The cat</s>sat <s> on</s></s> the</s> mat"


def unigram() -> Tokenizer:
    """As some models of the Llama family have it: special tokens are pieces of the model."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(["the cat sat on the mat < s / > . The"] * 20, trainer)
    return tokenizer


def word_kind(model: Any) -> Tokenizer:
    words = [*SPECIAL, "the", "The", "cat", "sat", "on", "mat", "cat</s>sat", *"<>/s"]
    tokenizer = Tokenizer(model({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def merged() -> Tokenizer:
    """A BPE whose merges spell the end of a text."""
    letters = [*SPECIAL, *"</s>Thecatonm ", "</", "</s"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(letters))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("<", "/"), ("</", "s"), ("</s", ">")], unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


KINDS = [unigram, lambda: word_kind(models.WordPiece), lambda: word_kind(models.WordLevel), merged, sentencepiece_kind]


@pytest.mark.parametrize("make", KINDS)
def test_special_tokens_typed_in_a_text_are_text_whatever_the_model(make: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save(make(), tmp_path))
    ids = tokenizer.encode(TYPED).ids
    assert not {1, 2} & set(ids)
    assert len(ids) > 5


@pytest.mark.parametrize("make", KINDS)
def test_text_without_special_tokens_is_encoded_as_ever(make: Any, tmp_path: Path) -> None:
    plain = make()
    tokenizer = load_tokenizer(save(plain, tmp_path))
    for text in ("The cat sat on the mat", "< s > / <", "the</ s>", " ", ""):
        assert tokenizer.encode(text).ids == plain.encode(text).ids


def test_a_tokenizer_that_makes_special_tokens_of_any_text_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "!": 1}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["!"])
    with pytest.raises(DataError, match="turns the text '!' into its special token 1"):
        load_tokenizer(save(tokenizer, tmp_path))


def test_a_text_that_a_tokenizer_cannot_encode_is_one_sentence() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="<never>"))
    with pytest.raises(DataError, match=r"must encode any text, but fails \(WordLevel error: Missing"):
        encode_texts(tokenizer, ["a", "b"])


def test_an_end_of_text_that_is_not_marked_as_special_is_marked(tmp_path: Path) -> None:
    pieces = {piece: index for index, piece in enumerate(["<unk>", "<s>", "</s>", *"</s>abc"[1:]])}
    tokenizer = Tokenizer(models.BPE({**pieces, "<": 20}, []))
    tokenizer.add_tokens([AddedToken("</s>", special=False), AddedToken("<tool>", special=False)])
    source = save(tokenizer, tmp_path / "source", eos_token="</s>")
    (tmp_path / "output").mkdir()
    adopted, end = adopt_tokenizer(source, tmp_path / "output")
    assert end == 2
    for reader in (adopted, load_tokenizer(tmp_path / "output")):
        assert 2 not in reader.encode("a</s>b").ids
        assert reader.token_to_id("<tool>") in reader.encode("a<tool>b").ids  # its author calls it an ordinary token
        assert token_byte_lengths(reader)[2] == 0
    assert (source / "tokenizer.json").read_bytes() != (tmp_path / "output" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("value", [-1, 10**6, True, "2", [], [None], 1.0])
def test_an_end_of_text_that_the_tokenizer_lacks_is_refused(value: Any, tmp_path: Path) -> None:
    source = save(sentencepiece_kind(), tmp_path / "source", eos_token=5)
    (tmp_path / "output").mkdir()
    (source / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(DataError, match="must name the token that ends a text"):
        adopt_tokenizer(source, tmp_path / "output")
