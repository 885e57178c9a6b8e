"""Error rates come first and decide; test sets by path and by name; gates as tables and figures; the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import paths
from modularforge.config import Config, SpeechTestConfig
from modularforge.errors import ConfigError, DataError, MismatchError
from modularforge.evaluation.results import checked_results
from modularforge.observe.analyze import analyze
from modularforge.observe.compare import compare_runs
from modularforge.observe.evaluation import markdown, model_table, verdict
from modularforge.observe.gates import course_figure
from modularforge.observe.metrics import decisive
from modularforge.observe.report import write_report
from modularforge.observe.run import read_run
from modularforge.run import Run
from modularforge.speech.benchmarks import HUB_SETS, identity_of_sets, known, set_at
from modularforge.speech.folder import Part, Parts, load_speech, trained_tensors
from modularforge.speech.gates import frame_facts, reading, usage_facts, weight_facts
from modularforge.speech.hub import placed
from modularforge.speech.steering import Steering
from modularforge.stages.evaluate_speech import measure_folder
from modularforge.stages.push_speech import write_expert
from tests.conftest import run_command
from tests.pretrained.hub_server import SmallHub
from tests.speech.sounds import tone, wav, write_table
from tests.speech.tiny import tiny_batch, tiny_model


@pytest.fixture(scope="session")
def results(finished: Config) -> Any:
    return json.loads(paths.read_bytes(f"{finished.output_dir}/evaluation/results.json"))


def with_rates(results: Any, **rates: float) -> Any:
    """Results in which models have these word error rates."""
    found = json.loads(json.dumps(results))
    for name, rate in rates.items():
        found["models"][name]["wer"] = rate
    return found


def test_the_verdict_is_about_error_rates(results: Any) -> None:
    assert decisive(results).column == "wer"
    better = with_rates(results, assembled=0.1, joint=0.1, dense=0.25, backbone=0.5)
    assert verdict(better) == (
        "Worth it: the assembled model has a mean test WER of 10.0 %; vectors trained jointly on the same utterances "
        "have 10.0 % (the same); the projector alone, trained on the same utterances, has 25.0 % (ours is 15.0 points "
        "lower); the backbone has 50.0 % (ours is 40.0 points lower)."
    )
    assert verdict(with_rates(better, joint=0.05)).startswith("Not worth it here: ")
    assert verdict(with_rates(better, dense=0.1)).startswith("Not worth it here: "), "all are the same"
    assert "beyond comparison" in verdict(with_rates(better, backbone=float("inf")))


def test_error_rates_stand_before_the_loss_and_the_worst_utterances_are_listed(results: Any) -> None:
    rates = ["low", "high", "WER %", "CER %", "string accuracy %", "token accuracy %", "mean loss"]
    assert model_table(results).header[4:] == rates
    error = {"domain": "low", "audio": "a.wav", "reference": "one two", "hypothesis": "", "errors": 2, "words": 2}
    found = checked_results({**results, "errors": [error]})
    report = markdown(found)
    assert "## Worst utterances" in report
    assert "| low | a.wav | one two |  | 2 | 2 |" in report
    assert "## Samples" not in report
    with pytest.raises(ValueError, match="errors"):
        checked_results({**results, "errors": [{**error, "errors": -1}]})
    with pytest.raises(ValueError, match="wer"):
        checked_results({**results, "models": {name: {**row, "wer": "x"} for name, row in results["models"].items()}})


def test_results_say_what_gates_do(results: Any, finished: Config) -> None:
    gates = results["gates"]
    assert list(gates) == ["expert-0", "expert-1", "joint", "assembled"]
    assembled = gates["assembled"]
    assert (assembled["experts"], assembled["vectors"]) == (2, 3)
    assert np.allclose(np.sum(assembled["share_per_layer_and_vector"], axis=1), 1, atol=1e-3)
    assert assembled["utterance"]["layers"] == [0, 1]
    assert np.allclose(np.sum(assembled["utterance"]["gates"], axis=1), 1, atol=5e-3)
    model = load_speech(Run(finished).require("assemble").local_folder())
    assert isinstance(model.steering, Steering)
    assert np.allclose(assembled["scale_per_layer_and_expert"], model.steering.scale.detach().tolist(), atol=1e-4)
    broken = {**assembled, "evenness_per_layer": [1.0]}
    with pytest.raises(ValueError, match="one value for each layer and vector"):
        checked_results({**results, "gates": {"assembled": broken}})


@pytest.mark.parametrize("variant", ["layerwise", "aligner"])
def test_strength_is_what_is_added_over_the_frames(variant: Any) -> None:
    model, batch = tiny_model(variant), tiny_batch()
    assert isinstance(model.steering, Steering)
    seen: dict[int, list[float]] = {}
    steering, original = model.steering, model.steering.forward

    def watched(site: int, u_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = original(site, u_BTD, mask_BT)
        seen[site] = ((x_BTD - u_BTD).norm(dim=-1) / u_BTD.norm(dim=-1))[mask_BT].tolist()
        return x_BTD

    with pytest.MonkeyPatch.context() as patch, reading(model) as reader:
        patch.setattr(steering, "forward", watched)
        model.encode(batch["features"], batch["frames"])
    assert reader is not None
    expected = [sum(seen[site]) / len(seen[site]) for site in sorted(seen)]
    assert [float(value) for value in reader.strength_L] == pytest.approx(expected, rel=1e-3)
    assert steering.observed is None
    assert len(usage_facts({"a": reader})["strength_per_layer"]) == steering.shape.sites
    one = frame_facts(model, batch["features"][1, :21], {"audio": "a", "text": "t", "seconds": 0.21})
    assert np.array(one["utterance"]["gates"]).shape[1] == 5
    norms = weight_facts(steering)["norm_per_layer_and_vector"]
    assert np.allclose(norms, steering.vectors.detach().norm(dim=-1).numpy(), atol=1e-4)


def test_a_report_and_a_comparison_show_rates_and_gates(finished: Config, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(finished.output_dir, tmp_path / name)
    _, page = write_report(str(tmp_path / "a"))
    html = Path(page).read_text()
    assert "test WER (%)" in html
    assert "WER by model and domain" in html
    for figure in ("usage", "strength", "frames"):
        assert (tmp_path / f"a/plots/gates_assembled_{figure}.png").read_bytes()[:4] == b"\x89PNG"
    for figure in ("scale", "gates_expert-1_course", "gates_joint_course"):
        assert (tmp_path / f"a/plots/{figure}.png").exists()
    job = read_run(str(tmp_path / "a")).jobs["expert-1"]
    layers = [job.curves[f"scale_{layer}"].values for layer in range(2)]
    assert np.allclose(np.mean(layers, axis=0), job.curves["scale"].values), (
        "scales of layers, of which scale is the mean"
    )
    shown = course_figure(job).axes[0].lines  # type: ignore[union-attr]
    assert [np.asarray(line.get_ydata()).tolist() for line in shown] == [values.tolist() for values in layers]
    text = compare_runs([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))
    assert "Test: WER (%)" in text
    assert "perplexity" not in text.split("Test: WER")[1]


def test_gates_are_analysed_of_a_run_a_model_and_a_recording(
    finished: Config, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.output_dir, tmp_path / "run")
    run, recording = str(tmp_path / "run"), str(sounds / "low/1.wav")
    analyze(run)
    shown = capsys.readouterr().out
    assert all(f"Gates of {name}" in shown for name in ("expert-1", "joint", "assembled"))
    assert "Over training" in shown
    analyze(run, recording, str(tmp_path / "out"))
    assert "strength" in capsys.readouterr().out
    assert len(list((tmp_path / "out/plots").glob("gates_*_frames.png"))) == 1
    analyze(f"{run}/assembled")
    assert "plots" not in capsys.readouterr().out, "without a place nothing is written"
    for place, audio, message in (
        (f"{run}/backbone", None, "must be a steered model to have gates"),
        (f"{run}/assembled", __file__, "must be a recording that can be used"),
        (str(tmp_path / "none"), None, r"has no config\.json"),
    ):
        with pytest.raises(DataError, match=message):
            analyze(place, audio)
    shutil.rmtree(tmp_path / "run/evaluation")
    with pytest.raises(DataError, match="must have an evaluation of steered models"):
        analyze(run)


def test_a_test_set_has_a_row_and_errors_of_its_own(finished: Config, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for index in range(3):
        (tmp_path / "set" / f"{index}.wav").write_bytes(wav(tone(500.0 + index)))
    (tmp_path / "set/bad.wav").write_bytes(b"RIFF")
    write_table(tmp_path / "set", [{"sound": f"{name}.wav", "said": "seven eight"} for name in (0, 1, 2, "bad")])
    test = {"name": "mine", "path": str(tmp_path / "set"), "audio_field": "sound", "text_field": "said"}
    decoding = finished.speech.decoding.model_copy(update={"tests": [SpeechTestConfig.model_validate(test)]})
    config = finished.model_copy(update={"speech": finished.speech.model_copy(update={"decoding": decoding})})
    url = Run(config).require("assemble").url
    found = measure_folder(Run(config), url)
    row = found["models"]["assembled"]["tests"]["mine"]
    assert row["utterances"] == 3
    assert row["wer"] >= 1
    assert "mine" not in found["domains"]
    report = markdown(found)
    assert "## Test sets beside the domains" in report
    assert "mine WER %" in report
    assert [error["audio"] for error in found["errors"] if error["domain"] == "mine"]
    identity = identity_of_sets(config)
    assert identity == identity_of_sets(config)
    assert not identity_of_sets(finished)
    plans = [Run(one).plan("evaluate", inputs={}).fingerprint for one in (config, finished)]
    assert plans[0] != plans[1]
    (tmp_path / "set/0.wav").write_bytes(wav(tone(600.0, 0.5)))
    assert identity_of_sets(config) != identity
    (tmp_path / "set/other.jsonl").write_text(json.dumps({"audio": "1.wav", "text": "one"}) + "\n")
    assert measure_folder(Run(finished), url, str(tmp_path / "set/other.jsonl"))["domains"] == ["other.jsonl"]
    empty = write_table(tmp_path / "empty", [{"audio": "gone.wav", "text": "one"}])
    with pytest.raises(DataError, match=r"test set metadata\.jsonl must have recordings that can be used, but none"):
        measure_folder(Run(finished), url, str(empty))


def test_known_sets_are_read_from_the_hub_by_their_columns(finished: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With data sets of this machine in the place of the Hub's."""
    import datasets

    asked = []
    rows = [{"bytes": wav(tone(300.0 * (index + 1))), "path": f"{index}.wav"} for index in range(2)]

    def stand_in(repository: str, configuration: str | None, split: str, streaming: bool) -> Any:
        asked.append((repository, configuration, split))
        columns = ("context", "answer") if "aishell" in repository else ("audio", "text")
        data = datasets.Dataset.from_dict(dict(zip(columns, (rows, ["一", "二"]), strict=True)))
        return data.cast_column(columns[0], datasets.Audio())

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    url = Run(finished).require("assemble").url
    for name in HUB_SETS:
        found = measure_folder(Run(finished), url, name)
        assert found["domains"] == [name]
        assert found["models"]["assembled"]["domains"][name]["wer"] >= 1
    assert asked == [
        ("openslr/librispeech_asr", "clean", "test"),
        ("openslr/librispeech_asr", "other", "test"),
        ("AudioLLMs/aishell_1_zh_test", None, "test"),
    ]
    with pytest.raises(ConfigError, match="aishell-2 is: its makers give it out by agreement alone"):
        known(set_at("aishell-2"))
    with pytest.raises(
        ConfigError, match=r"where test set mine is: is none of the known ones \(librispeech-test-clean"
    ):
        known(SpeechTestConfig(name="mine"))
    own = known(SpeechTestConfig.model_validate({"name": "aishell-1", "path": "here"}))
    assert (own.hub, own.path) == (None, "here"), "what somebody says counts"
    assert set_at("/a/b c.jsonl").name == "b-c.jsonl"


