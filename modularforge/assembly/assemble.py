"""Put the parts of a model together: check that they belong together, let their kind plan, move bytes, describe.

Works on committed artifacts of any store and needs no torch. What becomes of which bytes is for the kind of the experts
to say (`experts/kind.py`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from checkpoints import Artifact, ArtifactWriter
from checkpoints.artifact import check_sizes
from checkpoints.safetensors import WEIGHTS_NAME
from modularforge.assembly import parts
from modularforge.assembly.card import CARD_NAME, copy_text_files, model_card
from modularforge.config import Config
from modularforge.errors import MismatchError
from modularforge.experts.kind import KIND_FACT, Kind, common_kind, frozen_hashes
from modularforge.facts import fact
from modularforge.model.hub_config import CONFIG_NAME, write_json


def assemble(
    config: Config, backbone: Artifact, experts: list[Artifact], writer: ArtifactWriter, old: Artifact | None = None
) -> dict[str, Any]:
    """Write the model's files; returns facts for the manifest.

    `old` is an assembled model whose parts are taken over where they are the same. Raises MismatchError when an expert
    does not belong, and CorruptArtifactError for a damaged file.
    """
    kind = common_kind(config, experts)
    check_parts(kind, backbone, experts)
    with tempfile.TemporaryDirectory() as scratch:
        merged = kind.merge(config, backbone, experts, Path(scratch))
        old_parts = parts.parts_of(old) if old else {}
        sources, limit = {**old_parts, **merged.sources}, config.assembly.max_shard_bytes
        facts = parts.write_weights(merged.tensors, merged.part_of, sources, writer, config.assembly.mode, limit)
    write_json(writer.folder / CONFIG_NAME, dict(merged.config))
    copy_text_files(backbone, writer.folder)
    facts |= {**merged.write_files(writer.folder), **merged.facts, KIND_FACT: kind.name, **_origin(backbone, experts)}
    card = model_card(config, backbone, experts, facts, merged.summary, merged.loading)
    (writer.folder / CARD_NAME).write_text(card, encoding="utf-8")
    return facts


def check_parts(kind: Kind, backbone: Artifact, experts: list[Artifact]) -> None:
    """Raise MismatchError with names, or CorruptArtifactError for a truncated file."""
    check_sizes([backbone, *experts])
    check_same_backbone(kind, backbone, experts)
    _check_no_duplicates(kind, experts)


def check_same_backbone(kind: Kind, backbone: Artifact, experts: list[Artifact]) -> None:
    """Every expert must have been trained on the very tensors that this backbone shares."""
    shared = frozen_hashes(kind, backbone, WEIGHTS_NAME)
    for expert in experts:
        recorded = fact(expert, "shared_tensors")
        different = sorted(name for name in {*shared, *recorded} if shared.get(name) != recorded.get(name))
        if different:
            raise MismatchError(
                f"{expert.url} must have been trained on the backbone {backbone.url}, but {len(different)} shared "
                f"tensors differ (first {different[0]}); train it again on this backbone"
            )


def _check_no_duplicates(kind: Kind, experts: list[Artifact]) -> None:
    seen: dict[str, str] = {}
    for expert in experts:
        identity = expert.entry(kind.weights_name).digest
        if identity in seen:
            raise MismatchError(
                f"each slot must hold another expert, but {expert.url} is the same one as {seen[identity]}; "
                "name it once"
            )
        seen[identity] = expert.url


def _origin(backbone: Artifact, experts: list[Artifact]) -> dict[str, Any]:
    """What the model was made from, so that its experts can be exchanged."""
    return {
        "members": [
            {
                "index": fact(item, "index"),
                "url": item.url,
                "fingerprint": item.manifest.fingerprint,
                "domains": fact(item, "domains", []),
            }
            for item in experts
        ],
        "backbone": {"url": backbone.url, "fingerprint": backbone.manifest.fingerprint},
    }
