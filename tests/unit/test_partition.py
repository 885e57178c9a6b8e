"""Partitions: every document in at least one, none empty, the same for the same seed."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import HashingVectorizer

from modularforge.config import PartitionConfig
from modularforge.data.partition import (
    WORD,
    _analyzer,
    _has_words,
    add_everywhere,
    add_overlap,
    cluster_documents,
    curriculum_partitions,
    document_chunks,
    document_difficulty,
    domain_partitions,
    random_partitions,
    split_by_tokens,
)
from modularforge.data.token_files import TokenFile
from modularforge.data.tokenizer import EOS, train_tokenizer
from modularforge.errors import ConfigError, DataError

LENGTHS = st.lists(st.integers(1, 1000), min_size=1, max_size=60).map(np.array)
TOPICS = {
    "sea": "the ship sailed over waves while sailors hauled ropes near harbour islands and storms",
    "law": "the court held that statutes and regulations bind defendants under section chapter clause",
    "code": "static int pointer struct return void malloc sizeof buffer char const header include",
}


def token_file(documents, labels=None):
    lengths = [len(document) for document in documents]
    tokens = np.concatenate([np.array(document, np.uint16) for document in documents])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenFile("train", tokens, offsets, np.array(labels or [0] * len(documents), np.uint16))


def topic_documents(per_topic=30):
    """A tokenizer and documents of three topics, in turn."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(words.split(), 40)) for _ in range(per_topic) for words in TOPICS.values()]
    tokenizer = train_tokenizer(texts, 400)
    return token_file([[*encoding.ids, EOS] for encoding in tokenizer.encode_batch(texts)]), tokenizer


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 8), st.integers(0, 5))
def test_random_partitions_hold_every_document_once_and_none_is_empty(lengths, count, seed):
    if len(lengths) < count:
        with pytest.raises(DataError, match=r"lower experts\.count or add text"):
            random_partitions(lengths, count, seed)
        return
    partitions = random_partitions(lengths, count, seed)
    assert len(partitions) == count
    assert all(len(part) for part in partitions)
    assert sorted(np.concatenate(partitions)) == list(range(len(lengths)))
    again = random_partitions(lengths, count, seed)
    assert all(np.array_equal(a, b) for a, b in zip(partitions, again, strict=True))


def test_random_partitions_have_about_the_same_tokens():
    lengths = np.random.default_rng(1).integers(10, 1000, 5000)
    sizes = [lengths[part].sum() for part in random_partitions(lengths, 7, 0)]
    assert max(sizes) - min(sizes) < 2000


def test_seeds_give_different_partitions():
    parts = [random_partitions(np.ones(100, np.int64), 2, seed)[0].tolist() for seed in (0, 1)]
    assert parts[0] != parts[1]


def test_one_giant_document_leaves_something_for_every_partition():
    for lengths in ([1000, 1, 1, 1], [1, 1, 1, 1000], [1, 1000, 1, 1]):
        parts = split_by_tokens(np.arange(4), np.array(lengths), 4)
        assert [len(part) for part in parts] == [1, 1, 1, 1]


def test_the_curriculum_goes_from_common_to_rare_tokens():
    common, mixed, rare = [5] * 10, [5] * 5 + [6] * 5, [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    documents = token_file([rare, common, mixed, common])
    assert [part.tolist() for part in curriculum_partitions(documents, 20, 4)] == [[1], [3], [2], [0]]


def test_difficulty_is_the_mean_surprisal_of_a_document(monkeypatch):
    documents = token_file([[4, 4, 4, 5], [5, 5, 5, 5], [4]])
    monkeypatch.setattr("modularforge.data.partition.CHUNK_TOKENS", 3)
    four, five = -np.log2(4 / 9), -np.log2(5 / 9)
    assert document_difficulty(documents, 6) == pytest.approx([(3 * four + five) / 4, five, four])


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 500))
def test_chunks_cover_all_documents_in_order(lengths, chunk_tokens):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    chunks = document_chunks(offsets, chunk_tokens)
    assert [index for first, end in chunks for index in range(first, end)] == list(range(len(lengths)))
    assert all(offsets[end] - offsets[first] <= chunk_tokens or end == first + 1 for first, end in chunks)


def test_domains_are_the_labels_in_their_order():
    labels = np.array([2, 0, 2, 1, 0], np.uint16)
    assert [part.tolist() for part in domain_partitions(labels, ["a", "b", "c"], 3)] == [[1, 4], [3], [0, 2]]


def test_another_number_of_domains_than_experts_is_refused():
    with pytest.raises(ConfigError, match=r"number of labels for partition.method domain \(2: law, code\), but is 5"):
        domain_partitions(np.array([0, 2], np.uint16), ["law", "sea", "code"], 5)


