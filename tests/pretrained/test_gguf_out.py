"""A model folder as a GGUF file: what our reader, transformers and llama.cpp make of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from typer.testing import CliRunner

from modularforge.cli import app
from modularforge.config import Config
from modularforge.errors import DataError
from modularforge.model.adapter_config import ADAPTERS_NAME
from modularforge.model.folder import load_model, read_tensors
from modularforge.model.hub_config import TABLES_NAME, model_config_of, read_config
from modularforge.pretrained.fetch import local_model
from modularforge.pretrained.gguf_out import write_gguf
from modularforge.pretrained.gguf_tokenizer import PROBES, build_tokenizer, tokenizer_keys
from tests.pretrained import gguf_files, models
from tests.pretrained.test_gguf import logits_of, theirs

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODULARFORGE_CACHE", str(tmp_path / "cache"))


def written(folder: Path, target: Path, kind: str | None = None) -> Path:
    target.parent.mkdir(exist_ok=True)
    write_gguf(folder, target, kind)
    return target


def contents(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    reader = GGUFReader(path)
    tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


LLAMAS: list[dict[str, Any]] = [
    gguf_files.PLAIN,
    {**gguf_files.PLAIN, "tie_word_embeddings": True, "head_dim": 12},
    {"rope_parameters": models.LINEAR, "vocab_size": models.VOCABULARY + 7},
    {"rope_parameters": models.YARN},
]


@pytest.mark.parametrize("changes", LLAMAS, ids=["plain", "tied", "linear", "yarn"])
def test_our_reader_gets_back_the_model_and_its_tokenizer(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = models.llama(tmp_path / "llama", **changes)
    again = local_model(str(written(folder, tmp_path / "model.gguf")))
    before, after = load_model(folder).state_dict(), load_model(again).state_dict()
    assert {name: bool(torch.equal(weight, after[name])) for name, weight in before.items()} == dict.fromkeys(
        before, True
    )
    old, new = (model_config_of(read_config(place)) for place in (folder, again))
    assert old == new
    ours, original = (Tokenizer.from_file(str(place / "tokenizer.json")) for place in (again, folder))
    assert [ours.encode(text).ids for text in PROBES] == [original.encode(text).ids for text in PROBES]
    assert (again / "tokenizer_config.json").read_text().count("message['content']") == 1


@pytest.mark.parametrize(("kind", "distance"), [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 5e-2)])
def test_transformers_reads_every_type_as_we_do(kind: str, distance: float, tmp_path: Path) -> None:
    folder = gguf_files.source(tmp_path / "llama")
    path = written(folder, tmp_path / "out" / "model.gguf", kind)
    found = theirs(path.parent, gguf_file=path.name)
    torch.testing.assert_close(found, logits_of(load_model(local_model(str(path)))), atol=1e-5, rtol=0)
    assert 0 < (found - theirs(folder)).abs().max() < distance * theirs(folder).abs().max()
    assert (kind == "Q8_0") == (path.stat().st_size < (folder / "model.safetensors").stat().st_size * 0.45)


def test_what_is_stored_in_bf16_stays_so_and_gains_are_float32(tmp_path: Path) -> None:
    folder = models.llama(tmp_path / "llama", torch.bfloat16)
    types = {
        tensor.name: tensor.tensor_type.name for tensor in GGUFReader(written(folder, tmp_path / "m.gguf")).tensors
    }
    assert (types["blk.0.attn_q.weight"], types["blk.0.attn_norm.weight"]) == ("BF16", "F32")


def test_transformers_reads_a_qwen3_and_a_mixture_on_one(tmp_path: Path) -> None:
    """Of widths that it takes for granted: it reads neither a head's width of a Qwen3 nor an expert's."""
    dense = models.qwen3(tmp_path / "qwen3", head_dim=128)
    config = transformers.Qwen3MoeConfig(
        **{**models.SHAPE, "moe_intermediate_size": 768}, vocab_size=models.VOCABULARY, head_dim=128, num_experts=5,
        num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], rope_theta=5000.0,
    )  # fmt: skip
    torch.manual_seed(1)
    mixture = models.save_model(transformers.Qwen3MoeForCausalLM(config), tmp_path / "moe", torch.float32, "1GB")
    for file in dense.glob("tokenizer*"):
        shutil.copy(file, mixture)
    for folder in (dense, mixture):
        path = written(folder, tmp_path / f"{folder.name}-out" / "model.gguf")
        torch.testing.assert_close(theirs(path.parent, gguf_file=path.name), theirs(folder), atol=1e-5, rtol=0)


def test_positions_of_llama_3_are_a_tensor(tmp_path: Path) -> None:
    folder = models.llama(tmp_path / "llama", rope_parameters=models.LLAMA3)
    keys, tensors = contents(written(folder, tmp_path / "m.gguf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    plain = 1.0 / 5000.0 ** (np.arange(0, 8, 2, dtype=np.float32) / 8)
    np.testing.assert_allclose(plain / tensors["rope_freqs.weight"], model.inv_freq.numpy(), rtol=1e-6)
    assert "llama.rope.scaling.type" not in keys


def test_an_assembled_mixture_is_whole_and_says_how_it_routes(finished_run: Config, tmp_path: Path) -> None:
    """Experts stand in the order of slots, routers are as they are, and rows of heads are paired."""
    path, folder = tmp_path / "mixture.gguf", Path(finished_run.output_dir) / "assembled"
    done = CliRunner().invoke(
        app, ["export", str(path), "--output-dir", finished_run.output_dir, "--model", str(folder)]
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"written: {path}, ")
    keys, tensors = contents(path)
    values, source = (
        read_config(folder),
        {name: weight.float().numpy() for name, weight in read_tensors(folder).items()},
    )
    assert (keys["general.architecture"], keys["llama.expert_count"]) == ("llama", values["num_local_experts"])
    assert keys["llama.expert_used_count"] == values["num_experts_per_tok"]
    for layer in range(values["num_hidden_layers"]):
        block = f"model.layers.{layer}.block_sparse_moe"
        np.testing.assert_array_equal(tensors[f"blk.{layer}.ffn_gate_inp.weight"], source[f"{block}.gate.weight"])
        for theirs_, ours in (("ffn_gate_exps", "w1"), ("ffn_down_exps", "w2"), ("ffn_up_exps", "w3")):
            for slot, expert in enumerate(tensors[f"blk.{layer}.{theirs_}.weight"]):
                np.testing.assert_array_equal(expert, source[f"{block}.experts.{slot}.{ours}.weight"])
    assert len(tensors) == len(source) - (values["num_local_experts"] - 1) * 3 * values["num_hidden_layers"]
    again = CliRunner().invoke(app, ["export", str(path), "--model", str(folder)])
    assert isinstance(again.exception, DataError)
    assert "must be a new file in a folder that is there" in str(again.exception)


def test_tables_are_said_to_stay_behind(finished_run: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(Path(finished_run.output_dir) / "assembled", tmp_path / "model")
    (folder / TABLES_NAME).write_bytes(b"")
    write_gguf(folder, tmp_path / "m.gguf")
    assert "routes by the rows in its weights: GGUF has no place for text_router.tables" in caplog.text


def test_what_the_format_cannot_say_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    odd = models.llama(tmp_path / "odd", rope_parameters={**models.YARN, "attention_factor": 1.3})
    adapters = shutil.copytree(gguf_files.source(tmp_path / "plain"), tmp_path / "adapters")
    (adapters / ADAPTERS_NAME).write_text("{}")
    cut = shutil.copytree(tmp_path / "plain", tmp_path / "cut")
    tokenizer = Tokenizer.from_file(str(cut / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save(str(cut / "tokenizer.json"))
    for folder, message in (
        (odd, "must stretch positions by yarn with its usual constants .*but sets attention_factor"),
        (adapters, "must be a model without adapters to be written as GGUF"),
        (cut, "must have a tokenizer that GGUF can say, .*but has another"),
    ):
        with pytest.raises(DataError, match=message):
            write_gguf(folder, tmp_path / "m.gguf")
    for words in (["m.bin"], ["m.gguf", "--type", "Q3_K"], ["s3://bucket/m.gguf"]):
        refused = CliRunner().invoke(app, ["export", *words, "--model", str(tmp_path / "plain")])
        assert "must write a file of this machine that ends in .gguf" in str(refused.exception)
    assert not [path for path in tmp_path.rglob("*") if ".gguf" in path.name]


def test_a_tokenizer_of_sentencepiece_and_the_ways_to_cut_words_are_found(tmp_path: Path) -> None:
    """Each is built of keys by our reader, saved, and must give keys that build it again."""
    specials, letters = ["<unk>", "<s>", "</s>"], ["▁", *"abhetouslf", "th", "the", "▁the"]
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    model = tokenizer_models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    path, tokenizer = tmp_path / "tokenizer.json", Tokenizer(model)
    values = {"vocab_size": len(pieces) + 2, "bos_token_id": 1, "eos_token_id": [2, 1]}
    reader = build_tokenizer({**_keys_of(tokenizer, path, values, pieces)}, "x")
    tokenizer.normalizer, tokenizer.decoder = reader.normalizer, reader.decoder
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(path))
    keys = tokenizer_keys(path, values, "x")
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.eos_token_id"]) == ("llama", 2)
    assert build_tokenizer(keys, "x").encode("the hat").ids == tokenizer.encode("the hat").ids
    folder = gguf_files.source(tmp_path / "llama")
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        found = gguf_files.tokenizer_keys(folder, models.VOCABULARY) | {"tokenizer.ggml.pre": pre}
        build_tokenizer(found, "x").save(str(path))
        assert tokenizer_keys(path, read_config(folder), "x")["tokenizer.ggml.pre"] == pre


def _keys_of(tokenizer: Tokenizer, path: Path, values: dict[str, Any], pieces: list[str]) -> dict[str, Any]:
    scores = [-float(index) for index in range(len(pieces))]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces, "tokenizer.ggml.scores": scores}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "mixture", "qwen3"])
def test_llama_cpp_says_the_same_words(kind: str, finished_run: Config, tmp_path: Path) -> None:
    """Greedily, from the same ids; the mixture routes by its rows, so ours does without tables."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    places = {"dense": "backbone", "mixture": "assembled"}
    source = Path(finished_run.output_dir) / places[kind] if kind in places else models.qwen3(tmp_path / "qwen3")
    folder = shutil.copytree(source, tmp_path / "model")
    (folder / TABLES_NAME).unlink(missing_ok=True)
    llama = llama_cpp.Llama(str(written(folder, tmp_path / "m.gguf")), n_ctx=64, logits_all=True, verbose=False)
    ours, tokenizer = load_model(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "The capital of France isn't  Paris; x1 = 34567"
    ids = tokenizer.encode(text).ids
    assert llama.tokenize(text.encode(), add_bos=True, special=False) == ids
    for _ in range(8):
        llama.reset()
        llama.eval(ids)
        with torch.inference_mode():
            expected = ours(torch.tensor([ids]))[0].numpy()
        np.testing.assert_allclose(np.array(llama.scores[: len(ids)]), expected, atol=2e-2 * np.abs(expected).max())
        best = int(expected[-1].argmax())
        assert int(np.argmax(llama.scores[len(ids) - 1])) == best
        ids.append(best)
