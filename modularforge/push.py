"""Hand a model on: as a GGUF file, or to the Hub with a card of its licence, measured figures and origin.

What the store needs (manifests, results of a calibration) stays here. Figures are those of the run's evaluation, and
only where it measured the very model that is uploaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from checkpoints import Artifact, find_artifact, paths
from checkpoints.markdown import plain
from checkpoints.screen import say
from modularforge.assembly.card import CARD_NAME
from modularforge.config import Config
from modularforge.cost import size
from modularforge.errors import DataError
from modularforge.evaluation.results import parse_results
from modularforge.experts.kind import KIND_FACT
from modularforge.log import logger
from modularforge.model.hub_config import (
    CONFIG_NAME,
    GENERATION_NAME,
    OWN_ROWS_NAME,
    TABLES_NAME,
    TOKENIZER_FILES,
    read_config,
    read_values,
)
from modularforge.model.supported import SPEECH_TYPE
from modularforge.observe.evaluation import Results, model_table, verdict
from modularforge.pretrained.gguf_out import KINDS, write_gguf
from modularforge.pretrained.hub import Upload, upload
from modularforge.pretrained.sources import HubName, hub_name, is_gguf
from modularforge.run import Run
from modularforge.stages.evaluate import RESULTS_NAME, chosen_model
from modularforge.stages.push_speech import published

SCHEME = "hf://"
PUBLISHED = (
    CONFIG_NAME, GENERATION_NAME, TABLES_NAME, OWN_ROWS_NAME, "*.safetensors", "*.safetensors.index.json",
    *TOKENIZER_FILES,
)  # fmt: skip
FENCE = "---\n"


@dataclass(frozen=True)
class Model:
    """A model folder on this machine, and what its run measured of it, if anything."""

    folder: Path
    name: str
    results: Results | None = None
    row: str = ""


def push(
    load_settings: Callable[[], Config],
    target: str,
    model: str | None = None,
    licence: str | None = None,
    is_private: bool = False,
    is_dry: bool = False,
) -> None:
    """Upload a model folder, or the run's best model, to `hf://owner/name` or `owner/name@revision`.

    Of speech the trained part alone goes there, or an expert's (`push_speech.py`). A dry run says what would go there
    and shows the card, and asks the Hub nothing. Raises DataError, StoreError.
    """
    name = _target(target)
    if _is_of_speech(load_settings, model):
        with published(load_settings, name, model, licence) as trained:
            _send(name, trained, licence, is_private, is_dry)
        return
    found = _folder(model) if model else _of_run(chosen_model(Run(load_settings())))
    files: dict[str, Upload] = {path.name: path for path in sorted(_published(found.folder))}
    files[CARD_NAME] = card(found, licence).encode()
    if found.results is None:
        logger.warning("the card has no figures: no evaluation of a run beside it measured this very model")
    _send(name, files, licence, is_private, is_dry)


def export(load_settings: Callable[[], Config], path: str, model: str | None, kind: str | None) -> None:
    """Write a model folder, or the run's best model, as a GGUF file of this machine; raises ConfigError, DataError."""
    wanted = kind.upper() if kind else None
    if not is_gguf(path) or not paths.is_local(path) or wanted not in (None, *KINDS):
        raise DataError(
            f"export must write a file of this machine that ends in .gguf, as {', '.join(KINDS)}, but was asked for "
            f"{path} as {kind or 'it is stored'}; name another file or --type"
        )
    found = _folder(model) if model else _of_run(chosen_model(Run(load_settings())))
    write_gguf(found.folder, paths.local_path(path), wanted)
    say(f"written: {path}, {size(paths.file_size(path))}")


def _send(name: HubName, files: Mapping[str, Upload], licence: str | None, is_private: bool, is_dry: bool) -> None:
    if licence is None:
        logger.warning("the card names no licence, so nobody may use the model; say it with --licence, as apache-2.0")
    if is_dry:
        words = files[CARD_NAME]
        assert isinstance(words, bytes)
        say("\n".join([*_listing(name, files, is_private), "", words.decode().rstrip()]))
        return
    say(f"uploaded: {upload(name, files, is_private)}")


def _target(target: str) -> HubName:
    name = hub_name(target.removeprefix(SCHEME))
    if "/" not in name.repository:
        raise DataError(f"a place on the Hub must be hf://owner/name, but is {target!r:.80}; name the owner too")
    return name


