"""What lies beside an assembled model's weights: tokenizer and generation settings, and the model card.

The card is written from the manifests of what the model was made from, and says only what they say: no places, no
times, so the same parts give the same card anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from checkpoints import Artifact
from checkpoints.markdown import code, plain, table
from modularforge.config import Config
from modularforge.facts import fact
from modularforge.model.hub_config import CONFIG_NAME, GENERATION_NAME, TOKENIZER_FILES, TOKENIZER_NAME, special_ids

CARD_NAME = "README.md"


def model_card(
    config: Config,
    backbone: Artifact,
    experts: Sequence[Artifact],
    facts: Mapping[str, Any],
    summary: str,
    loading: str = "",
) -> str:
    """README.md of the model folder.

    `facts` are those of the assembled model's manifest, `summary` says what it is, and `loading` how it is loaded where
    that is not in plain transformers.
    """
    blocks = [
        _front_matter(backbone, facts.get("library") == "modularforge"),
        f"# {plain(config.name)}",
        f"{summary} Every expert was trained alone on its own part of the data, on top of {_origin(backbone)}, and "
        "merged with ModularForge.",
        loading or _how_to_load(facts),
        "## What it was made from",
        _table(["part", "trained on", "training loss", "validation loss", "fingerprint"], _parts(backbone, experts)),
        "Losses are in nats per token, as they were when each part was finished; the backbone is validated on all "
        "domains, an expert on those of its partition. Tokens are those trained on here.",
        *_data(backbone),
        *_settings(config, backbone, experts, facts),
    ]
    return "\n\n".join(blocks) + "\n"


def calibration_note(before: float, after: float, what: str) -> str:
    """What a calibrated model adds to the card of the assembled one; `what` was done."""
    return (
        f"\n## Calibration\n\n{what} after assembly. On text held "
        f"out from that, the mean loss over domains was {before:.4f} before and {after:.4f} after.\n"
    )


def _front_matter(backbone: Artifact, is_speech: bool = False) -> str:
    library, use = "transformers", "text-generation"
    if is_speech:
        library, use = "modularforge", "automatic-speech-recognition"
    lines = ["---", f"library_name: {library}", f"pipeline_tag: {use}"]
    lines += ["tags: [mixture-of-experts, modularforge]"]
    base = (fact(backbone, "pretrained", None) or {}).get("hub")
    named = yaml.safe_dump({"base_model": base}, width=math.inf, allow_unicode=True).splitlines() if base else []
    return "\n".join([*lines, *named, "---"])


def _origin(backbone: Artifact) -> str:
    pretrained = fact(backbone, "pretrained", None)
    if not pretrained:
        return "one backbone trained from random weights"
    named = pretrained["hub"] and plain(pretrained["hub"])
    name = named or f"a pretrained model (identity {code(pretrained['identity'])})"
    return f"{name}, trained on before that," if fact(backbone, "training_tokens", 0) else f"{name} as it is"


def _how_to_load(facts: Mapping[str, Any]) -> str:
    if facts.get("library") == "modularforge":
        return (
            "It loads with ModularForge, beside the frozen models that its config.json names:\n\n"
            "```python\nfrom pathlib import Path\n\nfrom modularforge.speech.folder import load_speech\n\n"
            'model = load_speech(Path("."))  # where this file lies\n```'
        )
    return (
        f"It is a {code(facts['architecture'])} and loads in plain transformers, 4.57 or newer:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # where this file lies\n'
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n```"
    )


def _parts(backbone: Artifact, experts: Sequence[Artifact]) -> Iterator[list[str]]:
    named = [("backbone", backbone), *((f"expert {item.manifest.facts.get('index', '?')}", item) for item in experts)]
    for name, artifact in named:
        facts = artifact.manifest.facts
        tokens = fact(artifact, "training_tokens", None)
        row = ["not recorded" if tokens is None else f"{tokens:,} tokens"]
        row += [_loss(facts.get(key)) for key in ("train_loss", "validation_loss")]
        yield [plain(name), *row, code(artifact.manifest.fingerprint)]


def _loss(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "–"


def _data(backbone: Artifact) -> Iterator[str]:
    """The corpus: its sources by name, and how much of each domain each split holds."""
    splits = (fact(backbone, "data", None) or {}).get("splits")
    if not splits:
        return
    yield "## Data"
    yield "\n".join(f"- {line}" for line in _sources(backbone))
    rows = [
        [plain(label), split, f"{count['documents']:,}", f"{count['tokens']:,}", f"{count['bytes']:,}"]
        for split in ("train", "validation", "test")
        for label, count in splits.get(split, {}).items()
    ]
    yield _table(["domain", "split", "documents", "tokens", "bytes"], rows)


def _sources(backbone: Artifact) -> Iterator[str]:
    for source in _config_of(backbone).get("data", {}).get("sources", ()):
        where = f"{code(source['hub'])} on the Hub" if source.get("hub") else "files of its own"
        named = f", {plain(source['hub_config'])}" if source.get("hub_config") else ""
        yield f"{plain(source['name'])}: {where}{named}"


def _settings(
    config: Config, backbone: Artifact, experts: Sequence[Artifact], facts: Mapping[str, Any]
) -> Iterator[str]:
    yield "## Settings"
    made = _config_of(experts[0]) if experts else {}
    rows = [["assembly", "router", plain(str(facts["router"]))], ["assembly", "seed", str(config.seed)]]
    for section, values in (("backbone", _config_of(backbone).get("backbone")), ("experts", made.get("experts"))):
        rows += [[section, plain(name), plain(f"{value}")] for name, value in (values or {}).items()]
    rows += [["partition", plain(name), plain(f"{value}")] for name, value in made.get("partition", {}).items()]
    yield _table(["section", "setting", "value"], rows)
    versions = fact(backbone, "provenance", {}).get("versions", {})
    if versions:
        listed = ", ".join(plain(f"{name} {version}") for name, version in sorted(versions.items()))
        yield f"Made with {listed}."


def _config_of(artifact: Artifact) -> dict[str, Any]:
    found: dict[str, Any] = fact(artifact, "provenance", {}).get("config", {})
    return found


def _table(titles: Sequence[str], rows: Iterator[list[str]] | list[list[str]]) -> str:
    return "\n".join(table(titles, rows))


def copy_text_files(backbone: Artifact, folder: Path) -> None:
    """Copy those that the backbone has into a model folder."""
    for name in (GENERATION_NAME, *TOKENIZER_FILES):
        if name in backbone.manifest.files:
            (folder / name).write_bytes(backbone.read_bytes(name))


def special_tokens(backbone: Artifact) -> tuple[int, ...]:
    """Ids of a backbone's tokens that are no text."""
    tokenizer = backbone.read_bytes(TOKENIZER_NAME) if TOKENIZER_NAME in backbone.manifest.files else b"{}"
    return special_ids(backbone.read_json(CONFIG_NAME), tokenizer)
