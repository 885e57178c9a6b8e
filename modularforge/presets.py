"""Tasks that are known by name: the prompt, the response and the metrics of each, a file of YAML in `tasks/presets`."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

from modularforge.yaml_text import parse_yaml

ENDING = ".yaml"
MEASURED = ("metrics", "labels", "answer_mark", "new_tokens")
"""What of a preset says how models are measured; the rest says how records become examples."""


def preset_names() -> list[str]:
    """The names that there are."""
    return sorted(path.name.removesuffix(ENDING) for path in _folder().iterdir() if path.name.endswith(ENDING))


def preset_example(name: str) -> dict[str, Any]:
    """How the records of a preset become examples; raises KeyError for an unknown name."""
    return {key: value for key, value in _preset(name).items() if key not in MEASURED}


def preset_measures(name: str) -> dict[str, Any]:
    """How models are measured on a preset; raises KeyError for an unknown name."""
    return {key: value for key, value in _preset(name).items() if key in MEASURED}


@functools.cache
def _preset(name: str) -> dict[str, Any]:
    if name not in preset_names():
        raise KeyError(name)
    values: dict[str, Any] = parse_yaml((_folder() / f"{name}{ENDING}").read_text(encoding="utf-8"))
    return values


def _folder() -> Any:
    return resources.files("modularforge") / "tasks" / "presets"
