"""What lies beside adapters, and what of it ours compute; needs no torch.

PEFT's `adapter_config.json` is of one adapter; our `adapters.json` says of a model with several where they are and how
a text chooses among them.

Fields that are left out have PEFT's defaults, so that versions that know fewer or more of them read the file alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from checkpoints.parsing import parse_object
from modularforge.config import MODULES, LoraConfig
from modularforge.errors import DataError, MismatchError, one_line
from modularforge.model import names

Item = TypeVar("Item")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTERS_NAME, ADAPTERS_FOLDER = "adapters.json", "adapters"
COMPOSITE_FORMAT = 1
CHOICES = ("token", "sequence", None)
MUST_BE: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    **dict.fromkeys(("fan_in_fan_out", "use_dora", "use_qalora", "lora_bias"), (False, None)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ({}, None)),
    **dict.fromkeys(
        ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters"), (None, [])
    ),
    # Others (PiSSA, OLoRA, LoftQ …) change the base's weights when PEFT loads them.
    "init_lora_weights": (False, "gaussian", "orthogonal", "eva", None, True),
    **dict.fromkeys(("alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "velora_config"), (None,)),
}
"""What changes what an adapter computes, with the values under which ours computes the same."""


@dataclass(frozen=True)
class AdapterShape:
    """What an adapter's weights do not tell: matrices, rank, and the factors of what it adds."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        """What the product of both matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def with_rank(self, rank: int) -> AdapterShape:
        """The shape of another rank that multiplies by the same."""
        alpha = self.scale * (math.sqrt(rank) if self.rslora else rank)
        return AdapterShape(rank, alpha, self.modules, self.dropout, self.rslora)


@dataclass(frozen=True)
class Composite:
    """Adapters beside one backbone.

    `folders` are those of the adapters, inside the model's. A token visits `active` slots, of which the first is the
    backbone alone where it is `public`; they are chosen for each `token`, once for a `sequence`, or (None) always all.
    """

    folders: tuple[str, ...]
    active: int
    public: bool
    choice: str | None

    @property
    def slots(self) -> int:
        """Adapters, and the backbone alone where it can be chosen."""
        return len(self.folders) + int(self.public)

    def blocks_visited(self, has_mlp: bool) -> int:
        """How often a token runs a feed-forward block: for each slot, where adapters stand in such blocks."""
        return self.active if has_mlp and self.choice is not None else 1


def shape_of(lora: LoraConfig) -> AdapterShape:
    """The shape that the settings ask for."""
    return AdapterShape(lora.rank, lora.alpha, lora.modules, lora.dropout, lora.rslora)


def adapter_config(shape: AdapterShape, base: str | None) -> dict[str, Any]:
    """adapter_config.json of an adapter; `base` is the base model's name on the Hub, where it has one."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": shape.rank,
        "lora_alpha": int(shape.alpha) if float(shape.alpha).is_integer() else shape.alpha,
        "lora_dropout": shape.dropout,
        "target_modules": list(shape.modules),
        "use_rslora": shape.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def parse_adapter_config(content: bytes, origin: str) -> AdapterShape:
    """The shape in the bytes of an adapter_config.json; raises DataError for an adapter that ours cannot compute."""
    try:
        values = parse_object(content)
        for name, allowed in MUST_BE.items():
            if values.get(name, allowed[-1]) not in allowed:
                raise ValueError(f"its {name} is {values.get(name)!r:.60}")
        targets = values["target_modules"]
        modules = tuple(name for name in MODULES if name in targets) if isinstance(targets, list) else ()
        if type(values["r"]) is not int or type(values.get("use_rslora", False)) not in (bool, type(None)):
            raise ValueError(f"its r is {values['r']!r:.40} and its use_rslora {values.get('use_rslora')!r:.40}")
        numbers = values["r"], float(values["lora_alpha"])
        if numbers[0] < 1 or not math.isfinite(numbers[1]):
            raise ValueError(f"its r and lora_alpha are {numbers[0]} and {numbers[1]}")
        return AdapterShape(*numbers, modules, float(values.get("lora_dropout") or 0.0), bool(values.get("use_rslora")))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{origin} must be that of a plain LoRA adapter of PEFT, but is not ({one_line(error)}); choose another "
            "adapter, or train it without such options"
        ) from error


def composite_json(composite: Composite) -> dict[str, Any]:
    """adapters.json of a model with adapters."""
    return {
        "format": COMPOSITE_FORMAT,
        "adapters": list(composite.folders),
        "experts_per_token": composite.active,
        "backbone_alone": composite.public,
        "choice": composite.choice,
    }


def parse_composite(content: bytes, origin: str) -> Composite:
    """What the bytes of an adapters.json say; raises DataError."""
    try:
        values = parse_object(content)
        if values.get("format") != COMPOSITE_FORMAT:
            raise ValueError(f"its format is {values.get('format')!r:.20}, not {COMPOSITE_FORMAT}")
        folders = [inner_path(folder) for folder in values["adapters"]]
        found = Composite(
            tuple(folders), int(values["experts_per_token"]), values["backbone_alone"] is True, values["choice"]
        )
        if found.choice not in CHOICES or not 1 <= found.active <= found.slots:
            raise ValueError("its choice or number of experts is none of a model's")
        if found.choice is None and len(folders) != 1:
            raise ValueError("several adapters are always visited")
        return found
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{origin} must say which adapters a model has, but does not ({one_line(error)}); assemble the model again"
        ) from error


def inner_path(folder: Any) -> str:
    """The name of a folder inside a model's; raises ValueError for one that leads out of it."""
    if not isinstance(folder, str) or not all(part.strip(".") for part in folder.split("/")) or "\\" in folder:
        raise ValueError(f"{folder!r:.60} is no folder inside it")
    return folder


def paired(tensors: Mapping[str, Item], origin: str) -> dict[str, tuple[Item, Item]]:
    """A and B of an adapter by the name of the backbone's matrix, in order of names; raises MismatchError.

    `tensors` are by the names that PEFT gave them.
    """
    found: dict[str, dict[str, Item]] = {}
    for stored, tensor in sorted(tensors.items()):
        place = names.adapted(stored)
        if place is None:
            raise MismatchError(
                f"{origin} must hold A and B of adapters on projections of a decoder, but has {stored:.80}; choose an "
                "adapter of the backbone that the run has"
            )
        found.setdefault(place[0], {})[place[1]] = tensor
    for name, pair in found.items():
        if len(pair) < 2:
            raise MismatchError(f"{origin} must hold A and B of every adapter, but has one for {name}; save it again")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def check_fits(
    origin: str, name: str, a: tuple[int, ...], b: tuple[int, ...], matrix: tuple[int, ...] | None, rank: int
) -> None:
    """Raise MismatchError unless A [R, I] and B [O, R] of an adapter stand beside a matrix [O, I]."""
    if matrix is not None and (tuple(a), tuple(b)) == ((rank, matrix[1]), (matrix[0], rank)):
        return
    there = "has no such matrix" if matrix is None else f"has {tuple(matrix)}"
    raise MismatchError(
        f"{origin} must be an adapter of rank {rank} for this backbone, but for {name} it has {tuple(b)} times "
        f"{tuple(a)}, and the backbone {there}; use the model that the adapter was trained on"
    )
