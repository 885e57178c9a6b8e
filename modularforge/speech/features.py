"""What encoders read: Whisper's log-mel spectrogram, and Kaldi's filter banks for conformers."""

# N samples  F frames of 10 ms  M bins

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from modularforge.speech.audio import SAMPLE_RATE, Samples, require_package

Kind = Literal["whisper", "fbank"]
Features = NDArray[np.float32]
WINDOW, HOP = 400, 160
FRAMES_A_SECOND = SAMPLE_RATE // HOP


def features(samples: Samples, kind: Kind, bins: int) -> Features:
    """Frames of 10 ms [F, M]; deterministic."""
    return log_mel(samples, bins) if kind == "whisper" else fbank(samples, bins)


def frame_count(samples: Samples, kind: Kind) -> int:
    """How many frames that would be."""
    return -(-len(samples) // HOP) if kind == "whisper" else max(0, 1 + (len(samples) - WINDOW) // HOP)


def log_mel(samples: Samples, bins: int) -> Features:
    """Whisper's features of one utterance, without the silence that it pads to 30 s (arXiv 2212.04356).

    They are the first ones of the padded utterance's: what follows the end is zero, as there.
    """
    frames = -(-len(samples) // HOP)
    end = frames * HOP + WINDOW - len(samples)
    padded = np.pad(np.pad(samples.astype(np.float64), (0, end)), (WINDOW // 2, 0), mode="reflect")
    window_F = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:frames]
    power_FB = np.abs(np.fft.rfft(window_F * hann(), axis=1)) ** 2
    log_FM = np.log10(np.maximum(power_FB @ mel_filters(bins), 1e-10))
    found: Features = ((np.maximum(log_FM, log_FM.max() - 8.0) + 4.0) / 4.0).astype(np.float32)
    return found


@lru_cache
def hann() -> NDArray[np.float64]:
    """The periodic Hann window."""
    window: NDArray[np.float64] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    return window


@lru_cache
def mel_filters(bins: int) -> NDArray[np.float64]:
    """Triangles on Slaney's mel scale, each of the same area, [WINDOW / 2 + 1, M]."""
    hertz_B = np.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1)
    edge_M = _hertz(np.linspace(0, _mel(SAMPLE_RATE / 2), bins + 2))
    slope_BM = hertz_B[:, None] - edge_M[None]
    rising = slope_BM[:, :-2] / np.diff(edge_M)[:-1]
    falling = -slope_BM[:, 2:] / np.diff(edge_M)[1:]
    filters: NDArray[np.float64] = np.maximum(0, np.minimum(rising, falling)) * 2 / (edge_M[2:] - edge_M[:-2])
    return filters


LOG_STEP = np.log(6.4) / 27  # Slaney: linear up to 1 kHz (15 mel), then logarithmic


def _mel(hertz: float) -> float:
    return hertz * 3 / 200 if hertz < 1000 else 15 + float(np.log(hertz / 1000)) / LOG_STEP


def _hertz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * LOG_STEP))
    return found


def fbank(samples: Samples, bins: int) -> Features:
    """Kaldi's log filter banks: Povey windows of 25 ms every 10 ms, pre-emphasis 0.97, without dither."""
    knf: Any = require_package("kaldi_native_fbank")
    options = knf.FbankOptions()
    options.frame_opts.dither, options.frame_opts.samp_freq = 0.0, float(SAMPLE_RATE)
    options.mel_opts.num_bins = bins
    computer = knf.OnlineFbank(options)
    computer.accept_waveform(SAMPLE_RATE, (samples * 32768.0).tolist())
    computer.input_finished()
    rows = [computer.get_frame(index) for index in range(computer.num_frames_ready)]
    return np.asarray(rows, np.float32).reshape(-1, bins)


def normalised(features_FM: Features) -> Features:
    """Features less their mean over their standard deviation, bin by bin (CMVN of one utterance)."""
    mean_M, std_M = features_FM.mean(axis=0, dtype=np.float64), features_FM.std(axis=0, dtype=np.float64)
    found: Features = ((features_FM - mean_M) / np.maximum(std_M, 1e-5)).astype(np.float32)
    return found
