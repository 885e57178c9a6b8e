"""A real model from a package of the registry: converted, it must say what it is known to say."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from benchmarks.real_model import smollm2
from benchmarks.real_model.chat import is_right, read_questions
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
def test_transformers_reads_the_file_as_we_do(folder: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """From the GGUF file itself, beside the folder that was made of it."""
    name = Path(smollm2.INSIDE).name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder.parent, gguf_file=name, dtype=torch.float32)
    by_transformers = transformers.AutoTokenizer.from_pretrained(folder.parent, gguf_file=name)
    text = "In 1984, x1 += 37; the cafe\u0301 <|im_end|> closed.\n\n\tdef f():"
    ids = torch.tensor([tokenizer.encode(text).ids])
    assert by_transformers(text)["input_ids"] == ids[0].tolist()
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_transformers_reads_the_folder_as_we_do(folder: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = prompt_of(folder, "What is the capital of France?")
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"]])
    assert ids[0].tolist() == tokenizer.encode(prompt).ids
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=0)
