"""Audio in many forms becomes features; what cannot be used is counted, or said in one sentence."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from modularforge.config import Config, SpeechDataConfig
from modularforge.data.tokenizer import load_tokenizer
from modularforge.errors import ConfigError, DataError
from modularforge.speech.audio import UnusableAudio, check_audible, decode, require_package, resampled
from modularforge.speech.feature_files import SpeechFile, open_speech_file
from modularforge.speech.features import fbank, log_mel, normalised
from modularforge.speech.prepare import prepare_speech
from modularforge.speech.records import neighbour, utterances
from tests.speech.sounds import RATE, WORDS, config_of, tone, wav, words, write_table


def prepare(config: Config, output: Path) -> tuple[SpeechFile, dict[str, Any]]:
    output.mkdir(exist_ok=True)
    metadata = prepare_speech(config, output)
    return open_speech_file(output, "train", config.speech.data), metadata


def texts(file: SpeechFile) -> list[str]:
    return [record["text"] for record in file.records]


def test_log_mel_features_are_the_first_of_whispers_own() -> None:
    from transformers import WhisperFeatureExtractor

    noise = np.random.default_rng(0).normal(0, 0.1, 9_777).astype(np.float32)
    for samples, bins in ((tone(440.0), 80), (noise, 128), (noise[:201], 80)):
        extractor = WhisperFeatureExtractor(feature_size=bins)
        expected = extractor(samples, sampling_rate=RATE, return_tensors="np").input_features[0].T
        found = log_mel(samples, bins)
        assert found.shape == (-(-len(samples) // 160), bins)
        assert np.abs(found - expected[: len(found)]).max() < 1e-4


def test_filter_banks_are_kaldis_in_frames_of_ten_milliseconds() -> None:
    samples = np.random.default_rng(1).normal(0, 0.1, 8_000).astype(np.float32)
    found = fbank(samples, 80)
    assert found.shape == (1 + (8_000 - 400) // 160, 80)
    # By hand, of the first frame: no offset, pre-emphasis, Povey's window, 512 points, Kaldi's triangles.
    frame = samples[:400].astype(np.float64) * 32768
    frame -= frame.mean()
    frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
    frame *= (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    power = np.abs(np.fft.rfft(frame, 512)) ** 2

    def mel(hertz: Any) -> Any:
        return 1127 * np.log(1 + hertz / 700)

    edges = np.linspace(mel(20.0), mel(8000.0), 82)
    points = mel(np.arange(256) * RATE / 512)
    rising = (points - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - points) / np.diff(edges)[1:, None]
    expected = np.log(np.maximum(np.maximum(0, np.minimum(rising, falling)) @ power[:256], 1.2e-7))
    assert np.abs(found[0] - expected).max() < 1e-2


def test_normalised_features_have_no_mean_and_unit_deviation() -> None:
    found = normalised(log_mel(np.random.default_rng(2).normal(0, 0.1, 9_000).astype(np.float32), 80))
    assert np.abs(found.mean(axis=0)).max() < 1e-5
    assert np.abs(found.std(axis=0) - 1).max() < 1e-2


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_every_rate_and_stereo_become_mono_at_16_khz(rate: int, kind: str) -> None:
    left = tone(440.0, 0.5, rate)
    found = decode(wav(np.stack([left, -0.5 * left], axis=1), rate, kind))
    expected = 0.25 * tone(440.0, 0.5)
    assert abs(len(found) - len(expected)) <= 1
    size = min(len(found), len(expected))
    assert np.abs(found[:size] - expected[:size]).max() < 5e-3


@pytest.mark.parametrize("kind", ["MP3", "OGG"])
def test_lossy_recordings_of_another_rate_keep_their_length_and_pitch(kind: str) -> None:
    found = decode(wav(tone(440.0, 0.5, 44_100), 44_100, kind))
    assert abs(len(found) / RATE - 0.5) < 0.1  # MP3 comes in frames
    peak = np.abs(np.fft.rfft(found)).argmax() * RATE / len(found)
    assert abs(peak - 440.0) < 5.0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "corrupt"),
        (b"RIFFnothing", "corrupt"),
        (wav(tone(200.0))[:30], "corrupt"),
        (wav(np.zeros((0,), np.float32)), "empty"),
        (wav(tone(200.0), kind="FLAC")[:60], "corrupt"),
    ],
)
def test_what_is_no_audio_says_why(content: bytes, reason: str) -> None:
    with pytest.raises(UnusableAudio) as error:
        decode(content)
    assert error.value.reason == reason
    assert "\n" not in str(error.value)


def test_silence_clipped_audio_and_impossible_rates_are_told() -> None:
    for samples, clipped, reason in ((np.zeros(800), False, "silent"), (np.sign(tone(200.0)), True, "clipped")):
        with pytest.raises(UnusableAudio) as error:
            check_audible(samples.astype(np.float32), clipped)
        assert error.value.reason == reason
    check_audible(np.sign(tone(200.0)), False)
    for samples, rate in ((tone(200.0), 3), (np.array([0.1, np.nan]), RATE)):
        with pytest.raises(UnusableAudio):
            resampled(samples, rate)


def test_a_missing_package_is_named_with_its_extra() -> None:
    with pytest.raises(ConfigError, match=r"needs the package no-such-package, .*modularforge\[speech\]"):
        require_package("_".join(["no", "such", "package"]))


def test_a_table_of_paths_becomes_features_ids_and_splits(tmp_path: Path) -> None:
    file, metadata = prepare(config_of(words(tmp_path / "w"), split_field="split"), tmp_path / "out")
    assert metadata["labels"] == ["tones"]
    counts = {split: found["tones"]["documents"] for split, found in metadata["splits"].items()}
    assert counts == {"train": 16, "validation": 4, "test": 4}
    assert texts(file) == list(WORDS) * 4
    assert file.tokens.document(0)[-1] == metadata["end_token"]
    samples = decode((tmp_path / "w/1.wav").read_bytes())
    assert np.abs(file.features(1) - log_mel(samples, 80)).max() < 2e-3
    assert file.records[1]["audio"].endswith("metadata.jsonl: 1.wav")
    assert file.records[1]["seconds"] == pytest.approx(len(samples) / RATE, abs=1e-3)


def test_the_same_audio_in_all_forms_gives_the_same_features(tmp_path: Path) -> None:
    table = words(tmp_path / "w", 8, split=False)
    records = [json.loads(line) for line in table.read_text().splitlines()]
    contents = [(tmp_path / "w" / record["audio"]).read_bytes() for record in records]
    with tarfile.open(tmp_path / "with_table.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "w", "inner")
    with tarfile.open(tmp_path / "with_texts.tar", "w") as archive:
        for index, (record, content) in enumerate(zip(records, contents, strict=True)):
            for name, data in ((f"{index}.wav", content), (f"{index}.txt", record["text"].encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    audio = [{"bytes": content, "path": None} for content in contents]
    column = {"audio": audio, "text": [record["text"] for record in records], "unused": list(range(8))}
    pyarrow.parquet.write_table(pyarrow.table(column), tmp_path / "w.parquet")
    arrays = [{"array": decode(content).tolist(), "sampling_rate": RATE} for content in contents]
    pyarrow.parquet.write_table(pyarrow.table({**column, "audio": arrays}), tmp_path / "arrays.parquet")
    beside = tmp_path / "beside/deep"
    beside.mkdir(parents=True)
    for index, (record, content) in enumerate(zip(records, contents, strict=True)):
        (beside / f"{index}.wav").write_bytes(content)
        (beside / f"{index}.txt").write_text(record["text"] + "\n")
    (tmp_path / "csv").mkdir()
    for record, content in zip(records, contents, strict=True):
        (tmp_path / "csv" / record["audio"]).write_bytes(content)
    rows = "".join(f"{record['audio']},{record['text']}\n" for record in records)
    (tmp_path / "csv/metadata.csv").write_text("file_name,text\n" + rows)
    forms = [
        "w",
        "with_table.tar.gz",
        "with_texts.tar",
        "w.parquet",
        "arrays.parquet",
        "beside",
        "csv",
        "beside/**/*.wav",
    ]
    held_out = {"validation": str(table), "test": str(table)}
    found = {}
    for number, form in enumerate([str(table), *forms, "beside/**/*.wav"]):
        config = config_of(tmp_path / form, source=held_out)
        file, _ = prepare(config, tmp_path / f"out-{number}")
        found[form] = (texts(file), np.concatenate([file.features(index) for index in range(file.count)]))
    expected = found.pop(str(table))
    for form, (own_texts, own_features) in found.items():
        assert own_texts == expected[0], form
        assert np.allclose(own_features, expected[1], atol=2e-3), form


def test_recordings_on_the_web_are_read_beside_their_table_and_by_their_address(tmp_path: Path) -> None:
    words(tmp_path / "w", 4, split=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/w"
        places = ("0.wav", f"{address}/1.wav", str(tmp_path / "w/2.wav"), f"{address}/gone.wav")
        write_table(tmp_path / "w", [{"audio": place, "text": "x"} for place in places])
        file, metadata = prepare(config_of(f"{address}/metadata.jsonl", heldout_fraction=1e-9), tmp_path / "out")
    finally:
        server.shutdown()
        server.server_close()
    expected = [decode((tmp_path / f"w/{index}.wav").read_bytes()) for index in range(3)]
    assert [len(file.features(index)) for index in range(3)] == [-(-len(samples) // 160) for samples in expected]
    assert metadata["dropped_utterances"] == {"tones": {"missing": 1}}


def test_questions_and_answers_are_columns_of_their_own(tmp_path: Path) -> None:
    audio = [{"bytes": wav(tone(200.0 * (i + 1))), "path": None} for i in range(3)]
    column = {"audio": audio, "text_prompt": ["who?", "what?", None], "answer": ["me", "this", "here"]}
    pyarrow.parquet.write_table(pyarrow.table(column), tmp_path / "qa.parquet")
    settings = {"prompt_field": "text_prompt", "heldout_fraction": 1e-9, "source": {"text_field": "answer"}}
    file, _ = prepare(config_of(tmp_path / "qa.parquet", **settings), tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out/tokenizer.json")
    assert texts(file) == ["me", "this", "here"]
    assert [tokenizer.decode(file.prompts.document(i).tolist()) for i in range(3)] == ["who?", "what?", ""]
    assert [tokenizer.decode(file.tokens.document(i)[:-1].tolist()) for i in range(3)] == ["me", "this", "here"]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.mark.parametrize("has_audio_column", [False, True])
def test_a_folder_that_datasets_saved_is_read(has_audio_column: bool, tmp_path: Path) -> None:
    from datasets import Audio, Dataset

    rows = {"audio": [{"bytes": wav(tone(200.0 * (i + 1))), "path": f"{i}.wav"} for i in range(4)], "text": list(WORDS)}
    found = Dataset.from_dict(rows)
    (found.cast_column("audio", Audio()) if has_audio_column else found).save_to_disk(str(tmp_path / "saved"))
    table = str(words(tmp_path / "w", 4, split=False))
    file, _ = prepare(config_of(tmp_path / "saved", source={"validation": table, "test": table}), tmp_path / "out")
    assert texts(file) == list(WORDS)


def test_recordings_of_the_hub_are_bytes_with_names_of_their_rows(tmp_path: Path) -> None:
    from datasets import Audio, Dataset

    audio = [{"bytes": wav(tone(200.0 * (i + 1))), "path": f"{i}.wav"} for i in range(4)]
    rows = Dataset.from_dict({"audio": audio, "text": list(WORDS), "who": ["a", "b", "", None]})
    rows.cast_column("audio", Audio()).to_parquet(tmp_path / "train.parquet")
    config = config_of("train", source={"hub": str(tmp_path), "label_field": "who"}, heldout_fraction=1e-9)
    found = list(utterances(config, config.data.sources[0], "train"))
    assert [item.text for item in found] == list(WORDS)
    assert [item.label for item in found] == ["a", "b", "tones", "tones"]
    assert found[1].read is not None
    assert found[1].read() == audio[1]["bytes"]
    assert found[1].origin == f"{tmp_path} (train), row 2: 1.wav"


def test_columns_that_are_prepared_already_are_taken_as_they_are(tmp_path: Path) -> None:
    features_MF = log_mel(tone(200.0), 80).T
    row = {"input_features": [features_MF.tolist()], "labels": [[70, 80, -100]]}
    pyarrow.parquet.write_table(pyarrow.table(row), tmp_path / "prepared.parquet")
    table = str(words(tmp_path / "w", 4, split=False))
    held_out = {"validation": table, "test": table}
    config = config_of(tmp_path / "prepared.parquet", source=held_out)
    with pytest.raises(DataError, match=r"must have input_features of 64 bins, but has an array of \(80, 40\)"):
        prepare(
            config_of(tmp_path / "prepared.parquet", bins=64, source={"validation": table, "test": table}), tmp_path
        )
    file, metadata = prepare(config, tmp_path / "out")
    assert np.allclose(file.features(0), features_MF.T, atol=2e-3)
    assert file.tokens.document(0).tolist() == [70, 80, metadata["end_token"]]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("input_features", [[1.0], [1.0, 2.0]], "must have input_features of 80 bins, but has an array of (0,)"),
        ("input_features", None, "must have input_features of 80 bins, but has an array of ()"),
        ("labels", None, "must have a list of token ids in column labels, but has None"),
        ("labels", "hello", "must have a list of token ids in column labels, but has 'hello'"),
        ("labels", [3, 70_000], "must have ids below 260 in column labels, the tokenizer's size, but has 70000"),
        ("input_features", [[1e39] * 80], {"corrupt": 1}),
        ("input_features", [[]] * 80, {"empty": 1}),
        ("labels", [-100, -100], {"no text": 1}),
    ],
)
def test_prepared_columns_that_cannot_be_are_refused_or_counted(
    column: str, value: Any, message: Any, tmp_path: Path
) -> None:
    good = {"input_features": np.zeros((80, 9)).tolist(), "labels": [70]}
    table = write_table(tmp_path / "w", [good, {**good, column: value}])
    config = config_of(table, heldout_fraction=1e-9)
    if isinstance(message, str):
        with pytest.raises(DataError, match=re.escape(message)):
            prepare(config, tmp_path / "out")
        return
    file, metadata = prepare(config, tmp_path / "out")
    assert file.count == 1
    assert metadata["dropped_utterances"] == {"tones": message}


def test_what_is_left_out_is_counted_by_its_reason(tmp_path: Path) -> None:
    table = words(tmp_path / "w", 8, split=False)
    bad = {
        "corrupt": b"RIFF",
        "silent": wav(np.zeros(8000, np.float32)),
        "empty": wav(np.zeros(0, np.float32)),
        "clipped": wav(np.sign(tone(300.0))),
        "short": wav(tone(300.0, 0.05)),
        "long": wav(tone(300.0, 3.0)),
    }
    records = [json.loads(line) for line in table.read_text().splitlines()]
    for name, content in bad.items():
        (tmp_path / "w" / f"{name}.wav").write_bytes(content)
        records.append({"audio": f"{name}.wav", "text": "x"})
    records += [{"audio": "gone.wav", "text": "x"}, {"audio": None, "text": "x"}]
    records += [{"audio": "0.wav", "text": text} for text in (" ", "y" * 100)]
    held_out = {"validation": str(table), "test": str(table)}
    mixed = write_table(tmp_path / "w", records, "mixed.jsonl")
    settings = {"max_seconds": 2.0, "max_text": 50, "refuses_clipped": True, "source": held_out}
    file, metadata = prepare(config_of(mixed, **settings), tmp_path / "out")
    assert texts(file) == list(WORDS) * 2
    expected = dict.fromkeys([*bad, "no text", "long text"], 1) | {"missing": 2}
    assert metadata["dropped_utterances"] == {"tones": dict(sorted(expected.items()))}
    settings = {"max_text": 50, "unusable": "refuse", "source": held_out}
    with pytest.raises(DataError, match=r"corrupt.wav must be a recording that can be used, but it cannot be decoded"):
        prepare(config_of(mixed, **settings), tmp_path / "out-2")


@pytest.mark.parametrize(
    ("record", "speech", "message"),
    [
        (
            {"sound": "0.wav", "text": "x"},
            {},
            "must have a column audio, but has sound, text; set speech.data",
        ),
        (
            {"audio": "0.wav", "words": "x"},
            {},
            "must have a column text, but has audio, words; set text_field",
        ),
        ({"audio": "0.wav", "text": 5}, {}, "must have text in column text, but has int"),
        ({"audio": "0.wav", "text": "x"}, {"prompt_field": "ask"}, "must have a column ask"),
        ({"audio": "0.wav", "text": "x", "part": "eval"}, {"split_field": "part"}, "must name a split in column part"),
        ("no object", {}, "must be a JSON object, but is a str"),
    ],
)
def test_records_that_are_not_as_settings_say_get_one_sentence(
    record: Any, speech: dict[str, Any], message: str, tmp_path: Path
) -> None:
    table = write_table(tmp_path, [record])
    with pytest.raises(DataError, match=re.escape(message)) as error:
        prepare(config_of(table, **speech), tmp_path / "out")
    assert "\n" not in str(error.value)


def test_files_and_folders_without_audio_get_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "alone.wav").write_bytes(wav(tone(200.0)))
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    (tmp_path / "notes.doc").write_text("x")
    words(tmp_path / "silent", 4, split=False)
    for path in (tmp_path / "silent").glob("*.wav"):
        path.write_bytes(wav(np.zeros(8000, np.float32)))
    cases = {
        "empty": "must hold metadata.jsonl, or audio files",
        "alone.wav": "must have its text in a file beside it that ends in .txt",
        "broken.tar": "must be a tar archive, but cannot be read",
        "notes.doc": "must be audio (.wav, .flac, .mp3, .ogg), JSONL, Parquet or a tar archive",
        "silent": "must have training utterances, but none of theirs could be used",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=re.escape(message)):
            prepare(config_of(tmp_path / name), tmp_path / "out")


def test_a_validation_part_is_drawn_by_the_seed_where_there_is_none(tmp_path: Path) -> None:
    table = words(tmp_path / "w", 80, split=False)
    _, metadata = prepare(config_of(table, heldout_fraction=0.1), tmp_path / "a")
    _, again = prepare(config_of(table, heldout_fraction=0.1), tmp_path / "b")
    counts = {split: found["tones"]["documents"] for split, found in metadata["splits"].items()}
    assert sum(counts.values()) == 80
    assert min(counts.values()) > 0
    assert counts["train"] > 55
    assert metadata == again
    for name in ("train.features.bin", "train.tokens.bin", "validation.utterances.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other = config_of(table, heldout_fraction=0.1).model_copy(update={"seed": 5})
    prepare(other, tmp_path / "c")
    assert (tmp_path / "c/test.utterances.jsonl").read_bytes() != (tmp_path / "a/test.utterances.jsonl").read_bytes()


def test_prompts_are_those_of_the_records_or_of_the_settings(tmp_path: Path) -> None:
    words(tmp_path / "w", 4, split=False)
    records = [{"audio": f"{i}.wav", "text": WORDS[i], "ask": f"question {i}?"} for i in range(4)]
    table = write_table(tmp_path / "w", records)
    held_out = {"validation": str(table), "test": str(table)}
    file, _ = prepare(config_of(table, prompt_field="ask", source=held_out), tmp_path / "a")
    config = config_of(table, source=held_out)
    model = config.speech.model.model_copy(update={"prompt": "Write: "})
    speech = config.speech.model_copy(update={"model": model})
    fixed, _ = prepare(config.model_copy(update={"speech": speech}), tmp_path / "b")
    for found, output, expected in ((file, "a", "question 2?"), (fixed, "b", "Write: ")):
        assert (
            load_tokenizer(tmp_path / output / "tokenizer.json").decode(found.prompts.document(2).tolist()) == expected
        )


def test_features_of_a_corpus_are_normalised_by_its_training_part(tmp_path: Path) -> None:
    config = config_of(words(tmp_path / "w"), split_field="split", features="fbank", normalise="corpus")
    file, _ = prepare(config, tmp_path / "out")
    everything = np.concatenate([file.features(index) for index in range(file.count)])
    assert np.abs(everything.mean(axis=0)).max() < 1e-2
    assert np.abs(everything.std(axis=0) - 1).max() < 1e-2
    own = config_of(words(tmp_path / "w"), split_field="split", features="fbank", normalise="utterance")
    assert np.abs(prepare(own, tmp_path / "own")[0].features(0).mean(axis=0)).max() < 1e-2


def test_a_truncated_file_of_features_gets_one_sentence(tmp_path: Path) -> None:
    prepare(config_of(words(tmp_path / "w"), split_field="split"), tmp_path / "out")
    path = tmp_path / "out/train.features.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"must hold \d+ bytes for 16 utterances of 80 bins, but has \d+ .* truncated"):
        open_speech_file(tmp_path / "out", "train", SpeechDataConfig())


def packed(path: Path, contents: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def of_table(table: bytes) -> dict[str, bytes]:
    return {"metadata.jsonl": table, **{f"{index}.wav": wav(tone(200.0 * (index + 1))) for index in range(4)}}


TABLE = b"".join(b'{"audio": "%d.wav", "text": "x"}\n' % index for index in range(4))


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tar.xz", "w:xz")])
def test_a_damaged_archive_is_no_shorter_one(name: str, mode: str, tmp_path: Path) -> None:
    path = packed(tmp_path / name, of_table(TABLE), mode)
    content = path.read_bytes()
    headers = [at for at in range(0, len(content), 512) if content[at:].startswith(b"3.wav")]
    place = headers[-1] if headers else int(0.9 * len(content))
    for damaged in (content[:place] + b"\xff" * 40 + content[place + 40 :], content[:place]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{re.escape(name)} must be (a tar archive|readable), but") as error:
            prepare(config_of(path), tmp_path / "out")
        assert "\n" not in str(error.value)


def test_an_archive_of_more_than_memory_holds_is_refused_before_it_is_read(tmp_path: Path) -> None:
    member = tarfile.TarInfo("huge.wav")
    member.size = 1 << 40
    (tmp_path / "huge.tar").write_bytes(member.tobuf())
    with pytest.raises(DataError, match=r"huge.tar must hold at most 16 GiB, .* unpack it and name its folder"):
        prepare(config_of(tmp_path / "huge.tar"), tmp_path / "out")


def test_a_table_in_an_archive_that_is_not_utf8_gets_one_sentence(tmp_path: Path) -> None:
    table = packed(tmp_path / "latin.tar", of_table('{"audio": "0.wav", "text": "é"}'.encode("latin-1")))
    with pytest.raises(DataError, match=r"latin.tar/metadata.jsonl must be UTF-8 text, but byte 28 is 0xe9"):
        prepare(config_of(table), tmp_path / "out")


def test_texts_with_the_line_ends_of_other_systems_stay_whole(tmp_path: Path) -> None:
    said = ["one\u2028two", "three\x85four", "five", "six"]
    rows = [json.dumps({"audio": f"{i}.wav", "text": text}, ensure_ascii=False) for i, text in enumerate(said)]
    path = packed(tmp_path / "a.tar", of_table("\r\n".join(rows).encode()))
    held_out = {"validation": str(path), "test": str(path)}
    file, _ = prepare(config_of(path, source=held_out), tmp_path / "out")
    assert texts(file) == said


def test_hidden_files_of_a_folder_are_no_recordings(tmp_path: Path) -> None:
    for name in ("a/0", "a/._0", ".trash/1"):
        path = tmp_path / "w" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(wav(tone(200.0)))
    (tmp_path / "w/a/0.txt").write_text("one")
    source = config_of(tmp_path / "w").data.sources[0]
    found = list(utterances(config_of(tmp_path / "w", heldout_fraction=1e-9), source, "train"))
    assert [item.origin for item in found] == [f"{tmp_path}/w/a/0.wav: {tmp_path}/w/a/0.wav"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"speaker": "x\ny"}, "must have a label of one line in column speaker"),
        ({"speaker": ["x"]}, "must have a label of one line in column speaker"),
        ({"speaker": "x", "text": "\ud800"}, "must hold Unicode text, but has half of a surrogate pair"),
        ({}, "must have a column speaker, but has audio, text"),
    ],
)
def test_labels_and_texts_are_checked_as_those_of_text_are(record: Any, message: str, tmp_path: Path) -> None:
    table = write_table(tmp_path, [{"audio": "0.wav", "text": "x", **record}])
    with pytest.raises(DataError, match=re.escape(message)):
        prepare(config_of(table, source={"label_field": "speaker"}), tmp_path / "out")


def test_a_compressed_table_is_read_and_a_name_is_judged_by_its_end(tmp_path: Path) -> None:
    table = words(tmp_path / "w", 8, split=False)
    packed_table = tmp_path / "w/metadata.jsonl.gz"
    packed_table.write_bytes(gzip.compress(table.read_bytes()))
    held_out = {"validation": str(table), "test": str(table)}
    file, _ = prepare(config_of(packed_table, source=held_out), tmp_path / "out")
    assert texts(file) == list(WORDS) * 2
    (tmp_path / "old.json.d").mkdir()
    (tmp_path / "old.json.d/notes.doc").write_text("{}")
    with pytest.raises(DataError, match="must be audio"):
        prepare(config_of(tmp_path / "old.json.d/notes.doc"), tmp_path / "out")


@pytest.mark.parametrize(
    ("table", "name", "expected"),
    [
        ("a/t.jsonl", "b/1.wav", "a/b/1.wav"),
        ("t.jsonl", "~1.wav", "./~1.wav"),
        ("s3://bucket/a/t.jsonl", "1#2.wav", "s3://bucket/a/1#2.wav"),
        ("https://host/a/t.jsonl?key=x/y", "1 #2.wav", "https://host/a/1%20%232.wav?key=x/y"),
        ("zip://t.jsonl::/a/b.zip", "1.wav", "zip://1.wav::/a/b.zip"),
    ],
)
def test_the_neighbour_of_a_table_is_a_url_of_the_same_kind(table: str, name: str, expected: str) -> None:
    assert neighbour(table, name) == expected
