"""What went into a speech model: utterances, ids and seconds of audio of its jobs, as their manifests say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints import Artifact
from modularforge.speech.feature_files import SpeechFile

COUNTED = ("training_tokens", "audio_seconds", "training_seconds")
"""Ids of answers, seconds of the audio that was heard, and seconds that the jobs took; facts of their manifests."""


def heard(file: SpeechFile, utterances: NDArray[np.int64]) -> dict[str, Any]:
    """Facts of a training on these utterances, each as often as it is named: ids of their answers, seconds of audio."""
    tokens = int((file.tokens.offsets[utterances + 1] - file.tokens.offsets[utterances]).sum())
    frames = int((file.bounds[utterances + 1] - file.bounds[utterances]).sum())
    return {"training_tokens": tokens, "audio_seconds": round(frames / 100, 2)}


def costs(jobs: Sequence[Artifact]) -> dict[str, Any]:
    """Sums over the jobs that a model is made of; None where one of an earlier version does not say."""
    found = {name: [job.manifest.facts.get(name) for job in jobs] for name in COUNTED}
    return {name: None if None in values else sum(values) for name, values in found.items()}