def _is_of_speech(load_settings: Callable[[], Config], model: str | None) -> bool:
    """Whether a model, or the run's where none is named, is of speech, of which the trained part alone goes there."""
    if model is None:
        return load_settings().task == "speech"
    artifact = find_artifact(model)
    if artifact is not None and artifact.manifest.kind == "expert":
        return artifact.manifest.facts.get(KIND_FACT) == "steering"
    if artifact is not None:
        values = artifact.read_json(CONFIG_NAME) if CONFIG_NAME in artifact.manifest.files else {}
        return values.get("model_type") == SPEECH_TYPE
    if not paths.is_local(model) or not (file := Path(paths.local_path(model)) / CONFIG_NAME).is_file():
        return False
    return read_values(file.parent).get("model_type") == SPEECH_TYPE


def _folder(model: str) -> Model:
    artifact = find_artifact(model)
    if artifact is not None:
        return _of_run(artifact)
    folder = paths.local_path(model) if paths.is_local(model) else None
    if folder is None or not folder.is_dir():
        raise DataError(
            f"--model must be a model folder or an artifact of a run, but {model} is neither; fix the place"
        )
    return Model(folder, folder.resolve().name)


def _of_run(artifact: Artifact) -> Model:
    """An artifact's folder, with the figures of the evaluation that lies beside it if they are of this artifact."""
    run, kind = artifact.url.rstrip("/").rpartition("/")[0], artifact.manifest.kind
    folder, name = artifact.local_folder(), run.rpartition("/")[2] or kind
    evaluation = find_artifact(paths.join(run, "evaluation"))
    if evaluation is None or evaluation.manifest.inputs.get(kind) != artifact.manifest.fingerprint:
        return Model(folder, name)
    results = parse_results(evaluation.read_bytes(RESULTS_NAME), evaluation.url)
    return Model(folder, name, results, kind) if kind in results["models"] else Model(folder, name)


def _published(folder: Path) -> Iterator[Path]:
    """The files of a model that others need; raises DataError where it is none that transformers reads."""
    read_config(folder)
    for path in folder.iterdir():
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in PUBLISHED):
            yield path


def _listing(name: HubName, files: Mapping[str, Upload], is_private: bool) -> Iterator[str]:
    sizes = {file: len(one) if isinstance(one, bytes) else one.stat().st_size for file, one in files.items()}
    kind = "private, if it is new" if is_private else "as its owner has new ones"
    yield f"would upload to {name.repository} at {name.revision} ({kind}), {size(sum(sizes.values()))}:"
    yield from (f"  {file}  {size(count)}" for file, count in sizes.items())


def card(model: Model, licence: str | None) -> str:
    """The model's own card, or a short one, with licence and measured figures as the Hub reads them, and in words."""
    there = model.folder / CARD_NAME
    head, body = _split(there.read_text(encoding="utf-8")) if there.is_file() else ({}, f"# {plain(model.name)}\n")
    head |= {"license": licence} if licence else {}
    head |= {"model-index": [_index(model.name, model.row, model.results)]} if model.results else {}
    written = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=math.inf)
    return f"{FENCE}{written}{FENCE}\n{body.rstrip()}\n" + (_measured(model.results) if model.results else "")


def _split(text: str) -> tuple[dict[str, Any], str]:
    """The front matter of a card, and what is below it."""
    if not text.startswith(FENCE):
        return {}, text
    head, _, body = text.removeprefix(FENCE).partition(f"\n{FENCE}")
    values = yaml.safe_load(head)
    return (values, body.lstrip()) if isinstance(values, dict) else ({}, text)


def _index(name: str, row: str, results: Results) -> dict[str, Any]:
    """The figures of one model for the Hub (https://huggingface.co/docs/hub/model-cards, `model-index`)."""
    found = results["models"][row]
    domains = [(f"{label}, test split", label, found["domains"][label]) for label in results["domains"]]
    everything = ("all domains alike, test split", "modularforge", found)
    return {
        "name": name,
        "results": [
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": title, "type": kind, "split": "test"},
                "metrics": [
                    {"type": metric, "name": metric.replace("_", " "), "value": round(float(values[metric]), 4)}
                    for metric in ("perplexity", "bits_per_byte")
                    if math.isfinite(float(values[metric]))
                ],
            }
            for title, kind, values in (*domains, everything)
        ],
    }


def _measured(results: Results) -> str:
    words = (
        "Perplexity on the held-out test split of its own domains, lower is better; domains weigh alike in the means."
    )
    return "\n".join(
        ["\n## Measured", "", plain(verdict(results)), "", words, "", *model_table(results).markdown(), ""]
    )
