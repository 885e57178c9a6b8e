"""The study file: which recipes are trained, which variants of them are measured, and over which seeds.

It is YAML, strict like the settings. A list among a variant's settings stands for a grid: one variant for each entry.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from checkpoints.screen import shown_command
from modularforge.config import TRAINED_ON_ALL, Section, Text
from modularforge.config_files import read_yaml
from modularforge.errors import ConfigError
from modularforge.mistakes import config_error

Kind = Literal[
    "backbone",
    "dense",
    "dense_wide",
    "soup",
    "experts",
    "ensemble_uniform",
    "ensemble_posterior",
    "joint",
    "joint_evidence",
    "joint_lora",
    "joint_lora_wide",
    "btx",
    "btx_trained",
    "assembled",
]
# The stage whose artifacts a kind of variant is made of besides the backbone.
NEEDS: dict[str, str | None] = {
    "backbone": None,
    **{name: name for name in TRAINED_ON_ALL},
    "btx": "branch",
    "btx_trained": "btx",
    "soup": "expert",
    "experts": "expert",
    "ensemble_uniform": "expert",
    "ensemble_posterior": "expert",
    "assembled": "expert",
}
ROUTED = ("assembled", "btx")
# Kinds that an option is for, and what the others lack.
ONLY_FOR = {
    "calibrate": ((*ROUTED, "joint"), "which has no router"),
    "carry": (("assembled", "joint_evidence"), "which reads no text to route"),
    "removal": ((*ROUTED, "joint"), "which has no router"),
}
OPEN_SECTIONS = ("assembly.", "calibration.", "steering.routing")
MOST_IN_GRID = 1000  # more is a slip in a list, and would be measured for days
NAME = re.compile(r"[A-Za-z0-9_.-]+")
OTHER = re.compile(r"[^A-Za-z0-9_.-]+")


class VariantEntry(Section):
    """One kind of model, or a grid of them, measured in every recipe that it names."""

    kind: Kind
    """What is measured: a baseline, the experts with their oracle, an output ensemble, or an assembled model."""
    recipe: Text | list[Text] | None = None
    """Name of the recipe whose models it uses, or a list; null is the first one."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings of `assembly` and `calibration` by dotted name; a list is a grid."""
    calibrate: bool = False
    """Calibrate the model as `calibration` says and keep the result only if the selection half improves."""
    removal: bool = False
    """Also measure what the removal of each expert changes."""
    without: bool = False
    """Also measure each domain with a model that is assembled from all experts but its own."""
    carry: bool = False
    """Also measure the text with a text router that goes on from window to window of a document."""
    final: bool = True
    """Measured on the test split too."""
    seeds: list[int] | None = None
    """Seeds of the study with which it is measured; null is all."""


