"""The benchmark on a real model, from end to end on a tiny random one, and what its baselines are."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.real_model import __main__ as benchmark
from benchmarks.real_model import smollm2
from benchmarks.real_model.measure import middle
from benchmarks.real_model.settings import CONTEXT, DOMAINS, GENERAL_TEXTS, RANK
from modularforge.model.backbone import Decoder, build_backbone
from tests.conftest import tiny_config
from tests.pretrained.models import llama, sample_texts


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder for each domain, all with the same few texts."""
    documents = [{"text": text * 3} for text in sample_texts(9)]
    for name in (*DOMAINS, *GENERAL_TEXTS):
        (tmp_path / "texts" / name).mkdir(parents=True)
        for split in ("train", "valid", "test"):
            with gzip.open(tmp_path / "texts" / name / f"{split}.jsonl.gz", "wt", encoding="utf-8") as lines:
                lines.write("\n".join(json.dumps(document) for document in documents))
    return tmp_path / "texts"


def test_one_command_trains_assembles_measures_and_reports(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama(tmp_path / "model", max_position_embeddings=CONTEXT)
    monkeypatch.setattr(smollm2, "obtain", lambda cache: model)
    places = ["--texts", str(texts), "--cache", str(tmp_path), "--output", str(tmp_path / "out")]
    parts = ["--only", "experts", "dense", "measure", "--precision", "fp32"]
    monkeypatch.setattr(sys, "argv", ["real_model", *places, *parts, "--tiny"])

    benchmark.main()

    report = (tmp_path / "out" / "report-validation.md").read_text(encoding="utf-8")
    losses = report.split("## Less the backbone")[0]
    for name in ("backbone", "dense", "oracle", "assembled", "assembled without public"):
        assert f"| {name} |" in losses
    assert "What is the capital of France?" in report
    assert "| dense rate 0.0003 batch 1 steps 2 |" in report
    capsys.readouterr()
    benchmark.main()
    assert "rate" not in capsys.readouterr().out.split("## ")[0], "what is finished must not be done again"


def test_adapters_change_nothing_at_first_and_merged_give_the_plain_model_of_what_was_learned() -> None:
    pytest.importorskip("peft")
    from benchmarks.real_model.train import merged, with_adapters

    torch.manual_seed(0)
    plain = build_backbone(tiny_config("unused").model, 50)
    adapted: Decoder = build_backbone(plain.config, 50)
    adapted.load_state_dict(plain.state_dict())
    ids = torch.arange(12)[None]
    with_adapters(adapted, RANK)
    torch.testing.assert_close(adapted(ids), plain(ids))
    learned = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert learned
    assert all("lora_" in name for name in learned)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0.0, 0.02)
    wanted = adapted(ids)
    assert not torch.allclose(wanted, plain(ids), atol=1e-3)
    found = merged(adapted)
    assert found.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(found(ids), wanted, atol=1e-5, rtol=0)


def test_an_excerpt_is_from_the_middle_and_a_short_text_is_taken_whole() -> None:
    assert middle(range(10), 4) == range(3, 7)
    assert middle([1, 2, 3], 4) == [1, 2, 3]