@pytest.mark.parametrize("what", ["assembled", "experts/expert-1"])
def test_the_trained_part_goes_to_the_hub_and_back(what: str, finished: Config, sounds: Path, tmp_path: Path) -> None:
    settings, recording = paths.local_path(finished.output_dir) / "config.yaml", str(sounds / "high/2.wav")
    model = str(paths.local_path(finished.output_dir) / what)
    with SmallHub({}, tmp_path / "uploads") as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_x"}
        arguments = ("push", "me/speech", "--config", str(settings), "--model", model)
        assert "uploaded: me/speech" in run_command("modularforge", *arguments, env=environment).stdout
        assert {path.name for path in (tmp_path / "uploads/me/speech").iterdir()} >= {"config.json", "README.md"}
        heard = run_command("modularforge", "transcribe", "--model", "me/speech", recording, env=environment).stdout
    folder = Path(model)
    if what != "assembled":
        folder = tmp_path / "expert"
        folder.mkdir()
        write_expert(Run(finished), Run(finished).require("expert", 1), folder)
        own: Any = Run(finished).backbone.expert(Run(finished).require("expert", 1))
        saved = trained_tensors(load_speech(folder))
        assert all(torch.equal(saved[name], tensor) for name, tensor in trained_tensors(own).items())
    assert heard == run_command("modularforge", "transcribe", "--model", str(folder), recording).stdout


def test_frozen_parts_may_lie_elsewhere_but_must_be_the_same_ones(finished: Config) -> None:
    parts = Parts(Part("a/encoder", "1", {}), Part(None, None, {}))
    assert placed(parts, "here", "there") == Parts(Part("here", "1", {}), Part(None, None, {}))
    folder = Run(finished).require("assemble").local_folder()
    with pytest.raises((MismatchError, DataError)):
        load_speech(folder, parts=Parts(Part(str(folder), "1", {}), parts.decoder))


def test_commands_of_text_say_which_one_is_for_speech(finished: Config) -> None:
    model = Run(finished).require("assemble").url
    for command in ("route", "generate"):
        done = run_command("modularforge", command, "--model", model, "--prompt", "x", check=False)
        assert done.returncode == 2
        said = " ".join((done.stdout + done.stderr).split())
        assert "is of a speech model; `modularforge transcribe --model` writes down recordings" in said
