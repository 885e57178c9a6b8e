"""A GGUF file as a pretrained model: the values that its blocks stand for, its tokenizer, its settings."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer

from checkpoints import Artifact, paths
from modularforge.config_files import load_config
from modularforge.errors import ConfigError, DataError, UserError
from modularforge.model.folder import load_model
from modularforge.pretrained.fetch import fetch, local_model, model_identity, tokenizer_identity
from modularforge.pretrained.gguf_tokenizer import build_tokenizer, merges_of
from modularforge.pretrained.shape import read_pretrained_config
from modularforge.pretrained.sources import published_name
from modularforge.run import Run
from tests.conftest import tiny_values
from tests.pretrained import gguf_files, models

IDS = torch.arange(40).view(2, 20) * 7 % models.VOCABULARY
TEXTS = ["The capital of France is", " x1 = 345;\n\treturn  'naïve' \u4f60\u597d", "<|end|> typed", ""]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODULARFORGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.source(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def mixed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with blocks of many kinds."""
    return gguf_files.write(tmp_path_factory.mktemp("mixed") / "mixed.gguf", source, gguf_files.MIXED)


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found = model(IDS)
    logits: torch.Tensor = getattr(found, "logits", found)
    return logits


def theirs(folder: Path, **options: Any) -> torch.Tensor:
    return logits_of(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval())


@pytest.mark.parametrize("tied", [False, True])
def test_plain_values_make_the_model_that_the_file_was_made_of(tied: bool, tmp_path: Path) -> None:
    folder = gguf_files.source(tmp_path / "llama", tie_word_embeddings=tied)
    path = gguf_files.write(tmp_path / "plain.gguf", folder)
    ours = load_model(local_model(str(path)))
    torch.testing.assert_close(logits_of(ours), theirs(folder), atol=1e-5, rtol=0)
    values = read_pretrained_config(str(path))
    assert (values["tie_word_embeddings"], values["rms_norm_eps"], values["rope_theta"]) == (tied, 1e-6, 5000.0)


def test_blocks_of_many_kinds_give_the_logits_that_transformers_gives_with_the_file(mixed: Path, source: Path) -> None:
    ours = logits_of(load_model(local_model(str(mixed))))
    torch.testing.assert_close(ours, theirs(mixed.parent, gguf_file=mixed.name), atol=1e-5, rtol=0)
    assert not torch.allclose(ours, theirs(source), atol=1e-3), "they are rounded, and rotary pairs matter"


