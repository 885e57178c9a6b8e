"""How LoRA experts become one model, in one of three forms; works on committed artifacts and needs no torch.

`fold` adds each expert's adapters to a copy of the backbone's feed-forward blocks, which makes an ordinary mixture of
them. `adapters` leaves the backbone's file as it is and puts the adapters beside it, each in a folder that PEFT loads,
with the tables that choose among them. `average` puts one adapter there that adds the mean of what they add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from checkpoints import Artifact
from checkpoints.safetensors import WEIGHTS_NAME, TensorSpan
from modularforge.assembly.parts import Merged, whole_file
from modularforge.assembly.plan import LowRank, output_tensors, spans_of
from modularforge.assembly.shared import SHARED_NAME, write_means, write_own_rows
from modularforge.config import Config
from modularforge.errors import ConfigError
from modularforge.experts import mixture
from modularforge.experts.lora.adapters import Adapter, Mean, adapter_of, base_name
from modularforge.model import names
from modularforge.model.adapter_config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ADAPTERS_FOLDER,
    ADAPTERS_NAME,
    Composite,
    adapter_config,
    composite_json,
)
from modularforge.model.hub_config import CONFIG_NAME, OWN_ROWS_NAME, TABLES_NAME, model_config_of, write_json
from modularforge.model.sizes import AdapterCounts, lora_sizes, with_own_rows
from modularforge.routing.text_counts import token_occurrences
from modularforge.routing.text_evidence import texts_of, write_tables


def merge(config: Config, backbone: Artifact, experts: Sequence[Artifact], scratch: Path) -> Merged:
    """The form that `assembly.lora` names; new values are written to files in `scratch`."""
    spans = spans_of(backbone, WEIGHTS_NAME)
    adapters = [adapter_of(expert, spans) for expert in experts]
    if config.assembly.lora == "fold":
        return _folded(config, backbone, experts, adapters, spans, scratch)
    shared = write_means(scratch / SHARED_NAME, spans, experts, config.assembly.shared, token_occurrences)
    return _Beside(config, backbone, list(experts), adapters).merged(spans, shared)


def freezes(name: str) -> bool:
    """All that no adapter stands in the place of; what `experts.unfreeze` names began as the backbone's, too."""
    return True


def part_of(name: str) -> str:
    """As in a mixture of feed-forward blocks; a backbone with adapters beside it is one part."""
    return mixture.part_of(name)


def _folded(
    config: Config,
    backbone: Artifact,
    experts: Sequence[Artifact],
    adapters: Sequence[Adapter],
    spans: Mapping[str, TensorSpan],
    scratch: Path,
) -> Merged:
    """A mixture of the backbone's feed-forward blocks, each with one expert's adapters added."""
    added: dict[tuple[int, int, str], LowRank] = {}
    for index, adapter in enumerate(adapters):
        for name, (a, b) in adapter.pairs.items():
            layer, part = _place(name, adapter)
            added[index, layer, part] = LowRank(a, b, adapter.shape.scale)
    dense = {names.dense_to_expert(name, 0): span for name, span in spans.items() if names.is_dense_ffn(name)}
    merged = mixture.Mixture(config, backbone, list(experts), [dense] * len(experts), added)
    return merged.merged(scratch, {})


def _place(name: str, adapter: Adapter) -> tuple[int, str]:
    """Layer and part of a feed-forward matrix of the backbone."""
    found = names.expert_position(names.dense_to_expert(name, 0))
    if found is None:
        raise ConfigError(
            f"assembly.lora must not be fold for {adapter.url}, which has an adapter on {name}, since experts of a "
            "mixture are feed-forward blocks; use assembly.lora adapters, or train with experts.lora.targets mlp"
        )
    return found[0], found[2]


