"""What the program knows of good settings: advice before a run, a first settings file, reasons behind a verdict."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from checkpoints import paths
from modularforge import first_config
from modularforge.advice import advice, backbone_tokens, wanted_steps
from modularforge.cli import app
from modularforge.config import Config
from modularforge.config_files import load_config, make_config
from modularforge.cost import Machine
from modularforge.data.corpus import Split, read_documents
from modularforge.errors import ConfigError, DataError
from modularforge.first_config import look_at, write_config
from modularforge.info import describe
from modularforge.model.sizes import model_sizes
from modularforge.observe.evaluation import verdict
from modularforge.yaml_text import parse_yaml
from tests.conftest import ROOT, run_command, run_every_stage, tiny_values

FAST = Machine("fast", 1e18)
WORDS = (
    "law",
    "court",
    "judge",
    "train",
    "house",
    "river",
    "count",
    "token",
    "model",
    "night",
    "paper",
    "green",
    "wheel",
)


@pytest.fixture(autouse=True)
def _fast_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_config, "this_machine", lambda _: FAST)


def prose(length: int, seed: int = 0) -> str:
    dice = random.Random(seed)
    return " ".join(dice.choice(WORDS) for _ in range(length // 6))


def config_of(text: str) -> Config:
    return make_config(parse_yaml(text.encode()), "the file")


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"backbone.steps": 100}, "raise it to 998, or make the model smaller"),
        ({"experts.steps": 1000}, "lower it to 160, or raise backbone.steps"),
        ({"partition.method": "random"}, "random parts teach experts nothing different"),
        ({"experts.anchored": True}, "worse than plain experts"),
        ({"experts.counted_pairs": 0}, "pairs of tokens"),
        ({"assembly.public_expert": False}, "0.15 nats worse"),
        ({"calibration.steps": 1000}, "take 100"),
        ({"evaluation.baselines": ["soup"]}, "add dense"),
        ({"experts.count": 1, "partition.method": "clustered"}, "nothing to choose among"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_break_what_is_known_get_a_sentence_with_what_to_write(
    changes: dict[str, object], expected: str
) -> None:
    path = str(ROOT / "configs/quickstart.yaml")
    before = load_config(path)
    assert advice(before) == [], "the quickstart is as the method wants it"
    found = advice(load_config(path, list(changes.items())))
    assert [sentence for sentence in found if expected in sentence], found
    assert f"advice:     {found[0]}" in describe(load_config(path, list(changes.items())))


def test_the_readmes_first_settings_for_text_of_ones_own_are_warned_of() -> None:
    source = {"name": "law", "train": "law.txt"}
    found = advice(make_config({"data": {"sources": [source]}, "experts": {"count": 2}}, "the README"))
    assert any("backbone.steps" in sentence for sentence in found)
    assert any("experts.steps" in sentence for sentence in found)


def test_run_all_says_the_advice(tmp_path: Path) -> None:
    done = run_command("modularforge", "run-all", "--smoke-test", "-c", "configs/quickstart.yaml", "-o",
                       str(tmp_path / "run"), "--skip-backbone", "--skip-experts", "--skip-assembly",
                       "--skip-evaluation")  # fmt: skip
    assert "advice: backbone.steps gives each of the backbone's" in done.stderr


def test_folders_become_domains_and_the_model_fits_the_text(tmp_path: Path) -> None:
    for number, folder in enumerate(("law texts", "code")):
        for part in range(5):
            put(tmp_path / "mine" / folder / "deep" / f"{part}.txt", prose(200_000, number * 10 + part))
    put(tmp_path / "mine" / "README", "not read")
    look = look_at(str(tmp_path / "mine"))
    config = config_of(write_config(look, look.name))
    assert [source.name for source in config.data.sources] == ["code", "law-texts"]
    assert config.partition.method == "domain"
    assert config.experts.count == 2
    parameters = model_sizes(config.model, config.data.vocab_size).parameters
    assert backbone_tokens(config) >= 20 * parameters
    assert backbone_tokens(config) <= 4.2 * look.tokens
    assert config.backbone.steps == wanted_steps(config)
    assert advice(config) == []
    assert config.name == "mine"


def test_text_in_one_folder_is_clustered_by_its_size(tmp_path: Path) -> None:
    for part in range(200):
        put(tmp_path / "flat" / f"{part}.txt", prose(20_000, part))
    look = look_at(str(tmp_path / "flat"))
    config = config_of(write_config(look, look.name))
    assert config.partition.method == "clustered"
    assert config.experts.count == 4, "of 1.3 M tokens"


def _characters(config: Config, split: Split) -> list[int]:
    return [
        sum(len(document.text) for document in read_documents(source, split, config.data))
        for source in config.data.sources
    ]


@pytest.mark.parametrize(("files", "kilobytes", "share"), [
    (1, 64, 0.11), (1, 200, 0.04), (1, 5000, 0.01), (2, 1000, 0.01), (3, 1000, 0.01), (5, 200, 0.04), (10, 1000, 0.01),
])  # fmt: skip
def test_of_few_files_a_little_is_held_out_and_most_is_trained_on(
    tmp_path: Path, files: int, kilobytes: int, share: float
) -> None:
    """A file is one document up to 64 Ki characters: by whole ones, half of a small text would be held out."""
    texts = [prose(1000 * kilobytes // files, number).replace("wheel ", "wheel\n\n") for number in range(files)]
    for number, content in enumerate(texts):
        put(tmp_path / "mine" / f"{number}.txt", content)
    text = write_config(look_at(str(tmp_path / "mine")), "x")
    config = config_of(text)
    assert 0.01 <= config.data.heldout_fraction <= share
    assert f"{100 * config.data.heldout_fraction:.0f} % of the documents is held out" in text
    (train,), (validation,), (test,) = (_characters(config, split) for split in ("train", "validation", "test"))
    whole = sum(map(len, texts))
    assert train >= (1 - 3 * share) * whole
    assert min(validation, test) >= 300
    batch = config.calibration.batch_size * config.model.context_length
    assert 2 * batch + 2 <= validation / 2, "at two characters a token, the calibration's half has a batch"
    assert whole - 100 * files <= train + validation + test <= whole, "nothing is lost but ends of files"
    assert "# piece_characters: documents are pieces of files" in text


def test_the_settings_for_the_smallest_text_run_to_the_end(tmp_path: Path) -> None:
    """Batches that neither a partition nor half of what is held out could fill ended it after all else was trained."""
    put(tmp_path / "mine" / "all.txt", prose(65_000).replace("wheel ", "wheel\n\n"))
    values = parse_yaml(write_config(look_at(str(tmp_path / "mine")), "x").encode())
    values |= {"output_dir": str(tmp_path / "run")}
    for section in ("backbone", "experts", "calibration"):
        values[section] |= {"steps": 2, "warmup_steps": 1}
    values["training"]["validation_tokens"] = 1000
    config = make_config({**values, "evaluation": {"tokens_per_domain": 1000, "baselines": []}}, "the file")
    assert {"assembled", "calibrated"} & {*run_every_stage(config)["models"]}


def test_of_two_folders_each_has_some_text_held_out(tmp_path: Path) -> None:
    for folder, word in (("law", "judge"), ("почта", "письмо")):
        for number in range(6):
            lines = (f"{word} {number} {part}. " * 20 for part in range(200))
            put(tmp_path / "mine" / folder / f"{number}.txt", "\n\n".join(lines))
    config = config_of(write_config(look_at(str(tmp_path / "mine")), "x"))
    assert config.data.heldout_fraction <= 0.02
    assert all(source.piece_characters for source in config.data.sources)
    for split in ("train", "validation", "test"):
        assert all(_characters(config, split)), split


def test_text_of_many_documents_is_left_whole(tmp_path: Path) -> None:
    for part in range(900):
        put(tmp_path / "flat" / f"{part}.txt", prose(600, part))
    text = write_config(look_at(str(tmp_path / "flat")), "x")
    assert config_of(text).data.sources[0].piece_characters is None
    assert "piece_characters" not in text
    assert config_of(text).data.heldout_fraction == 0.01


def test_a_slow_machine_gets_a_smaller_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "much" / "a.txt", prose(5_000_000))
    put(tmp_path / "much" / "b.txt", prose(5_000_000))
    look = look_at(str(tmp_path / "much"))
    large = config_of(write_config(look, "x"))
    monkeypatch.setattr(first_config, "this_machine", lambda _: Machine("slow", 2e9))
    small = config_of(write_config(look, "x"))
    assert small.model.width < large.model.width
    assert ", about " in write_config(look, "x")


def test_splits_fields_and_compressed_files_are_seen(tmp_path: Path) -> None:
    for domain in ("a", "b"):
        for split in ("train", "valid", "test"):
            path = tmp_path / "corpus" / domain / f"wiki.{split}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps({"id": "7", "content": prose(2000, n)}) + "\n" for n in range(40))
            path.write_bytes(gzip.compress(lines.encode()))
    source = config_of(write_config(look_at(str(tmp_path / "corpus")), "x")).data.sources[0]
    assert str(source.validation).endswith("a/wiki.valid.jsonl.gz")
    assert str(source.train).endswith("a/wiki.train.jsonl.gz")
    assert source.text_field == "content"


def test_text_on_an_object_store_is_looked_at_too(tmp_path: Path) -> None:
    place = f"memory://{tmp_path.name}/corpus"
    for name in ("one", "two"):
        paths.replace_bytes(f"{place}/{name}/a.txt", prose(100_000).encode())
    look = look_at(place)
    config = config_of(write_config(look, look.name))
    assert [source.train for source in config.data.sources] == [f"{place}/{name}/**/*.txt" for name in ("one", "two")]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, "must be a folder of text, but is none"),
        ({"a.png": "x" * 200_000}, "must hold text (such as .jsonl"),
        ({"a.txt": "little"}, "must hold text of 20,000 tokens or more, but has about 2"),
    ],
    ids=["nothing", "pictures", "little"],
)
def test_what_is_no_corpus_is_one_sentence(tmp_path: Path, content: dict[str, str], sentence: str) -> None:
    for name, text in content.items():
        put(tmp_path / "c" / name, text)
    with pytest.raises(DataError) as error:
        look_at(str(tmp_path / "c"))
    assert sentence in str(error.value)


def test_init_writes_a_file_once_and_says_what_is_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "mine" / "a" / "x.txt", prose(200_000))
    put(tmp_path / "mine" / "b" / "x.txt", prose(200_000))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["init", "mine"])
    assert done.exit_code == 0, done.output
    assert "a domain for each of a, b\nnext: modularforge run-all --config mine.yaml" in done.output
    assert load_config("mine.yaml").output_dir == "runs/mine"
    again = CliRunner().invoke(app, ["init", "mine"])
    assert isinstance(again.exception, ConfigError)
    assert "mine.yaml must not exist yet" in str(again.exception)


def results(oracle: float, backbone_tokens: int = 20_000) -> dict[str, object]:
    losses = {"backbone": 3.5, "dense": 3.2, "oracle": oracle, "assembled": 3.3}
    models = {name: {"mean_loss": loss, "parameters": 1000} for name, loss in losses.items()}
    models["backbone"]["training_tokens"] = backbone_tokens
    return {"models": models, "chosen": "assembled", "differences": {}}


def test_not_worth_it_says_why_and_which_setting_to_change() -> None:
    assert verdict(results(3.1)).startswith("Not worth it here: ")
    assert "Likely reason: the routing, which keeps 50% of what the best expert" in verdict(results(3.1))
    assert "Likely reason: the experts themselves: even the best one of each domain has 3.2500" in verdict(
        results(3.25)
    )
    assert "experts.steps, experts.count, partition.method" in verdict(results(3.25))
    assert "and a backbone of 2.0 tokens for each parameter" in verdict(results(3.25, 2000))
    worth = results(3.1)
    worth["models"]["assembled"]["mean_loss"] = 3.15  # type: ignore[index]
    assert "Likely reason" not in verdict(worth)


def test_more_experts_than_domains_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the number of data\.sources for partition\.method domain \(3\), but is 50"):
        written(tmp_path, tiny_values(tmp_path, experts={"count": 50}, partition={"method": "domain"}))
    sources = [{"name": "x", "train": "a.jsonl", "label_field": "kind"}]
    values = {"data": {"sources": sources}, "experts": {"count": 50}, "partition": {"method": "domain"}}
    assert written(tmp_path, values).experts.count == 50, "labels are in the records"


def written(folder: Path, values: dict[str, Any]) -> Config:
    """Settings as a user's file has them."""
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return load_config(str(folder / "config.yaml"))
