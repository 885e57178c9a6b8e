"""Change which experts an assembled model has: the model is assembled again from its parts, and what stays is kept.

Needs no settings: an assembled model's manifest names its backbone, its experts and the settings it was made with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from checkpoints import Artifact, find_artifact, open_artifact, paths
from checkpoints.errors import MissingArtifactError
from modularforge.assembly.assemble import assemble
from modularforge.config import Config
from modularforge.config_files import make_config
from modularforge.errors import ConfigError, MismatchError
from modularforge.experts.kind import kind_of_artifact
from modularforge.facts import fact
from modularforge.log import json_safe, logger
from modularforge.pipeline import CHOSEN_FACT, JobName, Plan, stage_settings
from modularforge.provenance import making, provenance


@dataclass(frozen=True)
class Member:
    """One expert of an assembled model: the slot it has there, its index in its run, where it lies, its fingerprint."""

    slot: int
    index: int
    url: str
    fingerprint: str


def members_of(model: Artifact) -> list[Member]:
    """The experts of an assembled model, in the order of their slots; the public FFN is none of them."""
    if model.manifest.kind != "assembled":
        raise MismatchError(
            f"{model.url} must be an assembled model, but is of kind {model.manifest.kind}; name the run's assembled "
            "folder (a calibrated model is made from it anew)"
        )
    entries = enumerate(fact(model, "members"), start=int(fact(model, "public_expert")))
    return [Member(slot, entry["index"], entry["url"], entry["fingerprint"]) for slot, entry in entries]


def remove(model_url: str, name: int | str, output: str | None = None) -> Artifact:
    """The model without one expert, named by index or place, in its place or at `output`."""
    model = open_artifact(model_url)
    members = members_of(model)
    gone = _member(model, members, name)
    kept = [member for member in members if member is not gone]
    if not kept:
        raise MismatchError(f"{model.url} must keep an expert, but {name} is its last; add another one first")
    visited, left = int(fact(model, "experts_per_token")), len(kept) + int(fact(model, "public_expert"))
    if left < visited:
        raise MismatchError(
            f"{model.url} must keep {visited} experts, as many as each token visits, but without {name} it has {left}; "
            "add another one first"
        )
    return _assemble_again(model, [_open(model, member) for member in kept], output)


def add(model_url: str, expert_url: str, output: str | None = None, texts: Sequence[str] = ()) -> Artifact:
    """The model with one more expert, trained on the same backbone.

    That may be an adapter of PEFT for a model of LoRA experts; `texts` are then files of its domain.
    """
    model = open_artifact(model_url)
    expert = _open_expert(model, expert_url, texts)
    experts = [_open(model, member) for member in members_of(model)]
    return _assemble_again(model, _in_order([*experts, expert]), output)


def replace(
    model_url: str, name: int | str, expert_url: str, output: str | None = None, texts: Sequence[str] = ()
) -> Artifact:
    """The model with another expert in the place of one; `texts` as for `add`."""
    model = open_artifact(model_url)
    expert = _open_expert(model, expert_url, texts)
    members = members_of(model)
    gone = _member(model, members, name)
    experts = [expert if member is gone else _open(model, member) for member in members]
    return _assemble_again(model, experts, output)


def _assemble_again(model: Artifact, experts: Sequence[Artifact], output: str | None) -> Artifact:
    url = output or model.url
    config = _config_of(model, len(experts))
    backbone = _open_part(model, fact(model, "backbone"), "backbone")
    names = [str(JobName("expert", fact(expert, "index"))) for expert in experts]
    if len(set(names)) < len(names):
        names = [f"member-{place}" for place in range(len(names))]  # from several runs, whose indices may be the same
    inputs = {"backbone": backbone.manifest.fingerprint}
    inputs |= {name: expert.manifest.fingerprint for name, expert in zip(names, experts, strict=True)}
    plan = Plan("assemble", url, stage_settings(config, "assemble"), inputs)
    old = find_artifact(url)
    if old and old.manifest.fingerprint == plan.fingerprint:
        logger.info("the model at %s has these experts already", url)
        return old
    if old and old.url != model.url:
        raise MismatchError(f"{url} must be free, but holds another artifact; choose another --output")
    start = time.perf_counter()
    with making(plan, [backbone, *experts]) as writer:
        facts = assemble(config, backbone, list(experts), writer, old=model)
        if old:
            calibrated = paths.join(model.url.rstrip("/").rsplit("/", 1)[0], "calibrated")
            if find_artifact(calibrated):
                logger.info("%s was made from the old model and is removed; calibrate again", calibrated)
                paths.remove(calibrated)
        seconds = round(time.perf_counter() - start, 3)
        known = {"seconds": seconds, CHOSEN_FACT: True, **facts, "provenance": provenance(config)}
        artifact = writer.commit(json_safe(known), old=old)
    logger.info("finished: %s", url)
    return artifact


def _config_of(model: Artifact, count: int) -> Config:
    """The settings that the model was made with, for `count` experts."""
    config = make_config(fact(model, "provenance").get("config", {}), f"the manifest of {model.url}")
    has_public, assembly = bool(fact(model, "public_expert")), config.assembly
    is_average = assembly.lora == "average"  # which has none, whatever is set
    if has_public != config.has_public_expert and not is_average:  # null meant another thing in earlier versions
        assembly = assembly.model_copy(update={"public_expert": has_public})
    experts = config.experts.model_copy(update={"count": count})
    return config.model_copy(update={"experts": experts, "assembly": assembly})


def _member(model: Artifact, members: Sequence[Member], name: int | str) -> Member:
    """The member with this index or at this place; experts of several runs may have the same index."""
    found = [member for member in members if str(name) in (str(member.index), member.url)]
    if not found:
        known = ", ".join(str(member.index) for member in members)
        raise MismatchError(f"{model.url} must have an expert {name}, but has {known}; see modularforge experts list")
    if len(found) > 1:
        places = ", ".join(member.url for member in found)
        raise MismatchError(f"{name} must name one expert of {model.url}, but names {places}; write one of these")
    return found[0]


def _open(model: Artifact, member: Member) -> Artifact:
    entry = {"url": member.url, "fingerprint": member.fingerprint}
    return _open_part(model, entry, f"experts/expert-{member.index}")


def _open_part(model: Artifact, entry: dict[str, str], place: str) -> Artifact:
    """A part where it was, or where it lies beside a model whose run was moved or copied."""
    beside = paths.join(model.url.rstrip("/").rsplit("/", 1)[0], place)
    for url in (entry["url"], beside):
        artifact = find_artifact(url)
        if artifact and artifact.manifest.fingerprint == entry["fingerprint"]:
            return artifact
    raise MismatchError(
        f"{model.url} was made from {entry['url']}, but that is neither there nor at {beside}; bring it back, or "
        "assemble the model from the parts that there are"
    )


def _open_expert(model: Artifact, url: str, texts: Sequence[str]) -> Artifact:
    if kind_of_artifact(model).name == "lora":
        from modularforge.taking import is_adapter, take_in  # which loads torch

        if is_adapter(url):
            backbone, members = _open_part(model, fact(model, "backbone"), "backbone"), members_of(model)
            first = 1 + max(member.index for member in members)
            place = paths.join(model.url.rstrip("/").rsplit("/", 1)[0], "experts")
            return take_in(url, _config_of(model, len(members)), backbone, first, texts, place)
    if texts:
        raise ConfigError(
            f"--text is for adapters of PEFT, but {url} is none, or the model is not of adapters; leave it out"
        )
    expert = find_artifact(url)
    if expert is None:
        raise MissingArtifactError(
            f"{url} must be a trained expert (with manifest.json) or, for a model of adapters, PEFT's folder of one "
            "(adapter_config.json, adapter_model.safetensors), but is neither; name experts/expert-K of a run"
        )
    if expert.manifest.kind != "expert":
        raise MismatchError(f"{url} must be an expert, but is of kind {expert.manifest.kind}; name experts/expert-K")
    return expert


def _in_order(experts: list[Artifact]) -> list[Artifact]:
    """By index, as a run would assemble them: adding an expert gives the model that has it from the start."""
    return sorted(experts, key=lambda expert: int(fact(expert, "index")))
