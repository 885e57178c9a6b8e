"""Shapes that servers take: what vLLM and SGLang ask of a Mixtral, held against what the evidence router makes of ours.

Neither server runs here (both want a GPU); the rules are those of `MixtralAttention` in vLLM 0.15 and in SGLang.
"""

from __future__ import annotations

import pytest

from modularforge.config import ModelConfig
from modularforge.config_files import load_config
from modularforge.model.sizes import model_sizes
from modularforge.routing.evidence import Widening
from tests.conftest import ROOT

LLAMA = ModelConfig(width=2048, layers=2, heads=32, kv_heads=8, ffn_width=5632, context_length=64)
QWEN = ModelConfig(width=1024, layers=2, heads=16, kv_heads=8, head_width=128, ffn_width=3072, context_length=64)


def refused(model: ModelConfig, processes: int) -> str | None:
    """Why a server would not split this shape over so many processes of tensor parallelism."""
    if model.heads % processes:
        return "heads"
    if model.kv_heads % processes and processes % model.kv_heads:
        return "key-value heads"  # as many to each, or each to as many
    if model.ffn_width % processes:
        return "FFN width"
    return None


def default_model() -> tuple[ModelConfig, int]:
    config = load_config(str(ROOT / "configs/default.yaml"), [])
    return config.model, config.experts.count


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("name", ["default", "llama", "qwen"])
def test_multiples_make_a_shape_that_servers_split(name: str, processes: int) -> None:
    model, experts = {"default": default_model(), "llama": (LLAMA, 5), "qwen": (QWEN, 14)}[name]
    served = Widening(model, experts, width_multiple=128, head_multiple=processes).widened
    assert refused(served, processes) is None
    assert served.width % 128 == 0


def test_without_them_most_degrees_are_refused() -> None:
    model, experts = default_model()
    plain = Widening(model, experts).widened
    assert [refused(plain, processes) for processes in (1, 2, 4, 8)] == [None, None, "heads", "heads"]
    assert refused(Widening(LLAMA, 5).widened, 2) == "key-value heads"


def test_what_servers_cost_is_what_the_page_says() -> None:
    """Parameters and FLOPs of the default's model, served, beside those of the same model as it is."""
    model, experts = default_model()
    table = {}
    for multiples in ((1, 1), (1, 4), (1, 8), (64, 8), (128, 8)):
        shape = Widening(model, experts, *multiples).widened
        sizes = model_sizes(shape, load_config(str(ROOT / "configs/default.yaml"), []).data.vocab_size, experts + 1, 2)
        table[multiples] = (shape.width, shape.heads, sizes.active_parameters)
    page = " ".join((ROOT / "docs/assembly.md").read_text().split())
    for (width_multiple, head_multiple), (width, heads, active) in table.items():
        row = f"| {width_multiple}, {head_multiple} | {width} | {heads} | {active / 1e6:.1f} M, "
        assert f"{row}{100 * (active / table[1, 1][2] - 1):+.0f} % |" in page
