"""Every setting with its type, default and sentence: for the terminal, for docs/settings.md, and as a JSON schema."""

from __future__ import annotations

import difflib
import json
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from modularforge.config import Config
from modularforge.config_files import section_type
from modularforge.errors import ConfigError
from modularforge.other_tools import OURS

HEAD = """# Settings

Written by `modularforge settings --markdown`. A settings file is YAML in these sections; `--set NAME=VALUE` changes one
for a command, but none in an entry of a list (`data.sources.…`, `experts.lora.phases.…`). What is required in a section
that may be left out is so only where the section is given. `configs/settings.schema.json` is the same for editors:
begin a file with `# yaml-language-server: $schema=settings.schema.json`.
"""

DRAFT = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True)
class Setting:
    """One setting: dotted name, type and default as people write them, and its sentence."""

    name: str
    type: str
    default: str
    sentence: str


def all_settings(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[Setting]:
    """Every setting in the order of the file; those of a list's entries under `list.name`.

    A section that may be left out, or of which there are many, has a row of its own before those in it.
    """
    for name, field in section.model_fields.items():
        inner = section_type(field.annotation)
        if inner is not field.annotation:
            sentence = " ".join((field.description or "").split())
            yield Setting(prefix + name, type_text(field), _default(field), sentence)
        if inner is not None:
            yield from all_settings(inner, f"{prefix}{name}.")


BOUNDS = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}


def type_text(field: FieldInfo) -> str:
    """An annotation in words: `int ≥ 1`, `auto | fp32 | bf16`, `text or null`."""
    kinds = [(type(item).__name__, item) for item in field.metadata]
    bounds = [f"{BOUNDS[kind]} {getattr(item, kind.lower())}" for kind, item in kinds if kind in BOUNDS]
    return " ".join([_words(field.annotation), *filter(None, [", ".join(bounds)])])


def _words(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        # Names that come from a table of another file, such as those of baselines, are in the schema alone.
        listed: list[str] = TypeAdapter[Any](annotation).json_schema().get("enum", [])
        return " | ".join(listed) or _words(inner[0])
    if origin is typing.Literal:
        return " | ".join(str(value) for value in inner)
    if origin in (list, tuple):
        return f"list of {_words(inner[0])}"
    if origin is dict:
        return f"{_words(inner[0])}: {_words(inner[1])}"
    if inner:
        return " or ".join(dict.fromkeys(_words(part) for part in inner))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {str: "text", int: "int", float: "number", bool: "true | false", type(None): "null"}
    return names.get(annotation, str(getattr(annotation, "__name__", annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")


def page(pattern: str | None, as_markdown: bool) -> str:
    """The settings that match, as lines or as Markdown; raises ConfigError when none does.

    A word of another tool that none of ours has is taken for the setting that it means.
    """
    found = _matching(pattern or "") or _matching(OURS.get(pattern or "", pattern or ""))
    if not found:
        leaves = {item.name.rpartition(".")[2] for item in all_settings()}
        near = difflib.get_close_matches((pattern or "").lower(), sorted({*leaves, *OURS}), n=1)
        hint = f"did you mean {near[0]}?" if near else "try less"
        raise ConfigError(
            f"PATTERN must be in the name or the sentence of a setting, but {pattern!r:.60} is in none; {hint}"
        )
    return _markdown(found) if as_markdown else "\n\n".join(map(_lines, found))


def _matching(pattern: str) -> list[Setting]:
    wanted = pattern.lower()
    return [item for item in all_settings() if wanted in f"{item.name} {item.sentence}".lower()]


def _lines(item: Setting) -> str:
    return f"{item.name}  ({item.type}; default {item.default})\n    {item.sentence}"


def _markdown(found: list[Setting]) -> str:
    """A table for each section, so that a heading stands once, whatever is nested between two of its settings."""
    sections: dict[str, list[Setting]] = {}
    for item in found:
        sections.setdefault(item.name.rpartition(".")[0], []).append(item)
    lines = [HEAD]
    for section, items in sections.items():
        lines += ["", f"## {section or 'The run'}", "", "| setting | type | default | |", "|---|---|---|---|"]
        for item in items:
            cells = [f"`{item.name}`", item.type, f"`{item.default}`", item.sentence]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def schema() -> str:
    """The JSON schema of a settings file."""
    return json.dumps({"$schema": DRAFT, **_portable(Config.model_json_schema())}, indent=1)


def _portable(value: Any) -> Any:
    """Without the patterns of Unicode classes, which not every validator's regular expressions know."""
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items() if key != "pattern" or r"\p{" not in str(item)}
    return [_portable(item) for item in value] if isinstance(value, list) else value
