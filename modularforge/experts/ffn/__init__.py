"""Experts that are feed-forward blocks: one per layer beside the backbone's own, merged into a mixture of experts."""

from modularforge.experts.kind import Kind

EXPERT_NAME = "expert.safetensors"
FFN = Kind("ffn", "experts", EXPERT_NAME, "modularforge.experts.ffn.training", "modularforge.experts.ffn.merging")
