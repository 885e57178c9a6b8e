"""Shapes that servers take: what vLLM and SGLang ask of a mixture, held against every shape that the assembler writes.

Neither server runs here (both want a GPU); `modularforge/model/serving.py` has their rules, and
tests/serving_reference.py splits and computes a model folder as they do.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from modularforge.config import ModelConfig
from modularforge.config_files import load_config
from modularforge.info import describe
from modularforge.model.hub_config import moe_config, write_json
from modularforge.model.serving import DEGREES, SERVERS, degrees, describe_serving, refusal
from modularforge.model.sizes import model_sizes
from modularforge.routing.evidence import Widening
from tests.conftest import ROOT
from tests.serving_reference import Served

LLAMA = ModelConfig(width=2048, layers=2, heads=32, kv_heads=8, ffn_width=5632, context_length=64)
QWEN = ModelConfig(
    family="qwen3", width=1024, layers=2, heads=16, kv_heads=8, head_width=128, ffn_width=3072, context_length=64
)
TINY = {
    "llama": ModelConfig(width=48, layers=2, heads=6, kv_heads=3, ffn_width=64, context_length=32),
    "qwen3": ModelConfig(
        family="qwen3", width=48, layers=2, heads=4, kv_heads=2, head_width=16, ffn_width=64, context_length=32
    ),
}  # fmt: skip


def default_model() -> tuple[ModelConfig, int]:
    config = load_config(str(ROOT / "configs/default.yaml"), [])
    return config.model, config.experts.count


def mixture(model: ModelConfig, experts: int, vocab_size: int = 512) -> dict[str, Any]:
    return moe_config(model, vocab_size, experts + 1, 2)


@functools.cache
def shipped() -> dict[str, tuple[ModelConfig, int]]:
    """The shapes of the text runs in configs/, and of pretrained models, with their experts."""
    found = {"llama": (LLAMA, 7), "qwen": (QWEN, 14)}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        if path.name.startswith(("study", "speech")):
            continue
        config = load_config(str(path), [])
        if config.task == "text" and config.model.pretrained is None:
            found[path.stem] = (config.model, config.experts.count)
    return found


@pytest.mark.parametrize("processes", DEGREES)
def test_multiples_make_every_shape_one_that_servers_split(processes: int) -> None:
    assert len(shipped()) > 5
    for model, experts in shipped().values():
        check_multiples(model, experts, processes)


def check_multiples(model: ModelConfig, experts: int, processes: int) -> None:
    for_vllm = Widening(model, experts, width_multiple=128, head_multiple=processes).widened
    assert for_vllm.width % 128 == 0
    assert refusal(mixture(for_vllm, experts), "vLLM", processes) is None
    heads = Widening(model, experts, head_multiple=processes).widened
    width = heads.heads * heads.width_per_head
    for_both = Widening(model, experts, width_multiple=width, head_multiple=processes).widened
    assert [refusal(mixture(for_both, experts), server, processes) for server in SERVERS] == [None, None]


def test_without_them_most_degrees_are_refused() -> None:
    model, experts = default_model()
    plain = mixture(Widening(model, experts).widened, experts)
    assert [refusal(plain, "vLLM", processes) for processes in DEGREES] == [None, None, "10 heads", "10 heads"]
    assert degrees(plain, "SGLang") == []
    assert refusal(mixture(Widening(LLAMA, 7).widened, 7), "vLLM", 2) == "9 key-value heads"


def test_what_multiples_cannot_mend_is_said() -> None:
    odd = ModelConfig(width=64, layers=1, heads=8, kv_heads=8, ffn_width=100, context_length=32)
    assert refusal(mixture(odd, 5), "vLLM", 8) == "an FFN of 100"
    few = QWEN.model_copy(update={"ffn_width": 512})
    assert refusal(mixture(few, 5), "SGLang", 8) == "6 experts"
    assert refusal(mixture(LLAMA, 5), "SGLang", 8) is None, "a Mixtral's experts are split, however few"
    up_to_4 = "on 1, 2 or 4 (not 8: an FFN of 100)"
    assert describe_serving(mixture(odd, 7)) == f"vLLM {up_to_4}; SGLang {up_to_4}"


def tiny_folder(folder: Path, family: str, width_multiple: int, head_multiple: int) -> Path:
    """Random weights in a shape that the assembler writes, saved by transformers."""
    transformers = pytest.importorskip("transformers")
    shape = Widening(TINY[family], 7, width_multiple, head_multiple).widened
    write_json(folder / "config.json", mixture(shape, 7, vocab_size=96))
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    write_json(folder / "config.json", mixture(shape, 7, vocab_size=96))
    return folder


@pytest.mark.parametrize("family", [*TINY])
def test_a_split_model_has_the_logits_and_words_of_the_whole(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    served = Widening(TINY[family], 7, head_multiple=8).widened
    folder = tiny_folder(tmp_path, family, served.heads * served.width_per_head, 8)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens_T = torch.randint(4, 96, (9,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits_TV = whole(tokens_T[None]).logits[0]
        words = whole.generate(tokens_T[None], max_new_tokens=5, do_sample=False, eos_token_id=None)[0, -5:].tolist()
        for server in SERVERS:
            for processes in DEGREES:
                split = Served(folder, server, processes)
                assert (split.logits(tokens_T) - logits_TV).abs().max() < 1e-4, (server, processes)
                assert split.generate(tokens_T, 5) == words


@pytest.mark.parametrize("family", [*TINY])
def test_a_shape_that_is_refused_here_is_one_that_cannot_be_split(family: str, tmp_path: Path) -> None:
    values = mixture(Widening(TINY[family], 7).widened, 7)
    folder = tiny_folder(tmp_path, family, 1, 1)
    for server in SERVERS:
        for processes in DEGREES:
            if refusal(values, server, processes) is None:
                Served(folder, server, processes)
            else:
                with pytest.raises(AssertionError):
                    Served(folder, server, processes)


def test_info_says_what_servers_take_and_what_more_would_cost() -> None:
    config = load_config(str(ROOT / "configs/default.yaml"), [])
    (said,) = [line for line in describe(config).splitlines() if line.startswith("servers:")]
    assert said == (
        "servers:    vLLM on 1 or 2 (not 4: 10 heads); SGLang on none (its width, 528, is not that of 10 heads of 64); "
        "for all of 1, 2, 4, 8: assembly.head_multiple: 8 in vLLM (10% more active parameters), with "
        "assembly.width_multiple: 1024 in SGLang too (114%)"
    )
    wider = load_config(
        str(ROOT / "configs/default.yaml"), ["assembly.head_multiple=8", "assembly.width_multiple=1024"]
    )
    assert "servers:    vLLM on 1, 2, 4 or 8 processes; SGLang on 1, 2, 4 or 8 processes\n" in describe(wider)


def test_what_servers_cost_is_what_the_page_says() -> None:
    """Parameters and FLOPs of the default's model, served, beside those of the same model as it is."""
    model, experts = default_model()
    vocab_size = load_config(str(ROOT / "configs/default.yaml"), []).data.vocab_size
    table = {}
    for multiples in ((1, 1), (1, 4), (1, 8), (64, 8), (128, 8), (128, 1), (1024, 8)):
        shape = Widening(model, experts, *multiples).widened
        sizes = model_sizes(shape, vocab_size, experts + 1, 2, model)
        table[multiples] = (shape, sizes.active_parameters)
    page = " ".join((ROOT / "docs/assembly.md").read_text().split())
    for (width_multiple, head_multiple), (shape, active) in table.items():
        taken = [", ".join(map(str, degrees(mixture(shape, experts), server))) or "none" for server in SERVERS]
        row = f"| {width_multiple}, {head_multiple} | {shape.width} | {shape.heads} | {active / 1e6:.1f} M, "
        assert f"{row}{100 * (active / table[1, 1][1] - 1):+.0f} % | {taken[0]} | {taken[1]} |" in page
