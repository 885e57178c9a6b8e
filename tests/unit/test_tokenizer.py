"""The byte-level tokenizer: nothing is unknown, nothing is lost, text never becomes a special token."""

import json
import logging
import os
import random
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from checkpoints import StoreError
from modularforge.data import background, tokenizer
from modularforge.data.tokenizer import (
    BOS,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    UNK,
    load_tokenizer,
    save_tokenizer,
    take_bytes,
    token_byte_lengths,
    train_tokenizer,
)
from modularforge.errors import DataError
from modularforge.log import logger

TEXTS = ["the cat sat on the mat , the <unk> too\n" * 3, "déjà vu à la carte", "日本語 text <eos> <bos>"] * 4
TOKENIZER = train_tokenizer(TEXTS, 300)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([*SPECIAL_TOKENS, " ", "a"])
).map("".join)


def test_special_tokens_have_the_first_ids():
    assert [TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS] == [PAD, UNK, BOS, EOS] == [0, 1, 2, 3]


@settings(deadline=None)
@given(ANY_TEXT)
def test_any_text_comes_back_and_holds_no_special_token(text):
    ids = TOKENIZER.encode(text).ids
    assert ids[0] == BOS
    assert all(index > EOS for index in ids[1:])
    assert TOKENIZER.decode(ids) == text


@settings(deadline=None)
@given(ANY_TEXT)
def test_byte_lengths_add_up_to_the_bytes_of_the_text(text):
    lengths_V = token_byte_lengths(TOKENIZER)
    assert lengths_V.dtype == np.int32
    assert lengths_V[TOKENIZER.encode(text).ids].sum() == len(text.encode())


def test_the_same_texts_give_the_same_tokenizer():
    assert train_tokenizer(TEXTS, 300).to_str() == TOKENIZER.to_str()


def test_a_small_corpus_gives_a_smaller_vocabulary_and_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="modularforge"):
        small = train_tokenizer(["aaaa"], 1000)
    assert 260 <= small.get_vocab_size() < 1000
    assert "data.vocab_size is 1000" in caplog.text


def test_the_sample_stops_at_its_limit_without_breaking_a_character():
    assert list(take_bytes(["abc", "dé", "never read"], 5)) == ["abc", "d"]


def test_transformers_reads_the_folder_and_agrees(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(TOKENIZER, tmp_path, context_length=64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "the cat <eos> déjà  vu\n"
    assert theirs(text)["input_ids"] == TOKENIZER.encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    assert (theirs.pad_token_id, theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id) == (PAD, UNK, BOS, EOS)
    assert theirs.model_max_length == 64


def test_a_saved_tokenizer_keeps_the_rule_for_special_tokens(tmp_path):
    save_tokenizer(TOKENIZER, tmp_path, context_length=64)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert EOS not in load_tokenizer(path).encode("a <eos> b").ids


def test_a_broken_tokenizer_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json must be a tokenizer, but cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{}" * 3, b"[" * 5000])
def test_whatever_stands_in_a_tokenizer_file_is_one_sentence(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer.json must be a tokenizer, but cannot be read .*; run") as caught:
        load_tokenizer(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.timeout(20)
def test_a_pipe_for_a_tokenizer_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(StoreError, match="is a named pipe"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_entries_or_with_ids_beyond_all_reason_is_refused(tmp_path):
    for vocabulary in ("{}", '{"a": 4294967295}'):
        model = f'{{"model": {{"type": "BPE", "vocab": {vocabulary}, "merges": []}}}}'
        (tmp_path / "tokenizer.json").write_text(model)
        with pytest.raises(DataError, match="its ids must be from 0 to 1000000"):
            load_tokenizer(tmp_path)


def seconds_to_learn(letters):
    generator = random.Random(0)
    word = "".join(generator.choice("ACGT") for _ in range(letters))
    started = time.process_time()
    train_tokenizer([word, *TEXTS], 400)
    return time.process_time() - started


@pytest.mark.parametrize(
    ("prefix", "first", "second"), [(" ", "a", "\u0120"), ("\u0120", "a", "\u0120b"), ("##", "a", "b")]
)
def test_merges_that_lack_their_prefix_are_refused_before_the_library_ends_the_process(tmp_path, prefix, first, second):
    model = {"type": "BPE", "continuing_subword_prefix": prefix, "merges": [[first, second]]}
    model["vocab"] = {text: index for index, text in enumerate((first, second, first + second))}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(DataError, match="its merges must go on with the prefix"):
        load_tokenizer(tmp_path)
    model |= {"continuing_subword_prefix": "##", "merges": ["a ##b"], "vocab": {"a": 0, "##b": 1, "ab": 2}}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    assert load_tokenizer(tmp_path).encode("ab").ids == [2]


def test_learning_from_one_long_word_takes_time_by_its_length():
    seconds_to_learn(10_000)
    assert seconds_to_learn(200_000) < 2  # 11 s when the word was one piece, and four times that at twice the length


@pytest.mark.parametrize("text", ["a" * 1024, "é" * 500, "the cat " * 500, "x" * 1000 + " " * 1000])
def test_words_of_up_to_a_kilobyte_are_learned_whole(text, monkeypatch):
    cut = train_tokenizer([text, *TEXTS], 300).to_str()
    monkeypatch.setattr(tokenizer, "LONGEST_WORD", 1 << 15)
    assert train_tokenizer([text, *TEXTS], 300).to_str() == cut


def test_a_long_silent_call_is_told_while_it_runs(caplog, monkeypatch):
    monkeypatch.setattr(background, "SILENCE_SECONDS", 0.01)
    said = threading.Event()
    monkeypatch.setattr(logger, "info", lambda *_: said.set())
    before = threading.active_count()
    with background.still_at_it("learning"):
        assert said.wait(10)
    assert threading.active_count() == before


@pytest.mark.parametrize("template", ["<bos> $A", "<bos> $A <eos>", "$A"])
def test_a_long_text_has_the_same_ids_in_pieces(monkeypatch, template):
    """Of text with blanks; where there are none it still decodes to itself."""
    whole = train_tokenizer(TEXTS, 300)
    special = [(token, whole.token_to_id(token)) for token in ("<bos>", "<eos>")]
    whole.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    texts = [
        ("the cat sat, déjà vu (1984) à la carte!\n\n  on\nthe mat <eos> " * 40)[:-start] for start in range(1, 30)
    ]
    expected = [encoding.ids for encoding in whole.encode_batch(texts)]
    monkeypatch.setattr(tokenizer, "LONGEST_TEXT", 70)
    found = tokenizer.encode_documents(whole, ["the cat", *texts, "日本語" * 99])
    ids = [list(item if isinstance(item, np.ndarray) else item.ids) for item in found]
    assert ids[:-1] == [whole.encode("the cat").ids, *expected]
    assert whole.decode(ids[-1]) == "日本語" * 99