class StudyFile(Section):
    """A study."""

    name: Text
    """Title of the table."""
    base: Text
    """Settings file that everything starts from."""
    output_dir: Text
    """Root of the study: a folder or URL."""
    seeds: list[int] = Field([0], min_length=1)
    """Seeds of the runs; they share data and tokenizer, which are prepared with the first."""
    validation_tokens_per_domain: int = Field(20_000, ge=1)
    """Tokens of each domain's selection half of validation at the most."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings of all recipes by dotted name."""
    recipes: dict[str, dict[str, Any]] = Field(min_length=1)
    """What is trained: settings by dotted name; each recipe and seed is a run folder of its own."""
    variants: dict[str, VariantEntry] = Field(min_length=1)
    """What is measured, by name."""
    reference: Text | None = None
    """Recipe whose backbone, dense model and oracle those with the same tokens are compared with; null is the first."""
    texts: dict[Literal["validation", "test"], list[Text]] = Field(default_factory=dict)
    """Files of text of no domain that every variant is measured on besides, by split."""
    compare: list[Text] | None = None
    """Variants that each row is compared with, document by document; null is backbone, dense and joint."""

    @model_validator(mode="after")
    def _names(self) -> StudyFile:
        problems = list(_problems(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


@dataclass(frozen=True)
class Variant:
    """One model to measure; `entry` is its name in the file, `settings` lie on top of its recipe's."""

    name: str
    entry: str
    options: VariantEntry
    recipe: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]

    @property
    def kind(self) -> Kind:
        """What is measured."""
        return self.options.kind


def load_study(path: str, output_dir: str | None = None) -> StudyFile:
    """Read and validate a study file; raises ConfigError with one line per mistake."""
    values = read_yaml(path)
    if not {"base", "recipes", "variants"} & values.keys():
        raise ConfigError(
            f"{path} must be a study file, with base, recipes and variants, but holds the settings of one run; start "
            f"that with `{shown_command('modularforge', 'run-all', '--config', path)}`, or see docs/study.md"
        )
    if output_dir is not None:
        values["output_dir"] = output_dir
    try:
        return StudyFile.model_validate(values)
    except ValidationError as error:
        raise config_error(error, path, lambda _: "is no part of a study file; see docs/study.md") from None


def variants_of(study: StudyFile) -> list[Variant]:
    """All variants with their grids and recipes spelt out, in the order of the file."""
    found: list[Variant] = []
    for name, entry in study.variants.items():
        recipes = _recipes(study, entry)
        for recipe, (ending, settings) in itertools.product(recipes, _grid(entry.set)):
            full = "-".join([*([recipe] if isinstance(entry.recipe, list) else []), name, *ending])
            found.append(Variant(full, name, entry, recipe, settings, tuple(entry.seeds or study.seeds)))
    return found


def reference_of(study: StudyFile) -> str:
    """The recipe that others are compared with."""
    return study.reference or next(iter(study.recipes))


def _recipes(study: StudyFile, entry: VariantEntry) -> list[str]:
    if entry.recipe is None:
        return [next(iter(study.recipes))]
    return entry.recipe if isinstance(entry.recipe, list) else [entry.recipe]


def _grid(settings: dict[str, Any]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Each combination of the lists, with the words that tell it from the others."""
    lists = {name: value for name, value in settings.items() if isinstance(value, list)}
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        words = [OTHER.sub("_", f"{name.rsplit('.', 1)[-1]}_{value}").lower() for name, value in chosen.items()]
        yield words, {**settings, **chosen}


def _problems(study: StudyFile) -> Iterator[str]:
    """One sentence per mistake that the types alone do not show."""
    known = ", ".join(study.recipes)
    for name in (*study.recipes, *study.variants):
        if not NAME.fullmatch(name) or not name.strip("."):
            yield f"{name!r:.80} must be letters, digits, dots, dashes and underscores, as it names a folder; rename it"
    if study.reference is not None and study.reference not in study.recipes:
        yield f"reference must be one of the recipes ({known}), but is {study.reference}; choose one of these"
    for name, entry in study.variants.items():
        for recipe in _recipes(study, entry):
            if recipe not in study.recipes:
                yield f"variants.{name}.recipe must be one of the recipes ({known}), but is {recipe}; choose one"
        if unknown := sorted(set(entry.seeds or ()) - set(study.seeds)):
            yield f"variants.{name}.seeds must be among the study's ({study.seeds}), but has {unknown[0]}; add it there"
        if (count := math.prod(len(value) for value in entry.set.values() if isinstance(value, list))) > MOST_IN_GRID:
            yield f"variants.{name}.set must stand for at most {MOST_IN_GRID} variants, but does for {count}; divide it"
        if entry.set and entry.kind not in ROUTED:
            yield f"variants.{name}.set must be empty for kind {entry.kind}; put its settings into a recipe"
        for setting in entry.set:
            if not setting.startswith(OPEN_SECTIONS):
                yield (
                    f"variants.{name}.set must name settings of assembly or calibration, but names {setting}; "
                    "what changes training belongs into a recipe"
                )
        if entry.without and (entry.kind != "assembled" or entry.calibrate):
            yield f"variants.{name}.without must be false but for kind assembled without calibrate; remove it"
        for option, (kinds, why) in ONLY_FOR.items():
            if getattr(entry, option) and entry.kind not in kinds:
                yield f"variants.{name}.{option} must be false for kind {entry.kind}, {why}; remove it"
