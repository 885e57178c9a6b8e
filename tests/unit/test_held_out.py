"""Near duplicates of held-out documents are no training documents where the split is made here, and are counted."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from modularforge.config import Config
from modularforge.data import held_out, prepare
from modularforge.data.prepare import prepare_corpus
from modularforge.data.token_files import TokenFile, TokenFileWriter, open_token_file, write_documents
from modularforge.data.tokenizer import load_tokenizer, token_byte_lengths
from modularforge.errors import DataError

WORDS = [
    f"{a}{b}{c}" for a in ("sea", "law", "wind", "stone") for b in ("ka", "lo", "mi") for c in ("ren", "tus", "de")
]


def document(seed, words=60):
    return np.random.default_rng(seed).choice(WORDS, words).tolist()


def changed(words, count, seed):
    """The words with this many of them others."""
    generator, words = np.random.default_rng(seed), list(words)
    for place in generator.choice(len(words), count, replace=False):
        words[place] = "other" + str(generator.integers(10))
    return words


def texts_with_copies():
    """240 documents; of each of the first 80 a copy with one word changed, and one with 20."""
    originals = [document(seed) for seed in range(240)]
    copies = [changed(words, count, 7) for words in originals[:80] for count in (1, 20)]
    return [" ".join(words) for words in [*originals, *copies]]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def prepared(tmp_path, name="output", fraction=0.1, **source):
    data = {"sources": [{"name": "web", **source}], "vocab_size": 400, "heldout_fraction": fraction}
    data["min_article_length"] = 1
    config = Config.model_validate({"data": data, "experts": {"count": 2}, "model": {"context_length": 16}})
    (tmp_path / name).mkdir()
    return prepare_corpus(config, tmp_path / "scratch", tmp_path / name), tmp_path / name


def documents_of(folder, split):
    file = open_token_file(folder, split)
    return [tuple(file.document(index).tolist()) for index in range(file.num_documents)]


def likeness(one, other, length):
    """Naive Jaccard of runs of tokens."""
    first, second = ({tokens[k : k + length] for k in range(len(tokens) - length + 1)} for tokens in (one, other))
    return len(first & second) / len(first | second)


def alike(folder, length):
    held = [document for split in ("validation", "test") for document in documents_of(folder, split)]
    return [
        tokens
        for tokens in documents_of(folder, "train")
        if any(likeness(tokens, other, length) >= held_out.ALIKE for other in held)
    ]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def unchecked(monkeypatch, tmp_path):
    """The corpus as it is without the check."""
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "leave_out_copies", lambda *_: {})
        return prepared(tmp_path, "unchecked", train=write(tmp_path / "web.jsonl", texts_with_copies()))


@pytest.mark.parametrize("limits", [{}, {"MOST_RUNS": 1000, "MOST_TOKENS": 500}], ids=["at once", "sampled, in blocks"])
def test_a_split_that_is_made_here_shares_no_near_duplicate(tmp_path, unchecked, monkeypatch, caplog, limits):
    for name, value in limits.items():
        monkeypatch.setattr(held_out, name, value)
    _, before = unchecked
    metadata, folder = prepared(tmp_path, train=str(tmp_path / "web.jsonl"))
    length = held_out._run_tokens(json.loads((before / "metadata.json").read_text())["splits"])
    copies = alike(before, length)
    assert 5 < len(copies) < 40
    assert documents_of(folder, "train") == [found for found in documents_of(before, "train") if found not in copies]
    assert metadata["near_copies"] == {"dropped": len(copies), "left": 0}
    assert f"{len(copies)} of {len(documents_of(before, 'train'))} training documents are near" in caplog.text
    names = {name for name in files_of(folder) if not name.startswith(("train", "metadata"))}
    assert {name: files_of(before)[name] for name in names} == {name: files_of(folder)[name] for name in names}
    assert set(files_of(folder)) == set(files_of(before))


def test_counts_are_of_what_is_left(tmp_path):
    metadata, folder = prepared(tmp_path, train=write(tmp_path / "web.jsonl", texts_with_copies()))
    assert metadata["near_copies"]["dropped"] > 0
    file, lengths_V = open_token_file(folder, "train"), token_byte_lengths(load_tokenizer(folder))
    expected = {
        "documents": file.num_documents,
        "tokens": len(file.tokens),
        "bytes": int(lengths_V[file.tokens].sum()),
    }
    assert json.loads((folder / "metadata.json").read_text())["splits"]["train"] == {"web": expected}


def test_files_that_settings_name_are_warned_of_and_stay(tmp_path, monkeypatch, caplog):
    """Whoever names files to measure on has the corpus that was asked for, with the same bytes as ever."""
    texts = texts_with_copies()
    files = {
        "train": write(tmp_path / "train.jsonl", texts[:240]),
        "validation": write(tmp_path / "valid.jsonl", texts[240:244]),
        "test": write(tmp_path / "test.jsonl", texts[250:252]),
    }
    with caplog.at_level(logging.WARNING):
        metadata, folder = prepared(tmp_path, **files)
    assert metadata["near_copies"] == {"dropped": 0, "left": 3}
    assert "3 of 240 training documents are near duplicates of one in the validation or test files" in caplog.text
    monkeypatch.setattr(prepare, "leave_out_copies", lambda *_: {})
    assert files_of(folder) == files_of(prepared(tmp_path, "unchecked", **files)[1])


def test_other_words_are_no_copies(tmp_path, monkeypatch):
    path = write(tmp_path / "web.jsonl", [" ".join(document(seed)) for seed in range(200)])
    metadata, folder = prepared(tmp_path, train=path)
    assert metadata["near_copies"] == {"dropped": 0, "left": 0}
    monkeypatch.setattr(prepare, "leave_out_copies", lambda *_: {})
    assert files_of(folder) == files_of(prepared(tmp_path, "unchecked", train=path)[1])


def test_documents_without_a_run_are_no_copies(tmp_path):
    path = write(tmp_path / "web.jsonl", list("abcdefghijklmnopqrstuvwxyz") * 8)
    assert prepared(tmp_path, train=path)[0]["near_copies"] == {"dropped": 0, "left": 0}


def test_a_corpus_of_copies_alone_is_refused(tmp_path):
    texts = [" ".join(changed(document(1, 400), 1, seed)) for seed in range(60)]
    with pytest.raises(DataError, match=r"must differ from those held out .* name validation and test files"):
        prepared(tmp_path, train=write(tmp_path / "web.jsonl", texts))


def examples_with_copies():
    """120 examples of prompt and response; of each one whose prompt and response have another word, and one whose
    prompt has another word, with a response of words that are nowhere else. By text: which of the 120 it is like."""
    found: dict[tuple[str, str], int | None] = {}
    for seed in range(120):
        prompt, response = document(seed, 200), document(1000 + seed, 20)
        other = [word.upper() for word in document(2000 + seed, 20)]
        found[" ".join(prompt), " ".join(response)] = seed
        found[" ".join(changed(prompt, 1, seed)), " ".join(changed(response, 1, seed))] = seed
        found[" ".join(changed(prompt, 1, 500 + seed)), " ".join(other)] = None
    return found


def prepared_examples(tmp_path, name, examples):
    path = tmp_path / f"{name}.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in examples)
    )
    data = {"sources": [{"name": "web", "train": str(path)}], "vocab_size": 400, "heldout_fraction": 0.1}
    values = {"task": "instruction", "data": data, "experts": {"count": 2}, "model": {"context_length": 16}}
    (tmp_path / name).mkdir()
    return prepare_corpus(Config.model_validate(values), tmp_path / "scratch", tmp_path / name), tmp_path / name


def texts_of(folder, split):
    tokenizer = load_tokenizer(folder)
    return [tokenizer.decode(list(ids)) for ids in documents_of(folder, split)]


def test_examples_like_held_out_ones_in_prompt_and_response_are_left_out(tmp_path, monkeypatch, caplog):
    examples = examples_with_copies()
    groups = {prompt + response: group for (prompt, response), group in examples.items()}
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "leave_out_copies", lambda *_: {})
        before = prepared_examples(tmp_path, "unchecked", examples)[1]
    metadata, folder = prepared_examples(tmp_path, "output", examples)
    held = {groups[text] for split in ("validation", "test") for text in texts_of(before, split)} - {None}
    texts = texts_of(before, "train")
    copies = [text for text in texts if groups[text] in held]
    assert len(copies) > 5
    assert sum(groups[text] is None for text in texts) > 60
    assert texts_of(folder, "train") == [text for text in texts if text not in copies]
    assert metadata["near_copies"] == {"dropped": len(copies), "left": 0}
    assert f"{len(copies)} of {len(texts)} training documents are near duplicates" in caplog.text
    file = open_token_file(folder, "train")
    assert file.learned is not None
    assert metadata["splits"]["train"]["web"]["documents"] == file.num_documents
    for index, text in enumerate(texts_of(folder, "train")):
        response = next(response for prompt, response in examples if prompt + response == text)
        learned = file.document(index)[file.learned_of(index) == 1]
        assert load_tokenizer(folder).decode(learned.tolist()) == response, "what is learned moved with its example"
    for split in ("validation", "test"):
        assert texts_of(folder, split) == texts_of(before, split)


def test_responses_of_the_same_tokens_in_another_order_are_others() -> None:
    ids = np.array([7, 1, 2, 3, 1, 2, 9, 7, 2, 1, 3, 1, 2, 9, 7, 1, 2, 3, 1, 2, 9], np.uint16)
    offsets, learned = np.array([0, 7, 14, 21]), np.tile(np.array([0, 1, 1, 1, 1, 1, 1], np.uint8), 3)
    file = TokenFile("train", ids, offsets, np.zeros(3, np.uint16), learned)
    assert set(ids[1:7]) == set(ids[8:14])
    assert not held_out._responses_alike(file, 0, file, 1)
    assert held_out._responses_alike(file, 0, file, 2)


def test_examples_without_copies_keep_their_bytes(tmp_path, monkeypatch):
    """Prompts that are alike, each with a response of its own, are what tasks have."""
    examples = [pair for pair, group in examples_with_copies().items() if group is None]
    examples += [(" ".join(document(seed, 200)), " ".join(document(3000 + seed, 20))) for seed in range(120)]
    metadata, folder = prepared_examples(tmp_path, "output", examples)
    assert metadata["near_copies"] == {"dropped": 0, "left": 0}
    monkeypatch.setattr(prepare, "leave_out_copies", lambda *_: {})
    unchecked = prepared_examples(tmp_path, "unchecked", examples)[1]
    monkeypatch.undo()
    names = set(files_of(folder)) - {"metadata.json"}  # which names the files that were read
    assert set(files_of(unchecked)) - {"metadata.json"} == names
    assert {name: files_of(folder)[name] for name in names} == {name: files_of(unchecked)[name] for name in names}
    rows = [json.loads((place / "metadata.json").read_text())["splits"] for place in (folder, unchecked)]
    assert rows[0] == rows[1]


def mapped_kib(path):
    """What of a mapped file counts as memory of this process."""
    blocks = Path("/proc/self/smaps").read_text().split("VmFlags")
    return sum(int(block.partition("\nRss:")[2].split()[0]) for block in blocks if f"{path}\n" in block)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says there what is mapped")
def test_token_files_that_were_gone_through_are_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "MOST_TOKENS", 1 << 16)
    ids = np.random.default_rng(0).integers(0, 500, 1 << 22).astype(np.uint16)
    lengths = np.full(1 << 12, 1 << 10)
    for name, documents in (("train", 1 << 12), ("test", 4)):
        with TokenFileWriter(tmp_path, name, 500) as writer:
            writer.add(ids[: documents << 10], lengths[:documents], np.zeros(documents, np.int64))
    train, test = (open_token_file(tmp_path, name) for name in ("train", "test"))
    path = tmp_path / "train.tokens.bin"
    int(train.tokens.sum())
    assert mapped_kib(path) > 8000
    assert [copy for copy, _, _ in held_out.near_copies(train, [test], 5)] == [0, 1, 2, 3]
    assert mapped_kib(path) < 1000
    int(train.tokens.sum())
    write_documents(train, np.arange(0, 1 << 12, 2), tmp_path, "half", 500)
    assert mapped_kib(path) < 1000
