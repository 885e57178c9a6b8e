"""From a YAML file and the command line to a `Config`, with every mistake reported at once.

Later wins: the file, ``--smoke-test``, ``--set key=value``, ``--data-dir`` and ``--output-dir``.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from checkpoints import StoreError, paths
from checkpoints.parsing import parse_object
from modularforge.config import RECORDED_ROUTERS, TRAINED_ON_ALL, ClusterConfig, Config, ModelConfig, router_today
from modularforge.errors import ConfigError
from modularforge.experts import kind
from modularforge.log import logger
from modularforge.mistakes import config_error, shown
from modularforge.other_tools import OURS, tool_of
from modularforge.plugins import entry
from modularforge.presets import preset_names
from modularforge.tasks import task
from modularforge.yaml_text import MAX_BYTES, parse_yaml, to_yaml_text

FOLDER, OWN_NAME, RECORD_NAME = "configs", "config.yaml", "cluster/run.json"
PACKAGED = Path(__file__).resolve().parent / FOLDER
COMMANDS = ("setup", "python", "container", "sbatch_options", "pass_environment", "work_dir")
"""Settings of `cluster` that decide what runs on nodes: never taken from where others may write."""
MOST_PARTS = 8  # settings have three at the most

SMOKE_REPLIES = {"prompts": 3, "new_tokens": 8}
SAMPLE_DOMAINS = ("c_code", "english_novels", "french_novels", "law", "standards")
SMOKE_PHASE = {"batch_size": 4, "accumulation_steps": 1, "warmup_steps": 2, "peak_learning_rate": 1e-3}
SMOKE_TEST: dict[str, Any] = {
    "data": {"vocab_size": 512, "max_documents_per_source": 20, "tokenizer_sample_bytes": 200_000},
    "model": {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_width": 88, "context_length": 64},
    "training": {"log_every": 5, "validate_every": 20, "validation_tokens": 2048, "checkpoint_every": 10},
    "backbone": {"steps": 20, **SMOKE_PHASE},
    "experts": {"count": len(SAMPLE_DOMAINS), "steps": 10, "statistics_tokens": 4096, **SMOKE_PHASE},
    **{name: {"batch_size": None} for name in TRAINED_ON_ALL},
    "btx": {"batch_size": None, "steps": 5},
    "calibration": {"steps": 5, **SMOKE_PHASE},
    "evaluation": {"tokens_per_domain": 2048, "sample_tokens": 8, "chat": None, "harness": None},
}
"""What ``--smoke-test`` changes: the same path at a size that ends within a minute."""


SMOKE_SPEECH: dict[str, Any] = {
    "partition": {"method": "random"},
    "training": {"validate_every": 10},
    "experts": {"count": 2, "statistics_tokens": 2000},
    "evaluation": {"baselines": ["dense", "joint"]},
    "speech": {
        "data": {
            "audio_field": "audio",
            "prompt_field": None,
            "split_field": "split",
            "features": "whisper",
            "bins": 80,
        },
        "model": {"encoder": None, "encoder_width": 32, "encoder_layers": 2, "projector_width": 32, "pool_layer": None},
        "decoding": {"max_tokens": 4, "max_utterances": 10},
    },
}
"""The same of the task `speech`, put over it."""
SAMPLE_SPEECH = [{"name": "digits", "train": "sample:speech/digits.tar.xz"}]
"""The speech in the package, as `data.sources`."""


def sample_sources() -> list[dict[str, str]]:
    """The corpus in the package, as `data.sources`."""
    splits = ("train", "validation", "test")
    return [{"name": name, **{split: f"sample:{name}/{split}.jsonl.gz" for split in splits}} for name in SAMPLE_DOMAINS]


def sample_tasks() -> list[dict[str, Any]]:
    """The examples in the package, a few dozen of each preset, as `data.sources`."""
    splits = ("train", "validation", "test")
    return [
        {"name": name, "example": {"preset": name}, **{split: f"sample:tasks/{name}/{split}.jsonl" for split in splits}}
        for name in preset_names()
    ]


def load_config(
    path: str,
    overrides: Iterable[str | tuple[str, Any]] = (),
    *,
    smoke_test: bool = False,
    data_dir: str | None = None,
    output_dir: str | None = None,
    asks_for_shape: bool = True,
) -> Config:
    """Read a user's YAML, merge and validate; raises ConfigError with one line per mistake.

    An override is text (`key=value`, the value in YAML), or a name and a value. A pretrained model is asked for its
    shape, unless `asks_for_shape` is false: for commands that only look for a run which has its settings recorded.
    """
    values = read_yaml(path)
    if smoke_test:
        values["model"] = _without_pretrained(values.get("model"))
        _merge(values, SMOKE_TEST)
        is_speech = values.get("task") == "speech"
        if is_speech:
            _merge(values, SMOKE_SPEECH)
        values["data"]["sources"] = SAMPLE_SPEECH if is_speech else sample_sources()
        if values.get("task") == "instruction":
            _take_sample_tasks(values)
        values["output_dir"] = f"{str(values.get('output_dir', 'runs/default')).rstrip('/')}-smoke-test"
        values["data_dir"] = None
    changes = list(overrides)
    for override in changes:
        _merge(values, _change(override))
    origin = _origin(path, changes)
    if data_dir is not None:
        values["data_dir"] = data_dir
    if output_dir is not None:
        values["output_dir"] = output_dir
    if (router := _section(values, "assembly").get("router")) in RECORDED_ROUTERS.values():
        _say_new_name(router)
    config = complete_config(values, origin) if asks_for_shape else make_config(values, origin)
    if asks_for_shape:
        _refuse_experts_without_domain(config, origin)
    # Now, and not when a backbone has been trained for days.
    entry(kind.GROUP, kind.OWN, config.experts.kind, "experts.kind")
    entry(task.GROUP, task.OWN, config.task, "task")
    return config


def _origin(path: str, changes: Iterable[str | tuple[str, Any]]) -> str:
    """Where settings are from, for what is said of mistakes: the file, and the names that a command changed."""
    names = [change.partition("=")[0].strip()[:80] for change in changes if isinstance(change, str)]
    return f"{path} with --set {', '.join(dict.fromkeys(names))}" if names else path


def _refuse_experts_without_domain(config: Config, path: str) -> None:
    """Before the corpus is tokenised, where the sources alone say their labels.

    Recorded settings are not refused: a model that `experts add` has changed may have more experts than sources.
    """
    sources = [source for source in config.data.sources if source.name not in config.partition.everywhere]
    count = config.experts.count
    is_known = not any(source.label_field for source in sources)
    if config.partition.method == "domain" and is_known and count > len(sources):
        raise ConfigError(
            f"{path} has 1 mistake(s):\n  experts.count must be the number of data.sources for partition.method domain "
            f"({len(sources)}), but is {count}; set it to {len(sources)}, or choose another method"
        )


def in_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as an earlier version recorded them, by today's names, so that runs of both can be compared."""
    assembly = _section(values, "assembly")
    old = assembly.get("router")
    now = router_today(old)
    return values if now == old else {**values, "assembly": {**assembly, "router": now}}


