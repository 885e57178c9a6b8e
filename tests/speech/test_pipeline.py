"""A speech run goes through the stages of every task: features, projector, steering experts, one model, its rates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from checkpoints import paths
from modularforge.config import Config
from modularforge.errors import DataError, Interrupted, MismatchError
from modularforge.experts.kind import find_kind
from modularforge.info import describe
from modularforge.pipeline import stage_settings
from modularforge.run import Run
from modularforge.speech.audio import UnusableAudio, decode
from modularforge.speech.features import log_mel
from modularforge.speech.folder import load_speech, read_speech_config
from modularforge.speech.model import SpeechModel
from modularforge.speech.steering import GateUsage, Steering
from modularforge.speech.transcribe import features_of, transcribe_files
from modularforge.stage_outputs import Backbone
from modularforge.stages.evaluate_speech import measure_folder, measured_row
from modularforge.tasks.speech import SPEECH, arguments, gates_of, held_out_speech, speech_file
from modularforge.training.checkpointing import Checkpointing
from tests.conftest import run_command
from tests.measured import seen_without_gradients
from tests.speech.runs import run_all, speech_config
from tests.speech.sounds import wav, words


def batch_of(config: Config) -> tuple[torch.Tensor, ...]:
    batch = next(SPEECH.part(config, Run(config).require("partition"), 0).batches())
    return arguments(batch.tensors, torch.device("cpu"))


def test_a_run_ends_with_error_rates_of_every_model(finished: Config) -> None:
    results = run_all(finished)  # all is there: nothing is done again
    assert list(results["models"]) == ["backbone", "expert-0", "expert-1", "dense", "joint", "oracle", "assembled"]
    assert results["domains"] == ["low", "high"]
    assert results["chosen"] == "assembled"
    for row in results["models"].values():
        for domain in row["domains"].values():
            assert 0 <= domain["token_accuracy"] <= 1
            assert domain["wer"] >= 0
            assert domain["loss"] > 0
    folder = paths.local_path(finished.output_dir) / "evaluation"
    report = (folder / "report.md").read_text()
    header = next(line for line in report.splitlines() if line.startswith("| model |"))
    assert header.split(" | ")[4:8] == ["low", "high", "WER %", "CER %"]
    assert "mean test WER of" in report.splitlines()[2]
    assert "perplexity" not in report.split("##")[0]
    assert "## Where assembled routes" in report
    routing = results["routing"]["assembled"]
    assert routing["experts"] == ["expert-0", "expert-1"]
    for index, label in enumerate(("low", "high")):
        assert routing["share_per_domain_and_expert"][label][index] > 0.6
    listed = json.loads((folder / "utterances.json").read_text())["assembled"]["low"]
    wrong = round(results["models"]["assembled"]["domains"]["low"]["wer"] * 8)
    assert len(listed) == 0 if not wrong else listed[0]["audio"].endswith(".wav")


def test_experts_learn_their_own_domain(finished: Config) -> None:
    run = Run(finished)
    held_out = held_out_speech(finished, run.corpus)
    device = torch.device("cpu")
    plain = SPEECH.metrics(load_speech(run.require("backbone").local_folder()), held_out, device)
    for index, label in enumerate(("low", "high")):
        partition = json.loads(run.require("partition").read_bytes("partitions.json"))["partitions"][index]
        assert partition["tokens_by_label"][label] == partition["tokens"]
        own = SPEECH.metrics(run.backbone.expert(run.require("expert", index)), held_out, device)  # type: ignore[arg-type]
        assert own[label]["loss"] < plain[label]["loss"]


def test_the_trained_part_alone_is_saved(finished: Config) -> None:
    run = Run(finished)
    expert = run.require("expert", 1)
    tensors = load_file(expert.local_file("steering.safetensors"))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "steering.vectors": (2, 3, 32),
        "steering.gate_weight": (2, 3, 32),
        "steering.gate_bias": (2, 3),
        "steering.scale": (2, 1),
    }
    assert expert.manifest.facts["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    shared = expert.manifest.facts["shared_tensors"]
    assert shared.keys() == load_file(run.require("backbone").local_file("model.safetensors")).keys()
    assert {name.split(".")[0] for name in shared} == {"projector", "encoder", "decoder"}


def test_the_assembled_model_with_one_expert_forced_is_that_expert(finished: Config) -> None:
    run = Run(finished)
    assembled = load_speech(run.require("assemble").local_folder())
    assert isinstance(assembled.steering, Steering)
    assert assembled.shape.steering is not None
    assert (assembled.shape.steering.experts, assembled.shape.steering.total) == (2, 6)
    inputs = batch_of(finished)
    with torch.no_grad():
        mixed = assembled(*inputs)[0]
        for index in range(2):
            alone: SpeechModel = run.backbone.expert(run.require("expert", index))  # type: ignore[assignment]
            assembled.steering.forced = index
            assert torch.allclose(assembled(*inputs)[0], alone(*inputs)[0], atol=1e-5)
            assert not torch.equal(mixed, alone(*inputs)[0])


def test_the_router_sends_utterances_to_the_expert_of_their_domain(finished: Config) -> None:
    run = Run(finished)
    model = load_speech(run.require("assemble").local_folder())
    assert isinstance(model.steering, Steering)
    partitions = run.require("partition")
    for index in range(2):
        batch = next(SPEECH.part(finished, partitions, index).batches())
        usage = model.steering.observed = GateUsage(model.steering.shape)
        with torch.no_grad():
            model.encode(batch.tensors["features"], batch.tensors["frames"])
        assert usage.share_LK[0, index] > 0.6, (index, usage.share_LK)


def test_experts_trained_in_any_order_and_company_have_the_same_bytes(finished: Config, tmp_path: Path) -> None:
    again = finished.model_copy(update={"output_dir": str(tmp_path / "again"), "data_dir": finished.data_url})
    Path(again.output_dir).mkdir()
    (Path(again.output_dir) / "backbone").symlink_to(Path(finished.output_dir) / "backbone")
    Run(again).make("expert", 1)
    assert Run(again).require("expert", 1).manifest.files == Run(finished).require("expert", 1).manifest.files


def test_a_job_that_was_stopped_goes_on_with_the_same_bytes(
    finished: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = finished.model_copy(update={"output_dir": str(tmp_path / "again"), "data_dir": finished.data_url})
    for stage, index in (("backbone", None), ("expert", 0)):
        steps = iter(range(1, 9))
        with monkeypatch.context() as stopped:
            stopped.setattr(Checkpointing, "agree_to_stop", lambda self, _wants, steps=steps: next(steps) == 5)
            with pytest.raises(Interrupted):
                Run(again).make(stage, index)
        Run(again).make(stage, index)
        assert Run(again).require(stage, index).manifest.files == Run(finished).require(stage, index).manifest.files


def test_an_aligner_steers_behind_the_encoder(finished: Config, tmp_path: Path, sounds: Path) -> None:
    speech = {**finished.speech.model_dump(), "model": {**finished.speech.model.model_dump(), "prompt": ""}}
    settings = {"steering": {"variant": "aligner", "vectors": 3}, "speech": speech, "evaluation": {"baselines": []}}
    config = speech_config(tmp_path / "run", sounds, **settings)
    results = run_all(config)
    assert list(results["models"]) == ["backbone", "expert-0", "expert-1", "oracle", "assembled"]
    tensors = load_file(Run(config).require("expert", 0).local_file("steering.safetensors"))
    assert "steering.scale" not in tensors
    assert tensors["steering.vectors"].shape == (1, 3, 32)


def test_experts_of_another_projector_are_refused(finished: Config, tmp_path: Path, sounds: Path) -> None:
    other = speech_config(tmp_path / "other", sounds, seed=5)
    for stage, index in (("prepare-data", None), ("partition", None), ("backbone", None), ("expert", 0)):
        Run(other).make(stage, index)
    kind = find_kind("steering")
    from modularforge.assembly.assemble import check_same_backbone

    with pytest.raises(MismatchError, match="must have been trained on the backbone"):
        check_same_backbone(kind, Run(finished).require("backbone"), [Run(other).require("expert", 0)])


def test_settings_of_steering_and_speech_count_where_they_take_effect(tmp_path: Path, sounds: Path) -> None:
    def of(stage: str, **changes: object) -> dict[str, object]:
        return stage_settings(speech_config(tmp_path, sounds, **changes), stage)

    for stage, section, settings, counts in (
        ("expert", "steering", {"vectors": 4}, True),
        ("joint", "steering", {"vectors": 4}, True),
        ("expert", "steering", {"routing": "frame"}, False),
        ("assemble", "steering", {"routing": "frame"}, True),
        ("backbone", "steering", {"vectors": 4}, False),
        ("prepare-data", "speech", {"data": {"split_field": "split", "min_seconds": 0.2}}, True),
        ("prepare-data", "speech", {"data": {"split_field": "split"}, "model": {"prompt": "x"}}, True),
        ("backbone", "speech", {"data": {"split_field": "split"}, "model": {"pool_kernel": 2}}, True),
        ("evaluate", "speech", {"data": {"split_field": "split"}, "decoding": {"max_tokens": 9}}, True),
    ):
        assert (of(stage) != of(stage, **{section: settings})) is counts, (stage, section, settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "text"}, r"experts.kind must be steering with task speech, and with no other"),
        ({"assembly": {"router": "evidence"}}, "assembly.router must be ridge, means or uniform"),
        ({"evaluation": {"baselines": ["soup"]}}, "evaluation.baselines must be dense and joint at the most"),
        ({"evaluation": {"harness": ["piqa"]}}, "evaluation.harness must be left out with task speech"),
        ({"steering": {"variant": "aligner"}}, "must be left out with steering.variant aligner"),
        ({"speech": {"model": {"pool_layer": 1}}}, "speech.model.pool_kind must be mean or max"),
        ({"speech": {"data": {"features": "fbank"}}}, "data.features must be whisper"),
    ],
)
def test_settings_that_cannot_work_together_get_one_sentence(
    changes: dict[str, object], message: str, tmp_path: Path, sounds: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        speech_config(tmp_path, sounds, **changes)


def test_nothing_of_a_speech_model_is_calibrated_unless_asked(finished: Config) -> None:
    calibrated = Run(finished).require("calibrate")
    assert calibrated.manifest.facts["kept"] is False


def test_statistics_are_sums_that_add_up(finished: Config) -> None:
    run = Run(finished)
    model: SpeechModel = Backbone(run.require("backbone")).expert(run.require("expert", 0))  # type: ignore[assignment]
    from modularforge.speech.sums import gather_sums

    batches = [next(SPEECH.part(finished, run.require("partition"), k).batches()).tensors for k in (0, 1)]
    both, one, two = (gather_sums(model, found, torch.device("cpu")) for found in (batches, batches[:1], batches[1:]))
    for name in ("frames", "utterances"):
        sums = [getattr(item, name).layers[1] for item in (both, one, two)]
        assert sums[0].count == sums[1].count + sums[2].count
        assert np.allclose(sums[0].outer_DD, sums[1].outer_DD + sums[2].outer_DD)
    assert both.utterances.layers[0].count == 8


def test_a_finished_run_transcribes_recordings(finished: Config, sounds: Path) -> None:
    settings = paths.local_path(finished.output_dir) / "config.yaml"
    model, recording = Run(finished).require("assemble").local_folder(), sounds / "low/1.wav"
    held_out = held_out_speech(finished, Run(finished).corpus)
    by_folder = run_command("modularforge", "transcribe", "--model", str(model), "--prompt", "text: ", str(recording))
    by_run = run_command("modularforge", "transcribe", "--config", str(settings), str(recording))
    assert by_folder.stdout == by_run.stdout
    speech = load_speech(model)
    samples = decode(recording.read_bytes())
    features_BFM = torch.from_numpy(log_mel(samples, 80))[None]
    ids = held_out.corpus.tokenizer.encode("text: ", add_special_tokens=False).ids
    inputs = features_BFM, torch.tensor([features_BFM.shape[1]]), torch.tensor([ids])
    (expected,) = speech.transcribe(*inputs, held_out.corpus.end_token, 64)
    assert by_run.stdout.strip() == held_out.corpus.tokenizer.decode(expected).strip()
    refused = run_command("modularforge", "transcribe", "--model", str(model), __file__, check=False)
    assert "must be a recording that can be used, but it cannot be decoded" in refused.stderr + refused.stdout


def test_a_model_reads_recordings_as_its_training_did(tmp_path: Path, sounds: Path) -> None:
    speech = {"data": {"split_field": "split", "normalise": "corpus"}}
    config = speech_config(tmp_path / "run", sounds, speech=speech)
    for stage in ("prepare-data", "backbone"):
        Run(config).make(stage)
    trained = speech_file(config, Run(config).corpus.artifact, "train").features(1)
    settings = read_speech_config(Run(config).require("backbone").local_folder())["features"]
    assert np.abs(features_of((sounds / "low/1.wav").read_bytes(), settings) - trained).max() < 1e-2
    with pytest.raises(UnusableAudio, match="shorter than one frame"):
        features_of(wav(np.ones(200)), {**settings, "kind": "fbank"})


def test_a_folder_of_no_speech_model_gets_one_sentence(tmp_path: Path) -> None:
    words(tmp_path, 1)
    recording = tmp_path / "0.wav"
    for content, message in ((None, "has no config.json"), ("{", "must be a JSON object"), ("{}", "must be a speech")):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(DataError, match=message):
            list(transcribe_files(tmp_path, [str(recording)]))


def test_one_folder_is_measured_as_the_evaluation_measures_it(finished: Config) -> None:
    found = measure_folder(Run(finished), str(Run(finished).require("assemble").local_folder()))
    ((name, row),) = found["models"].items()
    assert name == "assembled"
    expected = run_all(finished)["models"]["assembled"]
    assert row["mean_loss"] == pytest.approx(expected["mean_loss"], abs=1e-6)
    assert row["wer"] == pytest.approx(expected["wer"])


def test_experts_of_an_assembled_model_are_listed_and_taken_out(finished: Config, tmp_path: Path) -> None:
    folder = Path(finished.output_dir)
    shutil.copytree(folder, tmp_path / "run")
    assembled = str(tmp_path / "run/assembled")
    assert "expert" in run_command("modularforge", "experts", "list", assembled).stdout
    run_command("modularforge", "experts", "remove", assembled, "0")
    model = load_speech(Path(assembled))
    assert isinstance(model.steering, Steering)
    assert model.steering.shape.experts == 1
    kept = load_file(Run(finished).require("expert", 1).local_file("steering.safetensors"))
    assert torch.equal(model.steering.vectors, kept["steering.vectors"])


def test_sanity_checks_model_recordings_and_a_short_training(finished: Config, sounds: Path, tmp_path: Path) -> None:
    settings = paths.local_path(finished.output_dir) / "config.yaml"
    done = run_command("modularforge", "sanity", "--config", str(settings), "--quick")
    assert "low: 6 of 6 recordings of train can be used" in done.stdout
    assert "frozen parts get no gradients" in done.stdout
    assert "4 of 4 checks passed" in done.stdout
    shutil.copytree(sounds, tmp_path / "sounds")
    for path in (tmp_path / "sounds/low").glob("*.wav"):
        path.write_bytes(b"RIFF")
    broken = settings.read_text().replace(str(sounds), str(tmp_path / "sounds"))
    (tmp_path / "broken.yaml").write_text(broken)
    failed = run_command("modularforge", "sanity", "--config", str(tmp_path / "broken.yaml"), "--quick", check=False)
    assert failed.returncode == 1
    assert "source low must have recordings that can be used, but of the first 6 none can" in failed.stdout
    assert "a short training must have recordings that can be used, but there are none; see M1" in failed.stdout


def test_info_counts_utterances_and_no_feed_forward_experts(sounds: Path, tmp_path: Path) -> None:
    said = describe(speech_config(tmp_path / "run", sounds))
    assert "projector 8 steps of 4 utterances; each of 2 experts 8 steps of 4 utterances" in said
    assert "assembled" not in said


def test_every_stage_of_speech_looks_at_its_models_in_the_type_that_measuring_has(
    sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with seen_without_gradients(monkeypatch) as seen:
        run_all(speech_config(tmp_path / "run", sounds))
    assert not seen.outside, "\n".join(seen.outside)
    assert seen.inside > 1000


def test_a_model_that_is_measured_in_bf16_says_nearly_the_same(finished: Config) -> None:
    """As a GPU measures it; here autocast alone, whose sums a CPU rounds too."""
    run = Run(finished)
    held_out, cpu = held_out_speech(finished, run.corpus), torch.device("cpu")
    for stage in ("backbone", "assemble"):
        model = load_speech(run.require(stage).local_folder())
        exact, _, _ = measured_row(model, held_out, {}, cpu)
        with torch.autocast("cpu", torch.bfloat16):
            half, _, gates = measured_row(model, held_out, {}, cpu)
            assert not gates or gates_of(model, held_out, gates)
        assert 0 < abs(half["mean_loss"] - exact["mean_loss"]) < 0.05
