"""Experts that are feed-forward blocks: one per layer beside the backbone's own, merged into a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints import Artifact
from modularforge.config import CalibrationConfig, Config
from modularforge.model import names

if TYPE_CHECKING:
    from torch import nn

    from modularforge.artifacts import Backbone
    from modularforge.assembly.parts import Merged
    from modularforge.experts.kind import ExpertJob
    from modularforge.experts.trainable import Trainable
    from modularforge.model.backbone import Decoder

EXPERT_NAME = "expert.safetensors"


class FfnKind:
    """The kind `ffn`; `experts/kind.py` says what each method answers. Imports are late: planning needs no torch."""

    name, settings, weights_name = "ffn", "experts", EXPERT_NAME

    def prepare(self, expert: ExpertJob) -> Trainable:
        """The new FFN, and its router rows when it is anchored."""
        from modularforge.experts.ffn.training import prepare

        return prepare(expert)

    def save(self, expert: ExpertJob, model: nn.Module, folder: Path) -> dict[str, Any]:
        """Weights, router rows, statistics and counts."""
        from modularforge.experts.ffn.training import save

        return save(expert, model, folder)

    def load(self, backbone: Backbone, artifact: Artifact) -> Decoder:
        """The backbone with this FFN, beside its own when the expert is anchored."""
        from modularforge.experts.ffn.training import load

        return load(backbone, artifact)

    def freezes(self, name: str) -> bool:
        """Embeddings, attention, norms, head."""
        return names.is_shared(name)

    def merge(self, config: Config, backbone: Artifact, experts: Sequence[Artifact], scratch: Path) -> Merged:
        """Mixtral, or Qwen3-MoE, with the experts' FFNs and solved routers."""
        from modularforge.experts.ffn.merging import merge

        return merge(config, backbone, experts, scratch)

    def part_of(self, name: str) -> str:
        """A file for the backbone, one for each expert, one for the routers."""
        position = names.expert_position(name)
        if position:
            return f"expert-{position[1]:03d}.safetensors"
        return "router.safetensors" if names.is_gate(name) else "backbone.safetensors"

    def calibrates(self, model: Decoder, settings: CalibrationConfig) -> Mapping[str, nn.Parameter]:
        """Norm gains, and router rows where they route."""
        from modularforge.experts.ffn.training import calibrates

        return calibrates(model, settings)


FFN = FfnKind()
