"""What must be true of backbone and experts before a byte is moved."""

from __future__ import annotations

from checkpoints import Artifact
from checkpoints.safetensors import WEIGHTS_NAME
from checkpoints.streams import check_size
from modularforge.assembly.statistics import EXPERT_NAME
from modularforge.config import Config
from modularforge.errors import ConfigError, MismatchError
from modularforge.facts import fact
from modularforge.model import names


def check_parts(config: Config, backbone: Artifact, experts: list[Artifact]) -> None:
    """Raise MismatchError or ConfigError with names, or CorruptArtifactError for a truncated file."""
    for artifact in (backbone, *experts):
        for name, entry in artifact.manifest.files.items():
            check_size(artifact.file_url(name), entry)
    check_same_backbone(backbone, experts)
    _check_no_duplicates(experts)
    count, active = len(experts) + int(config.has_public_expert), config.assembly.experts_per_token
    if active > count and config.assembly.router != "uniform":
        raise ConfigError(f"assembly.experts_per_token must be at most {count}, but is {active}; lower it")


def check_same_backbone(backbone: Artifact, experts: list[Artifact]) -> None:
    """Every expert must have been trained on the very tensors that this backbone shares."""
    hashes = backbone.entry(WEIGHTS_NAME).tensors
    shared = {name: digest for name, digest in hashes.items() if names.is_shared(name)}
    for expert in experts:
        recorded = fact(expert, "shared_tensors")
        different = sorted(name for name in {*shared, *recorded} if shared.get(name) != recorded.get(name))
        if different:
            raise MismatchError(
                f"{expert.url} must have been trained on the backbone {backbone.url}, but {len(different)} shared "
                f"tensors differ (first {different[0]}); train it again on this backbone"
            )


def _check_no_duplicates(experts: list[Artifact]) -> None:
    seen: dict[str, str] = {}
    for expert in experts:
        identity = expert.entry(EXPERT_NAME).sha256
        if identity in seen:
            raise MismatchError(
                f"each slot must hold another expert, but {expert.url} is the same one as {seen[identity]}; "
                "name it once"
            )
        seen[identity] = expert.url
