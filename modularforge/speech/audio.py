"""From the bytes of an audio file to mono samples at 16 kHz; what cannot be used is said in a few words."""

from __future__ import annotations

import io
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modularforge.errors import ConfigError, one_line

SAMPLE_RATE = 16_000
Samples = NDArray[np.float32]
"""Mono, between -1 and 1, at 16 kHz."""
CLIPPED_SHARE = 0.01
"""Of samples at full scale, from which on a recording is called clipped: 1 %, far above a loud recording's."""
SILENT_PEAK = 1e-4
"""A peak below this (-80 dB) is silence: 16-bit files have steps of 3e-5."""


class UnusableAudio(ValueError):
    """A recording that cannot be used; `reason` is how it is counted."""

    def __init__(self, reason: str, words: str) -> None:
        super().__init__(words)
        self.reason = reason


def decode(content: bytes) -> Samples:
    """The recording in a file's bytes (WAV, FLAC, MP3, OGG); channels are averaged. Raises UnusableAudio."""
    soundfile = require_package("soundfile")
    try:
        samples_NC, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, OSError, ValueError) as error:
        raise UnusableAudio("corrupt", f"it cannot be decoded ({one_line(str(error))})") from error
    return resampled(samples_NC.mean(axis=1), int(rate))


def encode(values: Any, rate: int) -> bytes:
    """Samples as the bytes of a WAV file, from which `decode` gives the same ones."""
    file = io.BytesIO()
    require_package("soundfile").write(file, np.asarray(values, np.float32), rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def resampled(values: Any, rate: int) -> Samples:
    """Samples at 16 kHz; raises UnusableAudio for none, for a rate that no recording has, and for what is no number."""
    samples: Samples = np.asarray(values, np.float32)
    if not len(samples):
        raise UnusableAudio("empty", "it has no samples")
    if not 1000 <= rate <= 768_000:
        raise UnusableAudio("corrupt", f"its rate of {rate} samples a second is none of a recording")
    if not np.isfinite(samples).all():
        raise UnusableAudio("corrupt", "some of its samples are no numbers")
    if rate == SAMPLE_RATE:
        return samples
    found = np.asarray(require_package("soxr").resample(samples, rate, SAMPLE_RATE), np.float32)
    if not len(found):
        raise UnusableAudio("empty", "it has no samples at 16 kHz")
    return found


def check_audible(samples: Samples, refuses_clipped: bool) -> None:
    """Raise UnusableAudio for silence and, where asked for, for a recording of which 1 % is at full scale."""
    peak = float(np.abs(samples).max())
    if peak < SILENT_PEAK:
        raise UnusableAudio("silent", "it is silent")
    if refuses_clipped and float((np.abs(samples) >= 0.999).mean()) >= CLIPPED_SHARE:
        raise UnusableAudio("clipped", f"at least {CLIPPED_SHARE:.0%} of its samples are at full scale")


def require_package(name: str) -> ModuleType:
    """A package of the extra `speech`; raises ConfigError where it is not installed."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"the task speech needs the package {name.replace('_', '-')}, but it is not installed; "
            "install the extra: pip install 'modularforge[speech]'"
        ) from error