@dataclass(frozen=True)
class _Beside:
    """A backbone, as it is or with the mean of what experts made of it, and adapters in folders beside it."""

    config: Config
    backbone: Artifact
    experts: list[Artifact]
    adapters: list[Adapter]

    def merged(self, spans: Mapping[str, TensorSpan], shared: Mapping[str, TensorSpan]) -> Merged:
        """All that the assembler needs; in the tensors of `shared` the model differs from the backbone's spans."""
        if not self.is_average:
            mixture.check_active(self.config, len(self.experts))
        tensors = output_tensors({**spans, **shared}, mixture.SAFETENSORS_NAME[self.config.assembly.dtype])
        values: dict[str, Any] = self.backbone.read_json(CONFIG_NAME)
        dtype = mixture.HUB_NAME.get(next(iter(tensors.values())).dtype, values.get("dtype"))
        facts = self._facts(values)
        sources = whole_file(self.backbone, WEIGHTS_NAME, spans)
        changed = {"dtype": dtype, "torch_dtype": dtype} if self.config.assembly.dtype != "same" else {}
        said = _summary(facts), self._write, _loading(self.composite.folders[0], self.means)
        return Merged(tensors, part_of, sources, {**values, **changed}, facts, *said)

    @property
    def is_average(self) -> bool:
        """Whether one adapter stands for all."""
        return self.config.assembly.lora == "average"

    @property
    def composite(self) -> Composite:
        """What is where, and how it is chosen from."""
        settings, count = self.config.assembly, len(self.adapters)
        if self.is_average:
            return Composite((f"{ADAPTERS_FOLDER}/average",), 1, public=False, choice=None)
        folders = tuple(f"{ADAPTERS_FOLDER}/expert-{index:03d}" for index in range(count))
        public = self.config.has_public_expert
        active = count + int(public) if settings.router == "uniform" else settings.experts_per_token
        return Composite(folders, active, public, settings.lora_choice)

    def _facts(self, values: Mapping[str, Any]) -> dict[str, Any]:
        composite, sizes = self.composite, tuple(adapter.parameters for adapter in self.adapters)
        if self.is_average:  # the ranks add up, over all matrices that any of them has
            sizes = (Mean(self.adapters).parameters,)
        counts = AdapterCounts(sizes, min(composite.active, len(sizes)), composite.blocks_visited(self.has_mlp))
        found = lora_sizes(model_config_of(values), int(values["vocab_size"]), counts)
        if rows := mixture.rows_each(self.config, self.backbone, self.experts):
            model, matrix = model_config_of(values), int(values["vocab_size"]) * model_config_of(values).width
            found = with_own_rows(found, rows, model.tied_head, matrix, len(self.experts), composite.active)
        return {
            "architecture": values["architectures"][0],
            "experts": len(composite.folders) + int(composite.public),
            "experts_per_token": composite.active,
            "public_expert": composite.public,
            "router": "none" if self.is_average else self.config.assembly.recorded_router,
            "lora_form": self.config.assembly.lora,
            "parameters": found.parameters,
            "active_parameters": found.active_parameters,
            "routing_parameters": 0,
            **({"shared_means": self.means} if self.means else {}),
            **({"own_rows": rows} if rows else {}),
        }

    @property
    def means(self) -> list[str]:
        """The parts of the backbone that are the mean of what experts made of them."""
        return mixture.shared_means(self.config, self.experts)

    @property
    def has_mlp(self) -> bool:
        """Whether any adapter stands in a feed-forward block."""
        return any(names.is_dense_ffn(name) for adapter in self.adapters for name in adapter.pairs)

    def _write(self, folder: Path) -> dict[str, Any]:
        """Write adapters, what is said of them, and the tables that choose; says how many pairs these know."""
        composite = self.composite
        write_json(folder / ADAPTERS_NAME, composite_json(composite))
        if self.is_average:
            _write_mean(folder / composite.folders[0], self.adapters, base_name(self.backbone))
            return {}
        for place, expert in zip(composite.folders, self.experts, strict=True):
            (folder / place).mkdir(parents=True)
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                (folder / place / name).write_bytes(expert.read_bytes(name))
        if self.config.assembly.router != "evidence":
            return {}
        texts = texts_of(self.backbone, self.experts, self.config.learns_responses)
        most = self.config.assembly.token_pairs if texts.has_pairs else 0
        if self.config.assembly.shared == "own":
            write_own_rows(folder / OWN_ROWS_NAME, self.backbone, self.experts)
        return {"token_pairs": write_tables(folder / TABLES_NAME, texts, composite.public, most)}


def _write_mean(folder: Path, adapters: Sequence[Adapter], base: str | None) -> None:
    mean = Mean(adapters)
    folder.mkdir(parents=True)
    write_json(folder / ADAPTER_CONFIG, adapter_config(mean.shape, base))
    save_file(mean.tensors(), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _loading(folder: str, means: list[str]) -> str:
    """How one adapter is loaded, for the card."""
    backbone = "the backbone alone" + (f" (its {', '.join(means)} changed)" if means else "")
    return (
        f"ModularForge loads the folder as one model. In plain transformers it is {backbone}; PEFT puts one "
        "adapter beside it:\n\n"
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # where this file lies\n'
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")\n'
        f'model = PeftModel.from_pretrained(model, f"{{folder}}/{folder}")\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n```"
    )


def _summary(facts: Mapping[str, Any]) -> str:
    """What the model is, for its card."""
    means = facts.get("shared_means")
    shared = f" Its {', '.join(means)} are the mean of what each expert made of them." if means else ""
    if facts["lora_form"] == "average":
        one = "A language model with one LoRA adapter beside it (`adapters/average`), the mean of what several add."
        return one + shared
    public = "the backbone alone or " if facts["public_expert"] else ""
    return (
        f"A language model with {facts['experts'] - int(facts['public_expert'])} LoRA adapters beside it, each in a "
        f"folder that PEFT loads. ModularForge lets each token visit {facts['experts_per_token']} of them ({public}"
        f"those whose text it resembles); other programs load the backbone, or it and one adapter.{shared}"
        + (mixture.OWN_ROWS if facts.get("own_rows") else "")
    )