@cache  # once for a command, which may read many settings
def _say_new_name(router: str) -> None:
    now = router_today(router)
    logger.warning("assembly.router: %s is called %s now; its old name still works in this version", router, now)


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _take_sample_tasks(values: dict[str, Any]) -> None:
    """As many sources of examples as there are of text, and of some of them replies where replies are asked for."""
    sources = sample_tasks()[: len(SAMPLE_DOMAINS)]
    values["data"]["sources"] = sources
    if values["evaluation"].get("tasks"):
        values["evaluation"]["tasks"] = [{"source": one["name"], **SMOKE_REPLIES} for one in sources]


def _without_pretrained(model: Any) -> Any:
    """Settings of the model for a smoke test, which trains a tiny one of its own."""
    return {} if isinstance(model, Mapping) and model.get("pretrained") else model


def complete_config(values: Mapping[str, Any], origin: str) -> Config:
    """Validate what a user wrote, with the shape of a pretrained model, which is looked up in its files or on the Hub.

    Settings that were resolved before name the whole shape; there is nothing to look up, and nodes of a cluster that
    read them need no network.
    """
    config = make_config(values, origin)
    if config.model.pretrained is None or ModelConfig.model_fields.keys() <= dict(values["model"]).keys():
        return config
    from modularforge.pretrained.shape import with_pretrained_shape

    return make_config(with_pretrained_shape(values, config.model.pretrained), origin)


def make_config(values: Mapping[str, Any], origin: str) -> Config:
    """Validate resolved settings; `origin` names them in the error. Reads no file and asks no network."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        tool = tool_of(values)
        found = f"{origin}, which looks like a config of {tool}," if tool else origin
        raise config_error(error, found, _unknown_name) from None


def read_yaml(path: str) -> dict[str, Any]:
    """A settings file as nested dictionaries: also one of the package, or what the launcher recorded of a run."""
    try:
        if path.endswith(RECORD_NAME):
            return dict(parse_object(paths.read_bytes(path))["config"])
        values = parse_yaml(_read(_shipped(path)))
    except (FileNotFoundError, NotADirectoryError):
        here = Path(FOLDER) if Path(FOLDER).is_dir() else PACKAGED
        there = sorted(f"{FOLDER}/{found.name}" for found in here.glob("*.yaml"))
        near = ", ".join(difflib.get_close_matches(path, there, n=3, cutoff=0.7) or there)
        raise ConfigError(f"{path} must be a YAML file, but does not exist; there is {near}") from None
    except StoreError as error:
        raise ConfigError(f"{path} must be a YAML file, but {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} must be YAML, but is not: {error}; fix that") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} must hold sections such as `data:`, but holds {shown(values)}; see configs/default.yaml"
        )
    return values


def _shipped(path: str) -> str:
    """Where a file is read that the repository and the package call so: here, or in the package."""
    folder, _, name = path.removeprefix("./").rpartition("/")
    is_packaged = folder == FOLDER and not Path(path).exists() and (PACKAGED / name).is_file()
    return str(PACKAGED / name) if is_packaged else path


def settings_of_run(output_dir: str) -> str | None:
    """The settings file that a run has of its own, or the launcher's record of it; None where there is no run yet."""
    places = (paths.join(output_dir, name) for name in (OWN_NAME, RECORD_NAME))
    return next((place for place in places if paths.exists(place)), None)


