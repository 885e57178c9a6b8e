"""Take in an adapter that PEFT trained, as an expert: checked against the backbone, and with what routers need of it.

PEFT leaves nothing from which a text is known to be the adapter's, so that whoever takes it in names texts of its
domain. They are counted and read once, as the job of an expert reads its partition, and not kept.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from checkpoints import Artifact, find_artifact, paths
from checkpoints.parsing import parse_object
from checkpoints.redact import redact
from checkpoints.safetensors import WEIGHTS_NAME
from modularforge.config import Config
from modularforge.data.tokenizer import load_tokenizer
from modularforge.errors import ConfigError, DataError, MismatchError
from modularforge.evaluation.extras import Texts, read_texts, stream_of, texts_identity
from modularforge.experts.kind import KIND_FACT, ExpertJob, find_kind, frozen_hashes
from modularforge.experts.lora.adapters import base_name
from modularforge.experts.sums import save_sums
from modularforge.log import json_safe, logger
from modularforge.model.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, parse_adapter_config
from modularforge.model.backbone import Decoder
from modularforge.model.hub_config import TOKENIZER_NAME, end_tokens
from modularforge.model.lora import with_adapter
from modularforge.pipeline import Plan
from modularforge.provenance import making, provenance
from modularforge.stage_outputs import Backbone
from modularforge.tasks.text import TEXT
from modularforge.training.distributed import default_device

FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)


def is_adapter(url: str) -> bool:
    """Whether a folder holds an adapter of PEFT, and is no expert of ours."""
    return all(paths.exists(paths.join(url, name)) for name in FILES) and find_artifact(url) is None


def take_in(folder: str, config: Config, backbone: Artifact, first: int, texts: Sequence[str], url: str) -> Artifact:
    """The adapter in `folder` as expert `taken-K`, committed in the folder at `url`; `texts` are files of its domain.

    K is `first`, or the next that is free: others may have been taken in for models elsewhere. Raises MismatchError for
    an adapter of another base, and ConfigError where a router needs texts and has none.
    """
    if not texts and config.assembly.lora != "average" and config.assembly.router != "uniform":
        raise ConfigError(
            f"--text must name files of the domain of {folder}, since the model routes by what text its experts are "
            "for; name some, such as --text 'law/*.jsonl'"
        )
    contents = {name: paths.read_bytes(paths.join(folder, name)) for name in FILES}
    model, found = _with_adapter(folder, backbone, contents), read_texts(texts)
    identity = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    plan, old = _place({"adapter": identity, "texts": texts_identity(found)}, backbone, first, url)
    if old:
        return old
    index = plan.settings["index"]
    with making(plan) as writer:
        for name, content in contents.items():
            (writer.folder / name).write_bytes(content)
        if found:
            _count(config, backbone, model, found, index, writer.folder)
        kind = find_kind("lora")
        shared = frozen_hashes(kind, backbone, WEIGHTS_NAME)
        facts = {"index": index, KIND_FACT: kind.name, "taken_from": redact(folder), "shared_tensors": shared}
        artifact = writer.commit(json_safe({**facts, "provenance": provenance(config)}))
    logger.info("taken in as expert %d: %s", index, plan.url)
    return artifact


def _place(settings: Mapping[str, Any], backbone: Artifact, first: int, url: str) -> tuple[Plan, Artifact | None]:
    """The plan of the first expert whose place no other has, and the expert where it is there already."""
    inputs = {"backbone": backbone.manifest.fingerprint}
    plans = (
        Plan("expert", paths.join(url, f"taken-{index}"), {**settings, "index": index}, inputs)
        for index in itertools.count(first)
    )
    places = ((plan, find_artifact(plan.url)) for plan in plans)
    return next((plan, old) for plan, old in places if old is None or old.manifest.fingerprint == plan.fingerprint)


def _with_adapter(folder: str, backbone: Artifact, contents: dict[str, bytes]) -> Decoder:
    """The expert's own model; raises MismatchError unless the adapter is of this backbone, as far as can be known."""
    origin = paths.join(folder, ADAPTER_CONFIG)
    shape, base, own = parse_adapter_config(contents[ADAPTER_CONFIG], origin), _base(contents), base_name(backbone)
    if base and own and base != own:
        raise MismatchError(
            f"{folder} must be an adapter of {own}, as the backbone is, but was trained on {base}; choose another one"
        )
    if not (base and own):
        logger.info("%s or the backbone has no name of a model, so that shapes alone are compared", folder)
    try:
        tensors: dict[str, Tensor] = load(contents[ADAPTER_WEIGHTS])
    except Exception as error:  # safetensors raises a class of its own
        raise DataError(f"{folder} must hold whole weights, but does not ({error}); bring it again") from error
    return with_adapter(Backbone(backbone).model(), shape, tensors, folder)


def _base(contents: dict[str, bytes]) -> str | None:
    """The name on the Hub of the model that an adapter was trained on; None where it was a folder."""
    name = parse_object(contents[ADAPTER_CONFIG]).get("base_model_name_or_path")
    is_name = isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return str(name) if is_name else None


def _count(config: Config, backbone: Artifact, model: Decoder, texts: Texts, index: int, folder: Path) -> None:
    """Write statistics and counts of the texts, as an expert's job leaves them of its partition."""
    values: dict[str, Any] = Backbone(backbone).values
    tokenizer, ends = load_tokenizer(backbone.local_file(TOKENIZER_NAME)), end_tokens(values)
    documents = [text for found in texts.values() for text in found]
    tokens = stream_of(documents, tokenizer, ends[0] if ends else 0, config.experts.counted_tokens)
    examples = TEXT.part_of(config, tokens, index)
    save_sums(ExpertJob(config, index, Backbone(backbone), TEXT, examples, default_device()), model, folder)
