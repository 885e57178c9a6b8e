"""Token files: what is written is read back, and a damaged file is refused."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modularforge.data.token_files import TokenFileWriter, open_token_file
from modularforge.errors import DataError


def write(folder, documents, vocab_size=300, labels=None):
    with TokenFileWriter(folder, "train", vocab_size) as writer:
        for index, document in enumerate(documents):
            label = [labels[index] if labels else 0]
            writer.add(np.array(document, np.int64), np.array([len(document)]), np.array(label))
    return open_token_file(folder, "train")


@settings(deadline=None)
@given(st.sampled_from([300, 65536, 65537, 1_000_000]), st.data())
def test_documents_come_back(vocab_size, data):
    documents = data.draw(st.lists(st.lists(st.integers(0, vocab_size - 1), min_size=1)))
    labels = data.draw(st.lists(st.integers(0, 65535), min_size=len(documents), max_size=len(documents)))
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder), documents, vocab_size, labels)
        assert [file.document(i).tolist() for i in range(file.num_documents)] == documents
        assert file.labels.tolist() == labels
        assert file.lengths.tolist() == [len(document) for document in documents]
        assert file.tokens.dtype.itemsize == (2 if vocab_size <= 65536 or not documents else 4)


def test_many_documents_can_be_added_at_once(tmp_path):
    with TokenFileWriter(tmp_path, "train", 300) as writer:
        writer.add(np.arange(5), np.array([2, 3]), np.array([1, 0]))
        writer.add(np.arange(5, 6), np.array([1]), np.array([2]))
    file = open_token_file(tmp_path, "train")
    assert [file.document(i).tolist() for i in range(3)] == [[0, 1], [2, 3, 4], [5]]
    assert isinstance(file.tokens, np.memmap)


@pytest.mark.parametrize("size", [0, 5, 7])
def test_a_truncated_file_is_refused(tmp_path, size):
    write(tmp_path, [[1, 2], [3, 4]])
    path = tmp_path / "train.tokens.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=rf"train.tokens.bin must hold the 4 tokens .* but has {size} bytes"):
        open_token_file(tmp_path, "train")


def test_labels_of_another_file_are_refused(tmp_path):
    write(tmp_path, [[1, 2], [3, 4]])
    np.save(tmp_path / "train.labels.npy", np.zeros(3, np.uint16))
    with pytest.raises(DataError, match="4 tokens and 3 documents"):
        open_token_file(tmp_path, "train")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"train.offsets.npy must be part of a token file"):
        open_token_file(tmp_path, "train")


def test_a_failed_writer_leaves_no_readable_file(tmp_path):
    with pytest.raises(RuntimeError), TokenFileWriter(tmp_path, "train", 300) as writer:  # noqa: PT012
        writer.add(np.arange(3), np.array([3]), np.array([0]))
        raise RuntimeError
    with pytest.raises(DataError):
        open_token_file(tmp_path, "train")