def usual_commands() -> list[tuple[str, Any]]:
    """Changes for settings of a run on an object store, where others may write: nothing of theirs runs on nodes."""
    usual = ClusterConfig().model_dump()
    return [(f"cluster.{name}", usual[name]) for name in COMMANDS]


def _read(path: str) -> bytes:
    """The content, of which a little more than a settings file may have is enough."""
    # A folder is refused when it is read, and an object store refuses a range of an empty object.
    end = MAX_BYTES + 1 if paths.is_local(path) else min(paths.file_size(path), MAX_BYTES + 1)
    return paths.read_bytes(path, 0, end)


def to_yaml(config: Config) -> str:
    """The resolved settings as YAML; feeding it back gives the same run."""
    return _yaml_of(config.model_dump_json())


@lru_cache(maxsize=8)
def _yaml_of(values: str) -> str:
    """Of settings as JSON: a run writes the same ones behind each of its stages."""
    return to_yaml_text(json.loads(values))


def _change(override: str | tuple[str, Any]) -> dict[str, Any]:
    """`a.b=1` as nested dictionaries; the value is YAML, so lists and null work."""
    name, value = _parse_override(override) if isinstance(override, str) else override
    parts = name.strip().split(".")
    if len(parts) > MOST_PARTS:
        raise ConfigError(
            f"--set must name a setting such as backbone.steps, but names {shown(name)}; write NAME=VALUE"
        )
    for part in reversed(parts):
        value = {part: value}
    return dict(value)


def _parse_override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--set must look like backbone.steps=200, but is {shown(text)}; write NAME=VALUE")
    try:
        return name, parse_yaml(value)
    except ValueError as error:
        raise ConfigError(
            f"--set {shown(name)[1:-1]} must have a YAML value, but has {shown(value)}: {error}; quote it"
        ) from error


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put `changes` over `values`, section by section."""
    for name, change in changes.items():
        if isinstance(change, Mapping) and isinstance(values.get(name), dict):
            _merge(values[name], change)
        else:
            values[name] = dict(change) if isinstance(change, Mapping) else change


def _unknown_name(location: tuple[Any, ...]) -> str:
    """What is wrong with a name that no setting has."""
    section, last = _section_at(location[:-1]), str(location[-1])[:80]
    known = sorted(section.model_fields) if section else []
    here = "".join(f"{part}." for part in location[:-1])
    near = [here + name for name in difflib.get_close_matches(last, known, n=1, cutoff=0.6)]
    elsewhere = [path for path in setting_names(in_lists=False) if path.rsplit(".", 1)[-1] == last]
    meant = [*_of_another_tool(last, here, known), *elsewhere, *near]
    return f"is not a setting; {f'did you mean {meant[0]}?' if meant else 'known here: ' + ', '.join(known)}"


def _of_another_tool(word: str, here: str, known: list[str]) -> list[str]:
    """The setting that another tool calls so: in this section, if it has one of that name."""
    ours = OURS.get(word.lower().replace("-", "_"))
    if ours is None:
        return []
    leaf = ours.rpartition(".")[2]
    return [here + leaf if leaf in known else ours]


def setting_names(section: type[BaseModel] = Config, prefix: str = "", in_lists: bool = True) -> list[str]:
    """Dotted names of all settings, or of those that are no part of an item in a list."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        inner = section_type(field.annotation)
        if inner and not in_lists and _is_list(field.annotation):
            inner = None
        names += setting_names(inner, f"{prefix}{name}.", in_lists) if inner else [prefix + name]
    return names


def _is_list(annotation: Any) -> bool:
    return any(typing.get_origin(part) is list for part in (annotation, *typing.get_args(annotation)))


def _section_at(location: Iterable[Any]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = Config
    for part in location:
        if isinstance(part, str) and section is not None and part in section.model_fields:
            section = section_type(section.model_fields[part].annotation)
    return section


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The section class in an annotation such as `X`, `list[X]` or `X | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        found = (section_type(argument) for argument in typing.get_args(annotation))
        return next((section for section in found if section), None)
    return None
