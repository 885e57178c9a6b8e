"""Small recordings made here, and settings that read them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from modularforge.config import Config

RATE = 16_000
WORDS = ("one", "two", "three", "four")


def tone(pitch: float, seconds: float = 0.4, rate: int = RATE) -> NDArray[np.float32]:
    time_N = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * pitch * time_N) * np.hanning(len(time_N))).astype(np.float32)


def wav(samples: Any, rate: int = RATE, kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind)
    return file.getvalue()


def write_table(folder: Path, records: list[dict[str, Any]], name: str = "metadata.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def words(folder: Path, count: int = 24, pitch: float = 200.0, split: bool = True) -> Path:
    """Recordings of four words, each a tone of its own, as a JSONL table."""
    records = []
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        word = WORDS[index % 4]
        seconds = 0.3 + 0.02 * (index % 7)
        (folder / f"{index}.wav").write_bytes(wav(tone(pitch * (1 + index % 4), seconds)))
        part = ("train", "train", "train", "train", "validation", "test")[index // 4 % 6]
        records.append({"audio": f"{index}.wav", "text": word, **({"split": part} if split else {})})
    return write_table(folder, records)


def config_of(train: Any, **speech: Any) -> Config:
    """Settings that read one source; `speech` are those of `speech.data`, `source` further ones of the source."""
    source = {"name": "tones", "train": train if isinstance(train, list) else str(train), **speech.pop("source", {})}
    data = {"sources": [source], "vocab_size": 270}
    # What reads FBANK is a conformer, which is never a random one; data alone never opens it.
    model = {"encoder": "conformer"} if speech.get("features") == "fbank" else {}
    return Config.model_validate(
        {
            "task": "speech",
            "experts": {"kind": "steering"},
            "data": data,
            "speech": {"data": speech, "model": model},
            "assembly": {"router": "means"},
            "evaluation": {"baselines": []},
        }
    )