def test_text_for_everybody_is_in_every_partition_and_no_experts_own():
    labels, names = np.array([2, 0, 2, 1, 0], np.uint16), ["law", "sea", "general"]
    parts = domain_partitions(labels, names, 2, ["general"])
    assert [part.tolist() for part in parts] == [[1, 4], [3]]
    with_general = add_everywhere(parts, labels, names, ["general"])
    assert [part.tolist() for part in with_general] == [[0, 1, 2, 4], [0, 2, 3]]
    divided = add_everywhere(random_partitions(np.ones(5, np.int64), 2, 0), labels, names, ["general"])
    assert all({0, 2} < set(part.tolist()) for part in divided)
    assert set(np.concatenate(divided).tolist()) == {0, 1, 2, 3, 4}


def test_text_for_everybody_that_there_is_not_or_that_leaves_nothing_else_is_refused():
    labels, names = np.array([0, 1], np.uint16), ["law", "general"]
    with pytest.raises(ConfigError, match=r"must name labels of the data \(law, general\), but names 'sea'"):
        add_everywhere([np.arange(2)], labels, names, ["sea"])
    with pytest.raises(ConfigError, match=r"partition 1 has only general"):
        add_everywhere([np.array([0]), np.array([1])], labels, names, ["general"])


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5])
def test_overlap_adds_that_share_of_foreign_documents(ratio):
    before = random_partitions(np.ones(100, np.int64), 4, 0)
    after = add_overlap(before, ratio, 0)
    for own, both in zip(before, after, strict=True):
        assert len(both) == len(own) + round(ratio * len(own))
        assert len(np.unique(both)) == len(both)
        assert set(own) <= set(both)
    assert all(np.array_equal(a, b) for a, b in zip(after, add_overlap(before, ratio, 0), strict=True))


def test_a_single_partition_has_no_others_to_overlap_with():
    assert add_overlap([np.arange(3)], 0.5, 0)[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("sample", [10_000, 30])
def test_clusters_find_the_topics_whether_fitted_on_all_or_on_a_sample(sample):
    documents, tokenizer = topic_documents()
    settings = PartitionConfig(cluster_sample_documents=sample)
    clusters = cluster_documents(documents, tokenizer, 3, settings, seed=0)
    assert sorted(part.tolist() for part in clusters.partitions) == [list(range(k, 90, 3)) for k in range(3)]
    for part, words in zip(clusters.partitions, clusters.top_words, strict=True):
        assert set(words) <= set(list(TOPICS.values())[part[0] % 3].split())


BLANKLESS = {
    "sea": ["船海", "浪港", "水手", "風暴", "島嶼", "帆桅"],
    "law": ["法院", "判決", "條款", "章節", "被告", "律師"],
    "genes": ["ACGTAC", "GGATCC", "TTGACA"],
}


def test_clusters_find_the_topics_of_text_without_blanks():
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(words, 80)) for _ in range(30) for words in BLANKLESS.values()]
    tokenizer = train_tokenizer(texts, 500)
    documents = token_file([[*encoding.ids, EOS] for encoding in tokenizer.encode_batch(texts)])
    for sample in (10_000, 30):
        clusters = cluster_documents(documents, tokenizer, 3, PartitionConfig(cluster_sample_documents=sample), seed=0)
        assert sorted(part.tolist() for part in clusters.partitions) == [list(range(k, 90, 3)) for k in range(3)]
    assert all(len(word) <= 4 for words in clusters.top_words for word in words)


def test_a_few_documents_without_blanks_leave_the_words_of_the_others_as_they_are():
    ordinary = [" ".join(["the ship sailed over waves"] * 5)] * 97
    assert _has_words([*ordinary, *["x" * 500] * 3])
    assert not _has_words([*ordinary, *["x" * 500] * 30])
    assert _analyzer(True, WORD) == {"token_pattern": WORD}
    analyze = _analyzer(False, WORD)["analyzer"]
    vectorizer = HashingVectorizer(token_pattern=WORD)
    assert analyze(ordinary[0]) == vectorizer.build_analyzer()(ordinary[0])


def test_clusters_are_the_same_for_the_same_seed():
    documents, tokenizer = topic_documents()
    runs = [cluster_documents(documents, tokenizer, 5, PartitionConfig(), seed=1).partitions for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))


def test_identical_documents_still_give_no_empty_cluster():
    documents, tokenizer = topic_documents(1)
    same = token_file([documents.document(0)] * 6)
    with pytest.warns(match="distinct clusters"):
        clusters = cluster_documents(same, tokenizer, 4, PartitionConfig(), seed=0)
    assert all(len(part) for part in clusters.partitions)
    assert sorted(np.concatenate(clusters.partitions)) == list(range(6))


def test_a_missing_sentence_encoder_names_the_command_that_installs_it(monkeypatch):
    documents, tokenizer = topic_documents(2)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'modularforge\[embeddings\]'"):
        cluster_documents(documents, tokenizer, 2, PartitionConfig(cluster_encoder="all-MiniLM-L6-v2"), seed=0)
