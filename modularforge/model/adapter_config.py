"""`adapter_config.json` as PEFT writes and reads it, and what of it our adapters compute; needs no torch.

Fields that are left out have PEFT's defaults, so that versions that know fewer or more of them read the file alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from checkpoints.parsing import parse_object
from modularforge.config import MODULES, LoraConfig
from modularforge.errors import DataError, one_line

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MUST_BE: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    **dict.fromkeys(("fan_in_fan_out", "use_dora", "use_qalora", "lora_bias"), (False, None)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ({}, None)),
    **dict.fromkeys(
        ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters"), (None, [])
    ),
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
        numbers = int(values["r"]), float(values["lora_alpha"])
        if numbers[0] < 1 or not math.isfinite(numbers[1]):
            raise ValueError(f"its r and lora_alpha are {numbers[0]} and {numbers[1]}")
        return AdapterShape(*numbers, modules, float(values.get("lora_dropout") or 0.0), bool(values.get("use_rslora")))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{origin} must be that of a plain LoRA adapter of PEFT, but is not ({one_line(error)}); choose another "
            "adapter, or train it without such options"
        ) from error
