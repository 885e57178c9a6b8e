"""Which jobs are compiled, where the settings leave it open, and what a graph holds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from modularforge.config import Config, ModelConfig, PhaseConfig, TrainingConfig
from modularforge.config_files import to_yaml
from modularforge.errors import DataError, MismatchError
from modularforge.evaluation.generation import Sampling, continue_batch, continue_fixed
from modularforge.model import head
from modularforge.model.backbone import Decoder, FixedCache, KeyValueCache, build_backbone
from modularforge.model.moe import build_anchored_pair
from modularforge.training import compiled
from modularforge.training.compiled import LONG, is_compiled
from modularforge.training.job import Job
from tests.conftest import ROOT

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def job(steps: int, **training: object) -> Job:
    return Job("job", PhaseConfig(steps=steps), TrainingConfig(**training))  # type: ignore[arg-type]


@pytest.fixture
def decoder() -> Decoder:
    return build_backbone(ModelConfig(width=8, layers=1, heads=1, kv_heads=1, ffn_width=8, context_length=8), 9)


@pytest.fixture
def has_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton and a compiler of C, wherever this runs."""
    monkeypatch.setattr(compiled, "_can_build_kernels", lambda: True)


def test_long_jobs_of_language_models_are_compiled_on_a_gpu(decoder: Decoder, has_tools: None) -> None:
    assert is_compiled(job(LONG), decoder, GPU)
    assert not is_compiled(job(LONG - 1), decoder, GPU)
    assert not is_compiled(job(LONG), decoder, CPU)
    assert not is_compiled(job(LONG), nn.Linear(2, 2), GPU)  # as a speech model, whose inputs have many shapes


def test_a_setting_outranks_what_suits(decoder: Decoder, has_tools: None) -> None:
    assert is_compiled(job(1, compile=True), decoder, CPU)
    assert not is_compiled(job(LONG, compile=False), decoder, GPU)


def test_without_a_compiler_of_c_or_kernels_by_rule_nothing_is_compiled_unasked(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert not is_compiled(job(LONG), decoder, GPU)
    monkeypatch.setattr(compiled, "_can_build_kernels", lambda: True)
    monkeypatch.setattr(compiled, "_chooses_by_rule", lambda: False)
    assert not is_compiled(job(LONG), decoder, GPU)


def test_kernels_of_what_is_compiled_are_chosen_by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config, "deterministic", False)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    compiled.compiled(nn.Linear(2, 2))
    assert config.deterministic


SHAPE = ModelConfig(width=16, layers=1, heads=4, kv_heads=2, ffn_width=24, context_length=32)
VOCABULARY = 41


@pytest.fixture
def graphs() -> Iterator[dict[str, int]]:
    """What dynamo counts from here on."""
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


@pytest.mark.parametrize("build", [build_backbone, build_anchored_pair])
def test_loss_and_model_are_one_graph_with_the_bits_of_plain_steps(
    build: Callable[[ModelConfig, int], Decoder], graphs: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "MOST_LOGITS", 1)  # in pieces
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", {"cpu": 7 * VOCABULARY})
    torch.manual_seed(0)
    plain = build(SHAPE, VOCABULARY)
    whole = torch.compile(plain, backend="aot_eager", fullgraph=True)
    tokens_BT, found = torch.randint(0, VOCABULARY, (2, 19)), []
    for model in (plain, whole):
        loss = model(tokens_BT, targets_BT=tokens_BT)
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in plain.parameters() if weight.grad is not None)])
        plain.zero_grad()
    assert all(map(torch.equal, *found))
    assert graphs["unique_graphs"] == 1


def test_steps_of_generation_are_one_graph_of_fixed_shapes_and_give_the_same_tokens(graphs: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = build_backbone(SHAPE, VOCABULARY).eval()
    for weight in model.parameters():  # far from ties
        if weight.dim() == 2:
            nn.init.normal_(weight, std=0.3)
    prompts = [[5, 9, 2], [7, 1, 1, 8, 30, 4], [3]]
    expected = continue_batch(model, prompts, 20, Sampling(temperature=0), ())
    step = torch.compile(model.fixed_logits, backend="eager", fullgraph=True, dynamic=False)
    assert continue_fixed(model, prompts, 20, (), step) == expected
    assert graphs["unique_graphs"] == 1
    end = 8  # rows end apart
    some = continue_batch(model, prompts, 20, Sampling(temperature=0), (end,))
    assert continue_fixed(model, prompts, 20, (end,), model.fixed_logits) == some
    assert len({len(row) for row in some}) > 1


def test_a_room_of_fixed_size_has_nothing_that_would_change_it_from_the_host(decoder: Decoder) -> None:
    filled = KeyValueCache(room=6)
    decoder.next_logits(torch.tensor([[1, 2], [3, 4]]), filled, torch.zeros(2, 2, dtype=torch.int64))
    cache = FixedCache(filled)
    assert not isinstance(cache, KeyValueCache)
    assert not {"keep", "length", "lengths", "text"} & {*dir(cache)}
    for place in (2, 3):  # the tensors say how much was read
        assert cache.place_1.tolist() == [place]
        assert cache.seen_BS.sum(dim=1).tolist() == [place + 1] * 2
        decoder.fixed_logits(torch.tensor([[5], [6]]), cache)
        assert [bool(key[:, :, place].any()) for key, _ in cache.layers.values()] == [True] * len(cache.layers)
        cache.advance()


def test_fixed_steps_are_refused_where_shapes_follow_from_tokens_or_the_context_ends(decoder: Decoder) -> None:
    mixture = build_anchored_pair(SHAPE, VOCABULARY)
    with pytest.raises(MismatchError, match="without experts"):
        continue_fixed(mixture, [[1]], 2, (), mixture.fixed_logits)
    with pytest.raises(DataError, match="context of 8 tokens, but have 3 and 6"):
        continue_fixed(decoder, [[1, 2, 3]], 6, (), decoder.fixed_logits)


def test_a_job_that_compiles_nothing_starts_without_torchs_compiler(finished_run: Config, tmp_path: Path) -> None:
    """Importing torch._dynamo takes as long as torch itself."""
    training = finished_run.training.model_copy(update={"compile": False})
    config = finished_run.model_copy(
        update={"output_dir": str(tmp_path), "data_dir": finished_run.data_url, "training": training}
    )
    (tmp_path / "settings.yaml").write_text(to_yaml(config))
    program = (
        "import sys; from modularforge.run import Run; from modularforge.config_files import load_config; "
        "run = Run(load_config(sys.argv[1])); run.make('backbone'); run.make('expert', 0); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "settings.yaml")], cwd=ROOT, check=True)
