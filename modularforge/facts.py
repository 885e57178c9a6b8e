"""What stages record of their results in manifests and other stages read: checked where it is read.

An artifact may come from a place that others can write; a fact of another kind is one sentence and not a traceback.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictBool, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, Required, TypedDict

from checkpoints import Artifact, CorruptArtifactError

LENIENT = ConfigDict(strict=True, extra="allow")
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
MISSING = object()


@with_config(LENIENT)
class Part(TypedDict):
    """An artifact that a model was made from."""

    url: str
    fingerprint: str


class IndexedPart(Part):
    """An expert that a model was made from; `domains` are its partition's, as far as that is known."""

    index: Count
    domains: NotRequired[list[str]]


@with_config(LENIENT)
class Amount(TypedDict):
    """How much text there is."""

    documents: Count
    tokens: Count
    bytes: Count


@with_config(LENIENT)
class Data(TypedDict, total=False):
    """The corpus: what each split holds, by label."""

    splits: dict[str, dict[str, Amount]] | None


@with_config(LENIENT)
class Pretrained(TypedDict):
    """The model that a backbone began as."""

    hub: str | None
    identity: str


@with_config(LENIENT)
class Source(TypedDict, total=False):
    """A source of the corpus."""

    name: Required[str]
    hub: str | None
    hub_config: str | None


@with_config(LENIENT)
class Sources(TypedDict, total=False):
    """Where the corpus came from."""

    sources: list[Source]


@with_config(LENIENT)
class Settings(TypedDict, total=False):
    """The sections of the settings that others than the stage itself read."""

    data: Sources
    backbone: dict[str, Any]
    experts: dict[str, Any]
    partition: dict[str, Any]


@with_config(LENIENT)
class Provenance(TypedDict, total=False):
    """What an artifact was made with."""

    config: Settings
    versions: dict[str, str]


@with_config(ConfigDict(strict=True, extra="forbid"))
class Steering(TypedDict):
    """Sizes of an expert's steering."""

    sites: Count
    width: Count
    vectors: Count
    experts: Count
    is_scaled: StrictBool
    routing: Literal["frame", "utterance"]
    active: Count | None
    scale_bound: float | None


KINDS: dict[str, Any] = {
    "anchored": StrictBool,
    "backbone": Part,
    "data": Data | None,
    "domains": list[str],
    "expert_kind": str,
    "experts_per_token": Count,
    "gguf_sha256": str,
    "index": Count,
    "members": list[IndexedPart],
    "processor_seconds": float,
    "part_keys": dict[str, str],
    "partition_tokens": Count,
    "pretrained": Pretrained | None,
    "provenance": Provenance,
    "public_expert": StrictBool,
    "frozen": dict[str, str | None],
    "rank": Count,
    "router": str,
    "statistics_header": str,
    "steering": Steering,
    "shared_tensors": dict[str, str],
    "training_tokens": Count,
    "variant": str,
}
FACTS: dict[str, TypeAdapter[Any]] = {name: TypeAdapter(kind) for name, kind in KINDS.items()}


def fact(artifact: Artifact, name: str, default: Any = MISSING) -> Any:
    """One fact of a manifest, or the default; raises CorruptArtifactError when it is missing or of another kind."""
    value = artifact.manifest.facts.get(name, default)
    if value is MISSING:
        raise CorruptArtifactError(f"{artifact.url} must record {name} in its manifest, but does not; make it again")
    if value is default:
        return value
    try:
        return FACTS[name].validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, (name, *first["loc"])))
        raise CorruptArtifactError(
            f"{place[:80]} in the manifest of {artifact.url} must be what its stage records, but is "
            f"{first['input']!r:.60} ({first['msg']:.80}); make the artifact again"
        ) from error
