"""The checks before a run: they pass on what is right, and each fault is found and named."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from modularforge.data.tokenizer import train_tokenizer
from modularforge.errors import ConfigError, DataError
from modularforge.model.backbone import build_backbone
from modularforge.observe.metrics import Curve
from modularforge.sanity import data, model, training
from modularforge.sanity.checks import SanityError, perform, run_checks
from modularforge.sanity.data import require_hub
from modularforge.sanity.node import check_network, describe_node
from modularforge.training.distributed import World
from tests.conftest import run_command, tiny_config
from tests.pretrained.hub_server import SmallHub

WITHIN_SECONDS = 10.0


@pytest.fixture
def tiny(tmp_path: Path):
    return tiny_config(tmp_path / "run")


def test_all_quick_checks_pass(tiny, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.process_time()
    assert run_checks(tiny, quick=True)
    assert time.process_time() - start < WITHIN_SECONDS
    shown = capsys.readouterr().out
    assert "4 of 4 checks passed" in shown
    assert "loss falls from" in shown
    assert "FAIL" not in shown


@pytest.mark.parametrize("test", ["m0", "m1", "m2"])
def test_one_check_can_be_chosen(tiny, test: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_checks(tiny, test, quick=True)
    shown = capsys.readouterr().out
    assert test.upper() in shown
    assert shown.count("\nM") == 1


def test_an_unknown_check_is_refused(tiny) -> None:
    with pytest.raises(ConfigError, match="m0, m1, m2"):
        run_checks(tiny, "m3")


def test_missing_data_fails_m1_with_its_cause_and_m2_goes_on_with_the_sample(tmp_path: Path, capsys) -> None:
    config = tiny_config(tmp_path, data={"sources": [{"name": "gone", "train": str(tmp_path / "none.jsonl")}]})
    assert not run_checks(config, quick=True)
    shown = capsys.readouterr().out
    assert "none.jsonl" in shown
    assert "on the shipped sample" in shown
    assert "failed: M1" in shown


def test_too_large_initial_weights_are_found() -> None:
    backbone = build_backbone(model.small_model(tiny_config("x").model, 48), 512)
    with torch.no_grad():
        backbone.model.embed_tokens.weight.mul_(40)
    parameters = sum(weight.numel() for weight in backbone.parameters())
    with pytest.raises(SanityError, match=r"near ln V = 6\.238"):
        list(model.check_untrained("backbone", backbone, parameters))


def test_non_finite_weights_and_wrong_counts_are_found() -> None:
    backbone = build_backbone(model.small_model(tiny_config("x").model, 48), 512)
    with pytest.raises(SanityError, match="must have 5 parameters"):
        list(model.check_untrained("backbone", backbone, 5))
    parameters = sum(weight.numel() for weight in backbone.parameters())
    with torch.no_grad():
        backbone.model.norm.weight[0] = torch.nan
    with pytest.raises(SanityError, match="finite logits"):
        list(model.check_untrained("backbone", backbone, parameters))


def test_a_weight_without_gradient_is_found() -> None:
    backbone = build_backbone(model.small_model(tiny_config("x").model, 48), 512)
    parameters = sum(weight.numel() for weight in backbone.parameters())
    backbone.model.unused = nn.Parameter(torch.zeros(3))
    with pytest.raises(SanityError, match=r"model\.unused .* gets none"):
        list(model.check_untrained("backbone", backbone, parameters + 3))


def test_a_tokenizer_that_loses_text_is_found() -> None:
    tokenizer = train_tokenizer(["abc abd"], 270)
    ids = tokenizer.encode("abc", add_special_tokens=False).ids
    with pytest.raises(SanityError, match="differs at character"):
        data._check_round_trip(tokenizer, "abx", np.array(ids))


def test_prepared_data_is_checked_in_place_of_the_sources(finished_run) -> None:
    found = list(data.check_data(finished_run, quick=True))
    assert "prepared data of 3 domains" in found[0]
    assert "encode to the same tokens" in found[-2]


def test_a_loss_that_does_not_fall_is_found(tiny) -> None:
    flat = Curve(np.arange(1.0, 41), np.full(40, 6.0))
    with pytest.raises(SanityError, match=r"goes from 6\.000 to 6\.000"):
        training.judge_fall(flat, 0.05)
    with pytest.raises(SanityError, match="must fall"):
        training.judge_fall(Curve(flat.steps, np.full(40, np.nan)), 0.05)


def test_a_learning_rate_that_blows_up_fails_m2(tmp_path: Path, capsys) -> None:
    config = tiny_config(tmp_path, backbone={"peak_learning_rate": 1e4})
    assert not run_checks(config, "m2", quick=True)
    assert "peak_learning_rate" in capsys.readouterr().out


def test_any_exception_becomes_a_cause_with_its_place() -> None:
    def broken():
        yield "first"
        raise ValueError("no luck")

    said: list[str] = []
    outcome = perform("Check", broken, said.append)
    assert outcome.findings == ["first"]
    assert outcome.cause is not None
    assert outcome.cause.startswith("ValueError: no luck (test_sanity.py:")


def test_the_node_is_described_and_a_lost_rank_is_found() -> None:
    assert "torch" in next(describe_node())

    class Deaf(World):
        def total(self, values: list[float]) -> list[float]:
            return values

    with pytest.raises(SanityError, match="3 processes must sum their ranks to 3"):
        list(check_network(Deaf(0, 3)))


def test_the_command_exits_with_0_or_1(tmp_path: Path) -> None:
    passed = run_command("modularforge", "sanity", "--quick", "--test", "m0", "--smoke-test", "-o", str(tmp_path))
    assert "2 of 2 checks passed" in passed.stdout
    wrong = ["--set", f"data.sources=[{{name: x, train: {tmp_path}/gone.txt}}]"]
    failed = run_command("modularforge", "sanity", "--quick", "--test", "m1", *wrong, "-o", str(tmp_path), check=False)
    assert failed.returncode == 1
    assert "FAIL" in failed.stdout


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml must be a YAML file, but does not exist"),
        (["--set", "backbone.stps=1"], "did you mean backbone.steps?"),
        (["--set", "model.pretrained=no/such/folder"], "no/such/folder"),
    ],
)
def test_settings_that_cannot_be_used_are_a_finding(wrong: list[str], cause: str) -> None:
    failed = run_command("modularforge", "sanity", "--quick", *wrong, check=False, env={"HF_HUB_OFFLINE": "1"})
    assert failed.returncode == 1
    assert "FAIL" in failed.stdout
    assert cause in failed.stdout


@pytest.mark.parametrize("answer", ["refused", "silent", "nowhere"])
def test_a_hub_that_does_not_answer_is_told_within_seconds(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and never says a word
        port = server.getsockname()[1]
        if answer == "refused":
            server.close()
        url = "http://hub.invalid" if answer == "nowhere" else f"http://127.0.0.1:{port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("modularforge.sanity.data.HUB_SECONDS", 0.5)
        config = tiny_config(tmp_path, data={"sources": [{"name": "web", "hub": "some/corpus", "train": "train"}]},
                             experts={"count": 1})  # fmt: skip
        start = time.monotonic()
        for check in (data.check_data, training.check_training):
            with pytest.raises(DataError, match=rf"the Hub must answer for source web .*but {url} does not"):
                list(check(config, quick=True))
        assert time.monotonic() - start < 6


def test_a_hub_that_answers_anything_is_asked_for_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SmallHub({}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        sources = [{"name": "web", "hub": "some/corpus", "train": "train"}]
        require_hub(tiny_config(tmp_path, data={"sources": sources}, experts={"count": 1}))
