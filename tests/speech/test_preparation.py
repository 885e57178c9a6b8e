"""A preparation goes on where it was killed; features may be computed on the fly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modularforge.config import Config
from modularforge.errors import DataError
from modularforge.run import Run
from modularforge.speech import prepare
from modularforge.speech.feature_files import Remote, SpeechFile, content_name, open_speech_file
from modularforge.speech.features import Kind, features, frame_count
from modularforge.tasks.speech import SPEECH
from tests.speech.runs import speech_config
from tests.speech.sounds import config_of, tone, wav, write_table


class Killed(BaseException):
    """As a signal ends a process: nothing catches it."""


def computes(monkeypatch: pytest.MonkeyPatch, most: int | None = None) -> list[str]:
    """Names of the recordings whose features are computed from now on; after so many the process is killed."""
    seen: list[str] = []
    original = prepare.compute

    def counted(utterance: Any, settings: Any) -> Any:
        if most is not None and len(seen) >= most:
            raise Killed
        seen.append(utterance.origin)
        return original(utterance, settings)

    monkeypatch.setattr(prepare, "compute", counted)
    return seen


def corpus_of(config: Config) -> dict[str, bytes]:
    artifact = Run(config).require("prepare-data")
    return {name: artifact.read_bytes(name) for name in artifact.manifest.files}


@pytest.mark.parametrize("normalise", ["none", "corpus"])
@pytest.mark.parametrize("keeps", ["features", "audio"])
def test_a_killed_preparation_goes_on_with_the_same_bytes(
    keeps: str, normalise: str, sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speech = {"data": {"split_field": "split", "keeps": keeps, "normalise": normalise}}
    whole, killed = (speech_config(tmp_path / name, sounds, speech=speech) for name in ("whole", "killed"))
    Run(whole).make("prepare-data")
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    with monkeypatch.context() as stopped:
        first = computes(stopped, 50)
        with pytest.raises(Killed):
            Run(killed).make("prepare-data")
    kept = list((tmp_path / "killed").glob("data.partial/prepare-*/*.npz"))
    assert len(kept) >= 2
    second = computes(monkeypatch)
    Run(killed).make("prepare-data")
    assert len(first) + len(second) < 96 + 2 * prepare.GROUP, "only what was being computed is computed again"
    assert len({*second} & {*first}) <= len(first) - prepare.GROUP * len(kept)
    assert corpus_of(killed) == corpus_of(whole)
    assert not (tmp_path / "killed/data.partial").exists()


def test_what_other_settings_left_is_not_taken(sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = speech_config(tmp_path / "run", sounds)
    with monkeypatch.context() as stopped:
        computes(stopped, 50)
        with pytest.raises(Killed):
            Run(config).make("prepare-data")
    shorter = speech_config(tmp_path / "run", sounds, speech={"data": {"split_field": "split", "max_seconds": 0.35}})
    seen = computes(monkeypatch)
    Run(shorter).make("prepare-data")
    assert len(seen) == 96
    assert Run(shorter).corpus.metadata["dropped_utterances"]["low"]["long"] > 0


def saved(folder: Path, seconds: float) -> str:
    """Recordings whose table, names and texts stay what they are, as files and within a saved data set."""
    import datasets

    recording = wav(tone(300.0, seconds))
    rows = {"audio": [{"bytes": recording, "path": "0.wav"}] * 20, "text": ["one"] * 20}
    datasets.Dataset.from_dict(rows).save_to_disk(str(folder))
    return str(folder)


def files(folder: Path, seconds: float) -> str:
    if not (folder / "metadata.jsonl").exists():
        write_table(folder, [{"audio": f"{index}.wav", "text": "one"} for index in range(20)])
    (folder / "3.wav").write_bytes(wav(tone(300.0, seconds)))
    for index in (*range(3), *range(4, 20)):
        if not (folder / f"{index}.wav").exists():
            (folder / f"{index}.wav").write_bytes(wav(tone(300.0)))
    return str(folder / "metadata.jsonl")


@pytest.mark.parametrize(("make", "again"), [(files, 20), (saved, 20)])
def test_recordings_that_were_written_again_meanwhile_are_computed_again(
    make: Any, again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config_of(make(tmp_path / "corpus", 0.4), heldout_fraction=1e-9)
    config = settings.model_copy(update={"output_dir": str(tmp_path / "run")})
    monkeypatch.setattr(prepare, "in_order", lambda function, items, _workers: map(function, items))
    with monkeypatch.context() as stopped:
        computes(stopped, 19)
        with pytest.raises(Killed):
            Run(config).make("prepare-data")
    assert len(list((tmp_path / "run").glob("data.partial/prepare-*/*.npz"))) == 1
    make(tmp_path / "corpus", 0.8)
    seen = computes(monkeypatch)
    Run(config).make("prepare-data")
    assert len(seen) == again
    records = [json.loads(line) for line in corpus_of(config)["train.utterances.jsonl"].splitlines()]
    assert records[3]["seconds"] == 0.8


@pytest.mark.parametrize("kind", ["whisper", "fbank"])
def test_frames_are_counted_without_being_computed(kind: Kind) -> None:
    for size in (201, 399, 400, 560, 7_777):
        samples = tone(300.0)[:1].repeat(size) + np.float32(0.1)
        assert frame_count(samples, kind) == len(features(samples, kind, 80))


@pytest.mark.parametrize("normalise", ["none", "utterance", "corpus"])
def test_features_on_the_fly_give_the_losses_of_those_on_disk(normalise: str, sounds: Path, tmp_path: Path) -> None:
    losses, sizes = {}, {}
    for keeps in ("features", "audio"):
        data = {"split_field": "split", "keeps": keeps, "normalise": normalise}
        config = speech_config(tmp_path / keeps, sounds, speech={"data": data})
        run = Run(config)
        for stage in ("prepare-data", "partition", "backbone"):
            run.make(stage)
        losses[keeps] = run.require("backbone").manifest.facts["validation_loss"]
        files = run.require("prepare-data").manifest.files
        sizes[keeps] = [name for name in files if name.startswith("train.")]
        batch = next(SPEECH.everything(config, run.corpus).batches())
        losses[f"{keeps} frames"] = float(batch.tensors["features"].double().sum())
    assert losses["features"] == losses["audio"]
    assert losses["features frames"] == losses["audio frames"]
    assert "train.audio.bin" in sizes["audio"]
    assert "train.features.bin" not in sizes["audio"]
    old, new = (speech_config(tmp_path, sounds, speech={"data": {"keeps": keeps}}) for keeps in ("features", "audio"))
    assert Run(old).plan("prepare-data").fingerprint != Run(new).plan("prepare-data").fingerprint


@pytest.mark.parametrize("keeps", ["features", "audio"])
def test_what_lies_in_a_store_is_fetched_by_utterance_and_once(
    keeps: Any, sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODULARFORGE_CACHE", str(tmp_path / "cache"))
    config = speech_config(tmp_path / "run", sounds, speech={"data": {"split_field": "split", "keeps": keeps}})
    folder = Path(Run(config).make("prepare-data").url)
    content = (folder / content_name("train", keeps)).read_bytes()
    spans: list[tuple[int, int]] = []

    def read(start: int, end: int) -> bytes:
        spans.append((start, end))
        return content[start:end]

    settings = config.speech.data
    here = open_speech_file(folder, "train", settings)
    there = open_speech_file(folder, "train", settings, Remote(read, len(content)))
    chosen = [5, 0, 40, 5]
    for _ in range(2):
        for ours, expected in zip(there.features_of(chosen), here.features_of(chosen), strict=True):
            assert np.array_equal(ours, expected)
    assert {end - start for start, end in spans} <= set(np.diff(sizes_of(here)).tolist())
    assert len({*spans}) == 3
    assert not [*(tmp_path / "cache").iterdir()], "nothing is left"
    content = content[:50]
    with pytest.raises(DataError, match=r"must have \d+ bytes .* but their store gives 0 of \d+ from byte"):
        there.features(17)


def sizes_of(file: SpeechFile) -> Any:
    """Where each utterance's bytes start, and the end."""
    if file.recordings is not None:
        return file.recordings.bounds
    return file.bounds * file.frames[0:1].nbytes


def test_prepared_columns_have_no_recording_to_keep(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    row = {"input_features": [np.zeros((80, 12)).tolist()], "labels": [[70, 80]]}
    pyarrow.parquet.write_table(pyarrow.table(row), tmp_path / "prepared.parquet")
    config = config_of(tmp_path / "prepared.parquet", keeps="audio", heldout_fraction=1e-9)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"must have audio where speech.data.keeps is audio, but has input_features"):
        prepare.prepare_speech(config, tmp_path / "out")
