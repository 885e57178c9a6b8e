"""From other people's models to an assembled one: the whole pipeline on tiny Llama and Qwen3 folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from checkpoints.errors import UserError
from launcher.tasks import build_tasks
from modularforge.calibration.calibrator import split_documents
from modularforge.config import Config
from modularforge.config_files import complete_config, load_config, to_yaml
from modularforge.errors import ConfigError, MismatchError
from modularforge.evaluation.generation import Sampling, generate, load_for_generation
from modularforge.model import names
from modularforge.model.folder import load_model, read_tensors
from modularforge.model.moe import restrict_routing
from modularforge.model.sizes import model_sizes
from modularforge.pipeline import OLD_NAMES, SHARED_WORK, stage_url
from modularforge.routing.statistics import STATISTICS_NAME, load_statistics
from modularforge.routing.text_counts import COUNTS_NAME, load_counts
from modularforge.run import Run
from modularforge.stage_outputs import Backbone, Corpus
from modularforge.stages import assemble, backbone, expert
from modularforge.stored_models import stored_model
from tests.conftest import prepare_data, run_every_stage, tiny_values
from tests.naive import naive_losses
from tests.pretrained import models

TOLERANCE = 1e-5


def values_on(folder: Path | str, output: Path, **changes: Any) -> dict[str, Any]:
    values = tiny_values(output, **{"backbone": {"steps": 0}, **changes})
    values["model"] = {"pretrained": str(folder), "context_length": models.CONTEXT}
    return values


@dataclass(frozen=True)
class Finished:
    """A run of every stage on a pretrained model."""

    source: Path
    config: Config
    results: dict[str, Any]

    def folder(self, stage: str) -> Path:
        """Local folder of a stage's artifact."""
        return Path(stage_url(self.config, OLD_NAMES.get(stage, stage)))


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Llama with scaled positions, bf16 and sharded; Qwen3 in float32 with a tied head."""
    root = tmp_path_factory.mktemp(str(request.param))
    if request.param == "llama":
        source = models.llama(root / "model", torch.bfloat16, shard_size="40KB")
        assert len(list(source.glob("model-*.safetensors"))) > 1
    else:
        source = models.qwen3(root / "model")
    config = complete_config(values_on(source, root / "run"), "tests")
    return Finished(source, config, run_every_stage(config))


def ids() -> torch.Tensor:
    return torch.randint(0, models.VOCABULARY, (2, models.POSITIONS), generator=torch.Generator().manual_seed(5))


def theirs(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(ids()).logits
    return logits


def ours(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder).float()(ids())


def test_the_imported_backbone_is_the_pretrained_model_tensor_by_tensor(run: Finished) -> None:
    before, after = read_tensors(run.source), read_tensors(run.folder("backbone"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name])
    assert torch.equal(theirs(run.source), theirs(run.folder("backbone")))


@pytest.mark.parametrize("stage", ["backbone", "baselines/dense", "assembled", "calibrated"])
def test_transformers_gives_the_same_logits_before_and_after_assembly(run: Finished, stage: str) -> None:
    folder = Path(run.config.output_dir) / stage
    if not (folder / "config.json").exists():
        pytest.skip("the calibration was not kept")
    expected = theirs(folder)
    assert (ours(folder) - expected).abs().max() < TOLERANCE
    assert expected.std() > 0.1


def test_assembled_models_have_the_class_of_their_family(run: Finished) -> None:
    values = json.loads((run.folder("assembled") / "config.json").read_text())
    source = json.loads((run.source / "config.json").read_text())
    wanted = {"llama": "MixtralForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}[run.config.model.family]
    assert values["architectures"] == [wanted]
    for name in ("max_position_embeddings", "eos_token_id", "bos_token_id", "vocab_size", "dtype"):
        assert values[name] == source.get(name), name
    assert values["rope_parameters"] == source["rope_parameters"]


def test_every_token_to_the_public_expert_is_the_pretrained_model(run: Finished) -> None:
    model = load_model(run.folder("assembled")).float()
    restrict_routing(model, (0,))
    with torch.no_grad():
        assert (model(ids()) - theirs(run.source)).abs().max() < TOLERANCE


def test_every_token_to_one_expert_is_that_experts_own_model(run: Finished) -> None:
    """Up to the type of the router rows: the assembled model keeps them in that of its other weights."""
    model, base = load_model(run.folder("assembled")).float(), Backbone(Run(run.config).require("backbone"))
    rows_type = read_tensors(run.folder("assembled"))[names.gate(0, run.config.model.family)].dtype
    for index in range(3):
        own = base.expert(Run(run.config).require("expert", index)).float()
        restrict_routing(model, (0, index + 1))
        with torch.no_grad():
            for name, weight in own.named_parameters():
                if names.is_gate(name):
                    weight.copy_(weight.to(rows_type))
            assert (model(ids()) - own(ids())).abs().max() < TOLERANCE


def test_linked_parts_are_the_same_model(run: Finished, tmp_path: Path) -> None:
    for name in ("backbone", "experts"):
        (tmp_path / name).symlink_to(Path(run.config.output_dir) / name)
    assembly = run.config.assembly.model_copy(update={"mode": "link"})
    places = {"output_dir": str(tmp_path), "data_dir": run.config.data_url}
    assemble.run(Run(run.config.model_copy(update={"assembly": assembly, **places})))
    folder = tmp_path / "assembled"
    assert len(list(folder.glob("expert-*.safetensors"))) == 4  # the public one too
    assert torch.equal(ours(folder), ours(run.folder("assembled")))
    assert torch.equal(theirs(folder), theirs(run.folder("assembled")))
    with torch.no_grad():
        assert torch.equal(stored_model(str(folder)).load()(ids()), load_model(folder)(ids()))


def test_an_experts_file_has_the_names_of_its_slot_and_the_type_of_the_backbone(run: Finished) -> None:
    family = run.config.model.family
    base = read_tensors(run.folder("backbone"))
    for index in range(3):
        tensors = load_file(Run(run.config).require("expert", index).local_file("expert.safetensors"))
        wanted = {names.expert_ffn(layer, index + 1, part, family) for layer in (0, 1) for part in names.PARTS}
        assert set(tensors) == wanted
        assert {tensor.dtype for tensor in tensors.values()} == {base[names.EMBEDDING].dtype}
        merged = read_tensors(run.folder("assembled"))
        assert all(torch.equal(merged[name], tensor) for name, tensor in tensors.items())
        assert not torch.equal(tensors[names.expert_ffn(0, index + 1, "w1", family)], base[names.dense_ffn(0, "w1")])


def test_the_corpus_is_made_of_the_pretrained_tokens(run: Finished) -> None:
    corpus = Corpus(Run(run.config).require("prepare-data"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.source)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert corpus.end_token == end
    document = corpus.tokens("train").document(0).tolist()
    assert document[-1] == end
    assert (document[0] == begin) == (run.config.model.family == "llama")
    assert end not in document[:-1]
    text = tokenizer.decode(document, skip_special_tokens=True)
    assert tokenizer(text)["input_ids"] == document[:-1]
    lengths = corpus.byte_lengths
    assert int(lengths[torch.tensor(document)].sum()) == len(text.encode())
    assert lengths[end] == 0


@pytest.mark.parametrize("stage", ["backbone", "assembled"])
def test_tokenizer_and_generation_settings_go_with_the_model(run: Finished, stage: str) -> None:
    before = transformers.AutoTokenizer.from_pretrained(run.source)
    after = transformers.AutoTokenizer.from_pretrained(run.folder(stage))
    text = "The <think> of 1901 – « été » <|end|>."
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert (after.eos_token_id, after.bos_token_id) == (before.eos_token_id, before.bos_token_id)
    assert after.chat_template == before.chat_template
    generation = transformers.GenerationConfig.from_pretrained(run.folder(stage))
    assert generation.eos_token_id == before.eos_token_id


def test_our_generation_is_that_of_transformers(run: Finished) -> None:
    folder = run.folder("backbone")
    loaded = load_for_generation(str(folder))
    text = generate(loaded.model.float(), loaded.tokenizer, "The law", 8, Sampling(temperature=0), loaded.end_tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The law", return_tensors="pt")["input_ids"]
    found = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(found, skip_special_tokens=True) == text


def test_every_model_was_measured(run: Finished) -> None:
    measured = run.results["models"]
    assert {"backbone", "dense", "expert-0", "expert-2", "soup", "assembled"} <= measured.keys()
    assert all(np.isfinite(model["mean_loss"]) for model in measured.values())


def test_flops_and_training_tokens_are_those_of_the_runs_window(run: Finished) -> None:
    """The model reads twice as far as the run does."""
    shape, measured = run.config.model, run.results["models"]
    assert (shape.context_length, shape.positions) == (models.CONTEXT, models.POSITIONS)
    expected = model_sizes(shape, models.VOCABULARY).flops_per_token
    assert measured["backbone"]["flops_per_token"] == measured["dense"]["flops_per_token"] == expected
    further = shape.model_copy(update={"context_length": models.POSITIONS})
    assert model_sizes(further, models.VOCABULARY).flops_per_token > expected
    phase = run.config.experts
    tokens = phase.steps * phase.batch_size * models.CONTEXT
    assert Run(run.config).require("expert", 0).manifest.facts["training_tokens"] == tokens
    assert measured["expert-0"]["training_tokens"] == tokens


def test_a_backbone_of_no_steps_and_experts_without_moments_read_few_tokens(folder: Path, tmp_path: Path) -> None:
    """Their sums are of 4,096 tokens and hold no outer products; the assembled model is made as ever."""
    values = values_on(folder, tmp_path / "run", assembly={"router": "evidence"})
    values["experts"] |= {"anchored": False, "statistics": "norms", "statistics_tokens": 20_000}
    config = complete_config(values, "tests")
    run_every_stage(config)
    for artifact in (Run(config).require("backbone"), Run(config).require("expert", 1)):
        found = load_statistics(artifact.local_file(STATISTICS_NAME))
        assert [layer.outer_DD.size for layer in found.layers] == [0, 0]
        assert 2048 < found.layers[0].count <= 4096
        counted = load_counts(artifact.local_file(COUNTS_NAME)).tokens_V.sum()
        assert counted > 2 * found.layers[0].count  # which cost no forward pass, and are what evidence is made of


def test_calibration_is_judged_in_the_type_it_is_stored_in(run: Finished) -> None:
    if not (run.folder("calibrated") / "config.json").exists():
        pytest.skip("the calibration was not kept")
    corpus = Corpus(Run(run.config).require("prepare-data"))
    _, decide = split_documents(corpus.tokens("validation"), corpus.labels)
    limits = run.config.evaluation.batch_size, run.config.evaluation.tokens_per_domain
    model = load_model(run.folder("calibrated")).float()
    found = naive_losses(model, decide, corpus.byte_lengths, *limits, models.CONTEXT).mean_loss
    assert Run(run.config).require("calibrate").manifest.facts["loss_after"] == pytest.approx(found, abs=1e-6)
    kinds = {tensor.dtype for tensor in read_tensors(run.folder("calibrated")).values()}
    assert kinds == {tensor.dtype for tensor in read_tensors(run.folder("assembled")).values()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return models.qwen3(tmp_path / "model", torch.bfloat16)


def test_training_goes_on_from_the_pretrained_weights(folder: Path, tmp_path: Path) -> None:
    results = {}
    for steps in (0, 20):
        values = values_on(folder, tmp_path / f"run{steps}", backbone={"steps": steps})
        config = complete_config(values, "tests")
        prepare_data(config)
        backbone.run(Run(config))
        results[steps] = Run(config).require("backbone")
    assert results[20].manifest.facts["validation_loss"] < results[0].manifest.facts["validation_loss"]
    before, after = (read_tensors(results[steps].local_folder()) for steps in (0, 20))
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    moved = [float((before[name].float() - after[name].float()).abs().max()) for name in before]
    assert 0 < max(moved) < 0.2


def test_the_fingerprint_knows_the_model_by_its_bytes_and_not_by_its_place(folder: Path, tmp_path: Path) -> None:
    config = complete_config(values_on(folder, tmp_path / "run"), "tests")
    prepare_data(config)
    before = [Run(config).plan(stage).fingerprint for stage in ("prepare-data", "backbone")]
    shutil.copytree(folder, tmp_path / "elsewhere")
    moved = complete_config(values_on(tmp_path / "elsewhere", tmp_path / "run"), "tests")
    assert [Run(moved).plan(stage).fingerprint for stage in ("prepare-data", "backbone")] == before
    weights = tmp_path / "elsewhere" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert Run(moved).plan("prepare-data").fingerprint == before[0]
    assert Run(moved).plan("backbone").fingerprint != before[1]
    backbone.run(Run(config))
    with pytest.raises(MismatchError, match="it was made from another pretrained"):
        backbone.run(Run(moved))


def test_another_tokenizer_is_another_corpus(folder: Path, tmp_path: Path) -> None:
    config = complete_config(values_on(folder, tmp_path / "run"), "tests")
    prepare_data(config)
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "<think>"))
    with pytest.raises(MismatchError, match="it was made from another tokenizer"):
        prepare_data(config)


def test_tasks_make_the_corpus_of_a_pretrained_tokenizer_as_one_process_does(folder: Path, tmp_path: Path) -> None:
    found = []
    for tasks in (None, 3):
        values = values_on(folder, tmp_path / f"run{tasks}", cluster={"prepare_tasks": tasks})
        config = complete_config(values, "tests")
        for task in build_tasks(config):
            if task.group in (*SHARED_WORK, "prepare-data"):
                for stage in task.stages:
                    Run(config).make(stage, task.index)
        made = Run(config).require("prepare-data").manifest
        found.append((made.fingerprint, {name: entry.digest for name, entry in made.files.items()}))
    assert found[0] == found[1]
    assert "tokenizer_config.json" in found[0][1]


def test_resolved_settings_give_the_same_run_again(folder: Path, tmp_path: Path) -> None:
    config = complete_config(values_on(folder, tmp_path / "run"), "tests")
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "resolved.yaml")) == config
    assert (config.model.width, config.model.head_width, config.data.vocab_size) == (32, 16, models.VOCABULARY)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"width": 64, "layers": 2}, ConfigError, r"or be left out: model\.width \(32, but is 64\); delete them"),
        ({"context_length": 97}, ConfigError, r"model\.context_length must be at most model\.max_positions \(96\)"),
        ({"pretrained": "no/such/folder"}, UserError, "there is no such folder"),
        ({"pretrained": "."}, ConfigError, r"must be a model folder, but \. has no config\.json"),
    ],
)
def test_settings_that_contradict_the_model_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str, folder: Path, tmp_path: Path
) -> None:
    values = values_on(folder, tmp_path / "run")
    values["model"] = {**values["model"], **changes}
    with pytest.raises(error, match=message):
        complete_config(values, "tests")


def test_a_smoke_test_leaves_the_pretrained_model_out(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(complete_config(values_on(folder, tmp_path / "run"), "tests")))
    assert load_config(str(path), smoke_test=True).model.pretrained is None


def test_plain_experts_on_a_pretrained_backbone_assemble_too(folder: Path, tmp_path: Path) -> None:
    values = values_on(folder, tmp_path / "run", assembly={"router": "ridge"})
    values["experts"] = {**values["experts"], "anchored": False}
    config = complete_config(values, "tests")
    prepare_data(config)
    backbone.run(Run(config))
    for index in range(3):
        expert.run(Run(config), index)
    assemble.run(Run(config))
    assembled = Path(stage_url(config, "assemble"))
    assert (ours(assembled) - theirs(assembled)).abs().max() < TOLERANCE


def test_the_model_card_says_what_it_was_made_from(run: Finished) -> None:
    card = (run.folder("assembled") / "README.md").read_text()
    base, experts = (
        Run(run.config).require("backbone"),
        [Run(run.config).require("expert", index) for index in range(3)],
    )
    facts = Run(run.config).require("assemble").manifest.facts
    for artifact in (base, *experts):
        assert artifact.manifest.fingerprint in card
        assert f"{artifact.manifest.facts['validation_loss']:.4f}" in card
    assert f"{experts[0].manifest.facts['training_tokens']:,} tokens" in card
    assert f"{facts['parameters']:,} parameters" in card
    assert facts["architecture"] in card
    assert base.manifest.facts["pretrained"]["identity"] in card
    train = base.manifest.facts["data"]["splits"]["train"]["c_code"]
    assert f"| c_code | train | {train['documents']} | {train['tokens']:,} | {train['bytes']:,} |" in card
    assert run.config.output_dir not in card
    assert str(run.source) not in card


def test_the_cards_python_loads_the_model(run: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (run.folder("assembled") / "README.md").read_text()
    block = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(run.folder("assembled"))
    found: dict[str, Any] = {}
    exec(block, found)
    assert type(found["model"]).__name__ == Run(run.config).require("assemble").manifest.facts["architecture"]
    wanted = torch.bfloat16 if run.config.model.family == "llama" else torch.float32
    assert found["model"].dtype == wanted


def test_the_calibrated_model_carries_tokenizer_and_card_too(run: Finished) -> None:
    folder = run.folder("calibrated")
    if not (folder / "config.json").exists():
        pytest.skip("the calibration was not kept")
    facts = Run(run.config).require("calibrate").manifest.facts
    assert f"{facts['loss_after']:.4f} after" in (folder / "README.md").read_text()
    assert (folder / "chat_template.jinja").is_file()
