"""Losses of all models on the same text: the domains, behind a switch, mixed, of no domain, and answers in a chat.

Each model's row is a JSON file of its own under `measured-SPLIT`, so that models may join later; a file that is there
is not measured again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real_model.chat import is_right, read_questions
from benchmarks.real_model.settings import CONTEXT, DOMAINS, GENERAL_TEXTS, Scale
from checkpoints import Artifact, plain_folder
from modularforge.assembly.assemble import assemble
from modularforge.config import Config
from modularforge.data.token_files import Tokens
from modularforge.data.tokenizer import encode_texts
from modularforge.evaluation.bench import sizes_of
from modularforge.evaluation.extras import prepare_chat, read_texts
from modularforge.evaluation.probes import CHAT, GENERAL, Probe, domain_probes, text_probe
from modularforge.evaluation.scoring import full_row, oracle, score
from modularforge.model.backbone import Decoder
from modularforge.model.folder import load_model
from modularforge.stage_outputs import Corpus

FILES = {"validation": "valid", "test": "test"}
PROBE_SHARE = 4  # of the tokens of a domain, as many behind a switch, and as many in mixed documents
GENERAL_SHARE = 2
MOST_TOKENS = 24  # of a model's own answer
SHORTEST = 1000  # characters; shorter documents are not drawn

Row = dict[str, Any]


class Measurements:
    """One split; the probes are made once and are the same for every model."""

    def __init__(self, config: Config, corpus: Corpus, texts: Path, output: Path, split: str, scale: Scale):
        self.config, self.corpus, self.texts, self.split, self.scale = config, corpus, texts, split, scale
        self.chat = prepare_chat(read_questions(split), corpus)
        self.folder = output / f"measured-{split}"

    @cached_property
    def probes(self) -> dict[str, Probe]:
        """What is to be predicted, by name."""
        limit, end = self.scale.measured_tokens, self.corpus.end_token
        streams = {name: self._excerpts(name, limit) for name in DOMAINS}
        found = domain_probes(streams, CONTEXT, end, limit, limit // PROBE_SHARE)
        general = {name: self._excerpts(name, limit // GENERAL_SHARE) for name in GENERAL_TEXTS}
        found[GENERAL] = text_probe(GENERAL, general, CONTEXT, end, limit)
        found[CHAT] = self.chat.probe()
        return found

    def _excerpts(self, domain: str, limit: int) -> Tokens:
        """About `limit` tokens: one window from the middle of each of some documents, spread over the split."""
        file = self.texts / domain / f"{FILES[self.split]}.jsonl.gz"
        documents = next(iter(read_texts([str(file)]).values()))
        long_enough = [text for text in documents if len(text) > SHORTEST]
        wanted = min(len(long_enough), limit // CONTEXT)
        chosen = [long_enough[place * len(long_enough) // wanted] for place in range(wanted)]
        encoded = (encode_texts(self.corpus.tokenizer, [text])[0].ids for text in chosen)
        return np.concatenate([[*middle(ids, CONTEXT - 1), self.corpus.end_token] for ids in encoded])

    def row(self, name: str, load: Callable[[], Decoder], only: Collection[str] = ()) -> Row:
        """Losses, sizes and own answers of a model; of the probes, those in `only` where it names some."""
        file = self.folder / f"{name}.json"
        if not file.is_file():
            model = load().eval()
            wanted = {key: probe for key, probe in self.probes.items() if not only or key in only}
            scores = {key: score(model, probe, self.config.evaluation.batch_size) for key, probe in wanted.items()}
            row = {**full_row(wanted, scores, self.corpus.byte_lengths), **sizes_of(model, CONTEXT)}
            if CHAT in wanted:
                row["answers"] = self._answers(model)
            self.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(row) + "\n")
            print(name, summary(row), flush=True)
        found: Row = json.loads(file.read_text())
        return found

    def _answers(self, model: Decoder) -> list[Row]:
        prompts = [item.prompt for item in self.chat.questions]
        replies = self.chat.replies(model, MOST_TOKENS)
        return [
            {"question": prompt, "answer": reply, "is_right": is_right(prompt, reply)}
            for prompt, reply in zip(prompts, replies, strict=True)
        ]

    def rows(self) -> dict[str, Row]:
        """All rows there are, and the oracles of the experts among them."""
        found = {file.stem: json.loads(file.read_text()) for file in sorted(self.folder.glob("*.json"))}
        for prefix, name in (("expert-", "oracle"), ("lora expert-", "lora oracle")):
            experts = {key: row for key, row in found.items() if key.startswith(prefix)}
            if len(experts) == self.config.experts.count:
                found[name] = oracle(experts)
        return found


def middle(ids: Sequence[int], length: int) -> Sequence[int]:
    """As many ids from the middle of a document, or all of a shorter one."""
    first = max(0, len(ids) - length) // 2
    return ids[first : first + length]


def assembled(config: Config, backbone: Artifact, experts: list[Artifact], assembly: Mapping[str, Any]) -> Decoder:
    """The assembler's own output with other settings of `assembly`, through a folder that is gone afterwards."""
    changed = config.model_copy(update={"assembly": config.assembly.model_copy(update=dict(assembly))})
    with tempfile.TemporaryDirectory() as scratch:
        assemble(changed, backbone, experts, plain_folder(Path(scratch)))
        return load_model(Path(scratch))


def summary(row: Row) -> str:
    """A row in one line: mean losses by probe, and how many questions were answered rightly."""
    probes = "  ".join(f"{name} {item['mean_loss']:.4f}" for name, item in row["probes"].items())
    right = sum(item["is_right"] for item in row.get("answers", []))
    return f"text {row['mean_loss']:.4f}  {probes}" + (f"  right {right}" if "answers" in row else "")
