"""Features are normalised by a statistics file of another toolkit, which nobody needs once a model is trained."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modularforge.errors import DataError
from modularforge.run import Run
from modularforge.speech.cmvn import statistics_in
from modularforge.speech.folder import load_speech, read_speech_config
from modularforge.speech.transcribe import features_of, transcribe_files
from modularforge.tasks.speech import speech_file
from tests.speech.runs import speech_config
from tests.speech.sounds import config_of

FRAMES_FM = np.random.default_rng(0).normal(3.0, 2.0, (50, 8))
"""Of the one speaker, whose other frames are the rest."""
SOME, REST = FRAMES_FM[:20], FRAMES_FM[20:]
Write = Callable[[Path], object]


def wenet(path: Path, frames_FM: Any = FRAMES_FM) -> None:
    values = {"mean_stat": frames_FM.sum(0).tolist(), "var_stat": (frames_FM**2).sum(0).tolist()}
    path.write_text(json.dumps({**values, "frame_num": len(frames_FM)}))


def matrix(frames_FM: Any) -> Any:
    return np.stack([[*frames_FM.sum(0), len(frames_FM)], [*(frames_FM**2).sum(0), 0.0]])


def kaldi_text(path: Path) -> None:
    path.write_text(f"global  [\n{text(FRAMES_FM)} ]\n")


def kaldi_speakers(path: Path) -> None:
    path.write_text(f"anna  [\n{text(SOME)} ]\nben  [\n{text(REST)} ]\n")


def text(frames_FM: Any) -> str:
    return "\n".join("  " + " ".join(map(repr, map(float, row))) for row in matrix(frames_FM))


def kaldi_binary(path: Path, kind: bytes = b"DM ", key: bytes = b"") -> None:
    parts = ((b"anna ", SOME), (b"ben ", REST)) if key else ((b"", FRAMES_FM),)
    dtype = "<f8" if kind == b"DM " else "<f4"
    head = b"\0B" + kind + struct.pack("<bibi", 4, 2, 4, 9)
    path.write_bytes(b"".join(name + head + matrix(frames_FM).astype(dtype).tobytes() for name, frames_FM in parts))


def espnet(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, count=len(FRAMES_FM), sum=FRAMES_FM.sum(0), sum_square=(FRAMES_FM**2).sum(0))


FORMATS: dict[str, Write] = {
    "WeNet": wenet,
    "Kaldi text": kaldi_text,
    "Kaldi text by speaker": kaldi_speakers,
    "Kaldi doubles": kaldi_binary,
    "Kaldi floats": lambda path: kaldi_binary(path, b"FM "),
    "Kaldi binary by speaker": lambda path: kaldi_binary(path, key=b"yes"),
    "ESPnet": espnet,
}


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_every_format_says_mean_and_deviation(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "stats")
    found_2M = statistics_in(config_of(tmp_path, normalise=str(tmp_path / "stats"), bins=8).speech.data)
    assert found_2M is not None
    assert np.allclose(found_2M, [FRAMES_FM.mean(0), FRAMES_FM.std(0)], rtol=1e-4)


def damaged(path: Path) -> None:
    kaldi_binary(path)
    path.write_bytes(path.read_bytes()[:-9])


def negative(path: Path) -> None:
    values = {"mean_stat": [0.0] * 8, "var_stat": [-1.0] * 8, "frame_num": 4}
    path.write_text(json.dumps(values))


WRONG: dict[str, tuple[Write, str]] = {
    "none": (lambda path: None, "does not exist"),
    "bins": (lambda path: wenet(path, FRAMES_FM[:, :5]), "it is of 5 bins, but speech.data.bins is 8"),
    "prose": (lambda path: path.write_text("nothing"), "it has no matrix in brackets"),
    "image": (lambda path: path.write_bytes(b"\x89PNG\xff"), "codec can't decode"),
    "truncated": (damaged, "buffer is smaller"),
    "compressed": (lambda path: kaldi_binary(path, b"CM "), "must be of floats or doubles"),
    "keys": (lambda path: path.write_text('{"mean": [1]}'), "it lacks 'frame_num'"),
    "squares": (negative, "its squares not negative"),
    "rows": (lambda path: path.write_text("[ 1 2 3 ]"), "must have two rows"),
    "ragged": (lambda path: path.write_text("[ 1 2 3\n 4 5 ]"), "inhomogeneous"),
    "zip": (lambda path: path.write_bytes(b"PK\x03\x04"), "not a zip file"),
}


@pytest.mark.parametrize(("write", "words"), WRONG.values(), ids=WRONG)
def test_what_is_no_such_file_gets_one_sentence(write: Write, words: str, tmp_path: Path) -> None:
    write(tmp_path / "stats")
    with pytest.raises(DataError, match="must be none, utterance, corpus, or a file of statistics") as said:
        statistics_in(config_of(tmp_path, normalise=str(tmp_path / "stats"), bins=8).speech.data)
    assert words in str(said.value)
    assert "\n" not in str(said.value)


def test_a_model_carries_the_statistics_and_knows_them_by_what_they_say(sounds: Path, tmp_path: Path) -> None:
    frames_FM = np.random.default_rng(1).normal(0.3, 0.7, (40, 80))
    path, other, again = (tmp_path / f"{name}.json" for name in ("stats", "other", "again"))
    for place, one_FM in ((path, frames_FM), (other, frames_FM + 1), (again, frames_FM)):
        wenet(place, one_FM)

    def config(place: Path) -> Any:
        return speech_config(
            tmp_path / "run", sounds, speech={"data": {"split_field": "split", "normalise": str(place)}}
        )

    run = Run(config(path))
    for stage, index in (("prepare-data", None), ("partition", None), ("backbone", None)):
        run.make(stage, index)
    for index in range(2):
        run.make("expert", index)
    run.make("assemble")
    identity = run.plan("prepare-data").fingerprint
    assert Run(config(again)).plan("prepare-data").fingerprint == identity
    assert Run(config(other)).plan("prepare-data").fingerprint != identity
    file = speech_file(run.config, run.corpus.artifact, "train")
    raw_FM = np.asarray(file.frames[file.bounds[1] : file.bounds[2]], np.float32)
    assert np.allclose(file.features(1), (raw_FM - frames_FM.mean(0)) / frames_FM.std(0), atol=1e-3)
    path.unlink()
    folder = run.require("assemble").local_folder()
    settings, recording = read_speech_config(folder)["features"], sounds / "low/1.wav"
    assert settings["normalise"] == "file"
    assert np.abs(features_of(recording.read_bytes(), settings) - file.features(1)).max() < 2e-2
    assert load_speech(folder).steering is not None
    assert len(list(transcribe_files(folder, [str(recording)], "text: ", 4))) == 1
    assert str(path) not in (folder / "config.json").read_text()
