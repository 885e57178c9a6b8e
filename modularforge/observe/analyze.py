"""`modularforge analyze`: what the gates of a speech run, or of one model, do, as tables and figures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from checkpoints import find_artifact, open_artifact, paths
from checkpoints.screen import say
from checkpoints.urls import safe_part
from modularforge.data.files import find_files, open_bytes
from modularforge.errors import DataError
from modularforge.log import json_safe
from modularforge.observe.canvas import house_style, png_bytes
from modularforge.observe.gates import Gates, course_figures, course_table, gate_figures, gate_table
from modularforge.observe.run import Run, is_run, read_run
from modularforge.speech.audio import UnusableAudio
from modularforge.speech.folder import load_speech, read_speech_config
from modularforge.speech.gates import frame_facts, weight_facts
from modularforge.speech.transcribe import features_of

PLOTS_FOLDER = "plots"


def analyze(url: str, audio: str | None = None, output: str | None = None) -> None:
    """Print tables of a run's models, or of one model folder, and write figures; with a recording, of it alone.

    Figures lie in `plots` of the run, or of `output`; of a model folder without it none are written. Raises DataError.
    """
    run = read_run(url) if is_run(url) else None
    found = _of_run(run) if run and audio is None else {_name(url): _of_model(_chosen(run) if run else url, audio)}
    for name, gates in found.items():
        gate_table(name, gates).show()
    if run and (course := course_table(run.jobs)).records:
        course.show()
    target = output or (run.url if run else None)
    for place in _write(found, target, run if audio is None else None) if target else ():
        say(place)


def _name(url: str) -> str:
    return url.rstrip("/").rsplit("/", 1)[-1]


def _of_run(run: Run) -> dict[str, Any]:
    """What the evaluation found; raises DataError for a run without speech, or without an evaluation."""
    if run.setting("task", "text") != "speech":
        raise DataError(
            f"{run.url} must be a run of task speech to have gates over frames, but is of "
            f"{run.setting('task', 'text')}; `modularforge route` and `report` show where text goes"
        )
    found: dict[str, Any] = (run.evaluation or {}).get("gates") or {}
    if not found:
        raise DataError(
            f"{run.url} must have an evaluation of steered models, but has none; run `modularforge evaluate`, or "
            "name a model folder"
        )
    return found


def _chosen(run: Run) -> str:
    name = next((name for name in ("calibrated", "assembled", "joint") if _is_model(run, name)), None)
    if name is None:
        raise DataError(f"{run.url} must have an assembled model to hear a recording, but has none; assemble it")
    return run.artifacts[name].url


def _is_model(run: Run, name: str) -> bool:
    return name in run.artifacts and "config.json" in run.artifacts[name].manifest.files


def _of_model(url: str, audio: str | None) -> Gates:
    """What the weights of one model say, and with a recording what its gates do there."""
    artifact = find_artifact(url)
    folder = open_artifact(url).local_folder() if artifact else Path(paths.local_path(url))
    config = read_speech_config(folder)
    model = load_speech(folder)
    if model.steering is None:
        raise DataError(f"{url} must be a steered model to have gates, but is the projector alone; name another")
    facts = weight_facts(model.steering)
    empty: dict[str, Any] = {"share_per_layer_and_vector": [], "share_per_domain_and_vector": {}}
    facts |= {**empty, "evenness_per_layer": [], "strength_per_layer": [], "utterance": None}
    if audio is not None:
        (place,) = find_files(audio)
        try:
            with open_bytes(place) as file:
                features_FM = torch.from_numpy(features_of(file.read(), config["features"]))
        except UnusableAudio as error:
            raise DataError(f"{audio} must be a recording that can be used, but {error}; name another") from error
        about = {"audio": _name(place), "text": _name(place), "seconds": len(features_FM) / 100}
        facts |= frame_facts(model, features_FM, about)
    safe: Gates = json_safe(facts)
    return safe


def _write(found: dict[str, Any], target: str, run: Run | None) -> Iterator[str]:
    """PNG files of all figures; their places."""
    with house_style():
        for model, name, figure in _figures(found, run):
            place = paths.join(target, PLOTS_FOLDER, f"gates_{safe_part(model)}_{name}.png")
            paths.replace_bytes(place, png_bytes(figure, cut=False))
            yield place


def _figures(found: dict[str, Any], run: Run | None) -> Iterator[tuple[str, str, Figure]]:
    for model, gates in found.items():
        for name, figure in gate_figures(gates, model):
            yield model, name, figure
    yield from course_figures(run) if run else ()
