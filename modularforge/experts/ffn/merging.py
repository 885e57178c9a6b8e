"""How FFN experts become one mixture of experts; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from checkpoints import Artifact
from modularforge.assembly.parts import Merged, Source, whole_file
from modularforge.assembly.plan import spans_of_each
from modularforge.config import Config
from modularforge.experts.ffn import EXPERT_NAME
from modularforge.experts.mixture import Mixture
from modularforge.experts.mixture import part_of as part_of
from modularforge.model import names


def merge(config: Config, backbone: Artifact, experts: Sequence[Artifact], scratch: Path) -> Merged:
    """The mixture of these experts; new values are written to files in `scratch`."""
    spans = spans_of_each(experts, EXPERT_NAME)
    sources: dict[str, Source] = {}
    for expert, own in zip(experts, spans, strict=True):
        sources |= whole_file(expert, EXPERT_NAME, own)
    return Mixture(config, backbone, list(experts), spans).merged(scratch, sources)


def freezes(name: str) -> bool:
    """Embeddings, attention, norms, head."""
    return names.is_shared(name)
