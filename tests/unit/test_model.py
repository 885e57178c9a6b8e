"""The decoder against transformers' Llama and Mixtral, its sizes, and its cache."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from checkpoints.tensors import LaterTensor
from modularforge.config import ModelConfig
from modularforge.errors import DataError, MismatchError
from modularforge.model import names
from modularforge.model.adapter_config import AdapterShape
from modularforge.model.backbone import KeyValueCache, build_backbone, cross_entropy
from modularforge.model.folder import backbone_tensors, fill, load_model, save_tensors
from modularforge.model.hub_config import backbone_config, moe_config, write_json
from modularforge.model.lora_mixture import AdapterLayer, MixedLinear, adapters_apart
from modularforge.model.moe import build_anchored_pair, build_moe, moe_layers, observe_routing, router_z_loss
from modularforge.model.sizes import model_sizes

VOCABULARY = 61
SHAPES = [
    ModelConfig(width=24, layers=2, heads=4, kv_heads=2, ffn_width=40, context_length=32, tied_head=True),
    ModelConfig(width=32, layers=3, heads=2, kv_heads=2, ffn_width=56, context_length=16, tied_head=False),
    ModelConfig(width=24, layers=1, heads=3, kv_heads=1, ffn_width=16, context_length=32, rope_theta=500_000.0),
]


def save(decoder, config: ModelConfig, folder: Path, values: dict[str, object]) -> Path:
    save_tensors(backbone_tensors(decoder), folder / "model.safetensors")
    write_json(folder / "config.json", values)
    return folder


def ids(config: ModelConfig, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, config.context_length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", SHAPES)
def test_the_backbone_equals_transformers_llama(config: ModelConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    decoder = build_backbone(config, VOCABULARY).eval()
    folder = save(decoder, config, tmp_path, backbone_config(config, VOCABULARY))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        assert (theirs(ids(config)).logits - decoder(ids(config))).abs().max() < 1e-5


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize(("experts", "active"), [(3, 2), (5, 1), (4, 4)])
def test_the_mixture_equals_transformers_mixtral(
    config: ModelConfig, experts: int, active: int, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    decoder = build_moe(config, VOCABULARY, experts, active).eval()
    for layer in moe_layers(decoder):
        torch.nn.init.normal_(layer.gate.get_parameter("weight"))
    folder = save(decoder, config, tmp_path, moe_config(config, VOCABULARY, experts, active))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "MixtralForCausalLM"
    with torch.no_grad():
        expected = theirs(ids(config)).logits
        assert (expected - decoder(ids(config))).abs().max() < 1e-5
        assert (expected - load_model(folder)(ids(config))).abs().max() < 1e-5


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("experts", [1, 5])
def test_sizes_count_the_parameters_there_are(config: ModelConfig, experts: int) -> None:
    decoder = build_backbone(config, VOCABULARY) if experts == 1 else build_moe(config, VOCABULARY, experts, 2)
    counted = sum(weight.numel() for weight in decoder.parameters())
    assert model_sizes(config, VOCABULARY, experts, min(experts, 2)).parameters == counted


def test_flops_agree_with_torchs_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = SHAPES[0]
    decoder, tokens = build_backbone(config, VOCABULARY), ids(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(tokens)
    ours = model_sizes(config, VOCABULARY).flops_per_token * tokens.numel()
    # torch counts the whole attention matrix or, on a CPU, none of it; we count the causal half.
    scores = config.layers * 2 * 2 * config.width * (config.context_length // 2) * tokens.numel()
    assert counter.get_total_flops() in (ours - scores, ours + scores)


def test_a_cache_gives_the_same_logits_as_reading_again() -> None:
    config = SHAPES[0]
    torch.manual_seed(0)
    decoder, tokens = build_backbone(config, VOCABULARY).eval(), ids(config)
    cache = KeyValueCache()
    with torch.no_grad():
        pieces = [decoder(piece, cache) for piece in tokens.split([5, 1, 1, config.context_length - 7], dim=1)]
        assert (torch.cat(pieces, dim=1) - decoder(tokens)).abs().max() < 1e-5


def test_what_a_cache_gave_is_not_changed_by_what_comes_later() -> None:
    cache, rows = KeyValueCache(room=4), torch.arange(24.0).view(2, 1, 6, 2)
    given = [cache.extend(0, piece, piece + 100)[0] for piece in rows.split([1, 2, 3], dim=2)]  # the last has no room
    assert [part.shape[2] for part in given] == [1, 3, 6]
    assert all(torch.equal(part, rows[:, :, : part.shape[2]]) for part in given)
    assert cache.length == 6
    cache.keep(torch.tensor([1]))
    new = torch.zeros(1, 1, 1, 2)
    keys, values = cache.extend(0, new, new)
    assert torch.equal(keys, torch.cat([rows[1:], new], dim=2))
    assert torch.equal(values, torch.cat([rows[1:] + 100, new], dim=2))


def test_later_tokens_do_not_change_earlier_logits() -> None:
    config = SHAPES[0]
    decoder, tokens = build_moe(config, VOCABULARY, 3, 2).eval(), ids(config)
    changed = tokens.clone()
    changed[:, 10:] = 0
    with torch.no_grad():
        assert torch.equal(decoder(tokens)[:, :10], decoder(changed)[:, :10])


def test_an_anchored_pair_gives_the_public_expert_a_logit_of_zero() -> None:
    config = SHAPES[0]
    decoder = build_anchored_pair(config, VOCABULARY)
    observe_routing(decoder)
    for layer in moe_layers(decoder):
        torch.nn.init.zeros_(layer.gate.get_parameter("weight"))
    decoder(ids(config))
    for layer in moe_layers(decoder):
        assert layer.observed_logits is not None
        assert layer.observed_logits.shape[-1] == 2
        assert not layer.observed_logits[:, 0].any()
    expected = torch.log(torch.tensor(2.0)).square()  # logsumexp(0, 0) = log 2
    assert torch.isclose(router_z_loss(decoder), expected)


def test_names_of_both_kinds_translate_and_back() -> None:
    dense = "model.layers.3.mlp.up_proj.weight"
    assert names.dense_to_expert(dense, 7) == "model.layers.3.block_sparse_moe.experts.7.w3.weight"
    assert names.expert_to_dense(names.dense_to_expert(dense, 7)) == dense
    assert names.is_shared("model.layers.0.self_attn.q_proj.weight")
    assert not names.is_shared(dense)
    assert names.dense_to_expert("model.norm.weight", 1) == "model.norm.weight"


def test_weights_of_another_shape_are_refused_by_name() -> None:
    tensors = dict(build_backbone(SHAPES[0], VOCABULARY).named_parameters())
    tensors["model.norm.weight"] = torch.nn.Parameter(torch.ones(5))
    with torch.device("meta"):
        empty = build_backbone(SHAPES[0], VOCABULARY)
    with pytest.raises(MismatchError, match=r"model\.norm\.weight must have shape \(24,\)"):
        fill(empty, {**tensors})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "must be a JSON object"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
            "must have model_type llama, mistral, qwen3",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "must hold model.safetensors"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:-10]
            ),
            "must be a whole weight file",
        ),
    ],
)
def test_a_damaged_model_folder_is_refused(damage, message: str, tmp_path: Path) -> None:
    folder = save(build_backbone(SHAPES[0], VOCABULARY), SHAPES[0], tmp_path, backbone_config(SHAPES[0], VOCABULARY))
    damage(folder)
    with pytest.raises(DataError, match=message):
        load_model(folder)


def test_a_fresh_model_knows_nothing_yet() -> None:
    config = SHAPES[0]
    torch.manual_seed(0)
    with torch.no_grad():
        loss = cross_entropy(build_backbone(config, VOCABULARY)(ids(config)), ids(config).roll(-1, 1))
    assert abs(float(loss) - math.log(VOCABULARY)) < 0.1


def test_matrices_of_several_adapters_are_gathered_once() -> None:
    """As each is made whole by all ranks; the parts are those of tensors that are there."""
    shape, pairs = AdapterShape(2, 2.0, ("q_proj",)), [(torch.randn(2, 5), torch.randn(3, 2)) for _ in range(3)]
    plain = nn.Linear(5, 5)
    mixture = MixedLinear(
        nn.Linear(5, 3, bias=False),
        {slot: (shape, pair) for slot, pair in enumerate(pairs)},
        AdapterLayer([plain] * 3, 1),
    )
    model, gathered = nn.ModuleDict({"q_proj": mixture}), list[str]()

    def later(name: str, weight: torch.Tensor) -> LaterTensor:
        def gather() -> torch.Tensor:
            gathered.append(name)
            return weight.detach()

        return LaterTensor(tuple(weight.shape), weight.dtype, gather)

    named = {name: weight for name, weight in model.named_parameters() if "lora" in name}
    found = adapters_apart(model, {name: later(name, weight) for name, weight in named.items()})  # type: ignore[arg-type]
    for tensors, (a_RI, b_OR) in zip(found, pairs, strict=True):
        whole = {name.split(".")[-2]: tensor.detach() for name, tensor in tensors.items()}
        assert torch.equal(whole["lora_A"], a_RI)
        assert torch.equal(whole["lora_B"], b_OR)
    assert sorted(gathered) == sorted(named)
