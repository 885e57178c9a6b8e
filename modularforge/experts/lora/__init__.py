"""Experts that are LoRA adapters: a few low-rank matrices beside a frozen backbone, in PEFT's format."""

from modularforge.experts.kind import Kind
from modularforge.model.adapter_config import ADAPTER_WEIGHTS

LORA = Kind(
    "lora", "experts.lora", ADAPTER_WEIGHTS, "modularforge.experts.lora.training", "modularforge.experts.lora.merging"
)