def test_the_tokenizer_and_its_template_are_those_of_the_model(mixed: Path, source: Path) -> None:
    folder = local_model(str(mixed))
    ours, original = (Tokenizer.from_file(str(place / "tokenizer.json")) for place in (folder, source))
    by_transformers = transformers.AutoTokenizer.from_pretrained(mixed.parent, gguf_file=mixed.name)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text).ids == original.encode(text).ids == loaded(text)["input_ids"]
        assert (
            by_transformers(text, add_special_tokens=False)["input_ids"]
            == ours.encode(text, add_special_tokens=False).ids
        )
        assert ours.decode(ours.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text
    messages = [{"role": "user", "content": "Two and two?"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == "user: Two and two?\n"
    assert (loaded.bos_token, loaded.eos_token) == ("<|begin|>", "<|end|>")


def test_a_run_takes_the_file_as_its_backbone_and_knows_it_by_its_bytes(mixed: Path, tmp_path: Path) -> None:
    values = tiny_values(tmp_path / "run", backbone={"steps": 0})
    values["model"] = {"pretrained": str(mixed), "context_length": 16}
    values["data"].pop("vocab_size", None)
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    run = Run(load_config(str(tmp_path / "config.yaml")))
    assert (run.config.model.width, run.config.data.vocab_size) == (64, models.VOCABULARY)
    for stage in ("prepare-data", "partition", "backbone"):
        run.make(stage)
    found = logits_of(load_model(run.require("backbone").local_folder()))
    assert torch.equal(found, logits_of(load_model(local_model(str(mixed)))))


def test_the_same_bytes_elsewhere_are_the_same_model_and_others_are_another(
    mixed: Path, source: Path, tmp_path: Path
) -> None:
    before, tokenizer = model_identity(str(mixed)), tokenizer_identity(str(mixed))
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(mixed.read_bytes())
    assert (model_identity(str(copy)), tokenizer_identity(str(copy))) == (before, tokenizer)
    local_model(str(copy))
    gguf_files.write(copy, source)
    assert model_identity(str(copy)) != before
    torch.testing.assert_close(logits_of(load_model(local_model(str(copy)))), theirs(source), atol=1e-5, rtol=0)
    assert published_name(str(mixed)) is None


def test_a_file_on_an_object_store_is_brought_here_once(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    store.pipe_file("/models/small.gguf", mixed.read_bytes())
    url = "memory://models/small.gguf"
    assert read_pretrained_config(url)["hidden_size"] == 64
    assert model_identity(url) == model_identity(str(mixed))
    store.rm_file("/models/small.gguf")
    assert torch.equal(logits_of(load_model(local_model(url))), logits_of(load_model(local_model(str(mixed)))))


def test_a_folder_is_made_of_it_where_one_is_wanted(mixed: Path, tmp_path: Path) -> None:
    artifact = fetch(str(mixed), str(tmp_path / "folder"), verify=True)
    assert isinstance(artifact, Artifact)
    assert not paths.list_folder(str(tmp_path / "cache" / "models"))
    assert fetch(str(mixed), str(tmp_path / "folder")).manifest == artifact.manifest
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").config.hidden_size == 64


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architecture": "gemma2"}, "must be of the architecture llama, but is of 'gemma2'; choose a Llama, or name"),
    ({"extra": {"llama.expert_count": 4}}, "must be a dense model, but is a mixture of experts"),
    ({"extra": {"llama.rope.dimension_count": 8}}, r"must turn whole heads \(16\) for their positions, but turns 8"),
    ({"extra": {"llama.rope.scaling.type": "longrope"}}, "must stretch positions by none, linear or yarn, but does by"),
    ({"extra": {"llama.context_length": None}}, r"must have the key llama\.context_length, but has not"),
    ({"extra": {"tokenizer.ggml.model": "bert"}}, "must have a tokenizer of the model gpt2 or llama, but has 'bert'"),
    ({"extra": {"tokenizer.ggml.pre": "tekken"}}, r"must cut text into words as one of .*but does as 'tekken'"),
    ({"extra": {"tokenizer.ggml.merges": ["no such"]}}, "must have a tokenizer that fits together, but has none"),
    ({"extra": {"tokenizer.ggml.padding_token_id": 99999}}, "must have a tokenizer that fits together, but has none"),
    ({"extra": {"tokenizer.ggml.eos_token_id": "</s>"}}, "must have one number for each size and id of a model, but"),
    ({"extra": {"llama.attention.head_count": [4, 4]}}, "must have one number for each size and id of a model, but"),
    ({"extra": {"llama.attention.head_count": 0}}, "must have one number for each size and id of a model, but has not"),
    ({"extra": {"llama.attention.head_count_kv": 0}}, "must have a positive number as num_key_value_heads, but has 0"),
    ({"tensors": {"rope_freqs.weight": np.ones(8, np.float32)}}, "but has rope_freqs.weight .positions that a table"),
    ({"tensors": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, r"Llama alone, but has blk\.0\.attn_q\.bias"),
    ({"tensors": {"blk.7.attn_norm.weight": np.ones(64, np.float32)}}, r"model\.layers\.7\.input_layernorm\.wei.* in "),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_would_be_computed_in_another_way_is_refused(
    changes: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    path = gguf_files.write(tmp_path / "odd.gguf", source, **changes)
    with pytest.raises(DataError, match=message) as told:
        local_model(str(path))
    assert "odd.gguf" in str(told.value)
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_a_type_that_is_not_decoded_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf import quants

    path = gguf_files.write(tmp_path / "q4.gguf", source, {"attn_q": Type.Q4_0})
    monkeypatch.delitem(quants._type_traits, Type.Q4_0)
    with pytest.raises(
        DataError, match=r"q4\.gguf must have values of a type .*but blk\.0\.attn_q\.weight is of Q4_0; choose"
    ):
        local_model(str(path))


def test_damaged_files_are_told_in_a_sentence(mixed: Path, tmp_path: Path) -> None:
    content = mixed.read_bytes()
    path = tmp_path / "damaged.gguf"
    for broken in (b"", b"GGUF", b"GGML" + content[4:], content[:60], content[: len(content) // 2], content[:-40]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"damaged\.gguf must be a whole GGUF file, but cannot be read"):
            local_model(str(path))
    with pytest.raises(DataError, match=r"missing\.gguf must be a GGUF file, but there is none; fix the path"):
        local_model(str(tmp_path / "missing.gguf"))
    with pytest.raises(UserError, match=r"missing\.gguf must be a GGUF file"):
        read_pretrained_config(str(tmp_path / "missing.gguf"))


def test_without_the_package_the_extra_is_named(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"without the package gguf, but it is not installed; run `pip install 'mod"):
        local_model(str(mixed))


def test_pieces_are_merged_by_their_scores() -> None:
    """SentencePiece takes the piece with the best score first, whichever pieces it is made of."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "b",
        "ab",
        "\u2581a",
        "ba",
        "aba",
    ]
    scores = [0.0] * 259 + [-6.0, -7.0, -8.0, -2.0, -1.0, -3.0, -4.0]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 7]
    keys = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    metadata = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    tokenizer = build_tokenizer(metadata, "m")
    assert tokenizer.encode("ab").tokens == ["<s>", "\u2581a", "b"], "not \u2581 and ab, whose score is less"
    assert tokenizer.encode("b ab", add_special_tokens=False).tokens == ["\u2581", "b", "\u2581a", "b"]
    assert tokenizer.encode("é", add_special_tokens=False).tokens == ["\u2581", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode(" b é").ids) == " b é"
    assert merges_of({"a": 0, "b": 1, "ab": 2, "aba": 3}, [0, 0, -1, -2]) == [("a", "b"), ("ab", "a")]
    metadata["tokenizer.ggml.add_bos_token"] = False
    assert build_tokenizer(metadata, "m").encode("a").tokens == ["\u2581a"]


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("smollm", ["a", "1", "2", "3", "4", "Ġb"]),
        ("gpt-2", ["a", "1234", "Ġb"]),
        ("llama-bpe", ["a", "123", "4", "Ġb"]),
        ("qwen2", ["a", "1", "2", "3", "4", "Ġb"]),
    ],
)
def test_texts_are_cut_into_words_as_the_file_says(pre: str, words: list[str]) -> None:
    tokens = ["a", "b", "1", "2", "3", "4", "Ġ", "12", "34", "123", "1234", "Ġb"]
    merges = ["1 2", "3 4", "12 3", "12 34", "Ġ b"]
    keys = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": [1] * 12, "merges": merges}
    metadata = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    assert build_tokenizer(metadata, "m").encode("a1234 b").tokens == words
