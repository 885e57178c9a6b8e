"""`modularforge init`: look at a corpus and this machine, and write settings that fit both, with comments.

The largest model of a ladder is taken whose parameters get `USUAL_TOKENS` each from at most `MOST_EPOCHS` readings of
the text, within the time that somebody waits for a first run. Experts are short, as in docs/method.md. Text of few
files is cut into pieces small enough that a little of it, held out, is of all of it. Nothing is asked and nothing is
read but names, sizes and the beginning of a file.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from checkpoints import StoreError, paths
from checkpoints.redact import redact
from modularforge.advice import USUAL_TOKENS
from modularforge.config import Config, ModelConfig
from modularforge.config_files import make_config
from modularforge.cost import parts_of, size, span, this_machine
from modularforge.data.compression import compression_of
from modularforge.data.cutting import TEXT_PIECE_CHARACTERS
from modularforge.data.files import find_files, read_lines, read_text
from modularforge.errors import ConfigError, DataError
from modularforge.model.sizes import model_sizes
from modularforge.yaml_text import parse_yaml

BYTES_PER_TOKEN = 3.0  # of small vocabularies; large ones have four
COMPRESSED, PARQUET = 3.5, 2.0  # bytes of text for each byte of such files, or about that
MOST_EPOCHS = 4  # repeated text is worth as much as new one up to here (arXiv 2305.16264)
LONGEST_SECONDS = 3600.0
# Of a source, by chance: so many that none, of one split of one source, has a chance of 0.0003.
USUAL_SHARE, MOST_SHARE, HELD_OUT_DOCUMENTS = 0.01, 0.25, 8
LEAST_PIECE = 600  # characters; a window of the smallest model here is as long
SHARE_OF_EXPERTS, MOST_EXPERT_EPOCHS = 0.25, 3
DOCUMENTS_PER_EXPERT, TOKENS_PER_EXPERT, MOST_CLUSTERS, MOST_FOLDERS = 20, 300_000, 8, 32
LEAST_TOKENS = 20_000
RECORD_BYTES, ARTICLE_BYTES = 2_000, 65_536
PROSE = (".txt", ".md", ".rst", ".tex", ".html", ".xml", ".tokens", ".raw")
CODE = (".py", ".c", ".h", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".sh", ".sql", ".yaml", ".yml")
RECORDS = (".jsonl", ".ndjson", ".json")
ARTICLES = (".tokens", ".raw")
ENDINGS = (*RECORDS, ".parquet", *PROSE, *CODE)
SPLIT = re.compile(r"(?:.*[._-])?(train|training|valid|validation|dev|val|test)(?:[._-].*)?", re.IGNORECASE)
SPLITS = {"training": "train", "valid": "validation", "dev": "validation", "val": "validation"}
# width, layers, heads, kv_heads, ffn_width, context_length, vocab_size; peak rate and batch of the backbone
LADDER = (
    ((48, 2, 4, 2, 128, 128, 512), 3e-3, 32),
    ((64, 3, 4, 2, 176, 128, 1024), 3e-3, 32),
    ((96, 4, 4, 2, 256, 128, 2048), 3e-3, 32),
    ((128, 4, 4, 4, 344, 256, 4096), 2e-3, 16),
    ((256, 6, 4, 4, 688, 256, 8192), 1.5e-3, 32),
    ((512, 4, 8, 8, 1368, 512, 16384), 1e-3, 32),
    ((768, 12, 12, 12, 2048, 1024, 32768), 6e-4, 64),
    ((1024, 24, 16, 8, 2816, 2048, 32768), 3e-4, 128),
)
SHAPE = ("width", "layers", "heads", "kv_heads", "ffn_width", "context_length")


@dataclass(frozen=True)
class Source:
    """One source: its label, the files of each split, and about how much text that is."""

    name: str
    splits: dict[str, list[str]]
    plain: tuple[float, ...]
    """Bytes of text of each file that is cut into pieces."""
    other_bytes: float
    other_documents: float
    """Of files of records and articles."""
    text_field: str = "text"
    piece_characters: int | None = None
    character_bytes: float = 1.0

    @property
    def text_bytes(self) -> float:
        """Of all its files."""
        return sum(self.plain) + self.other_bytes

    @property
    def documents(self) -> float:
        """How many there are at the least."""
        piece = (self.piece_characters or TEXT_PIECE_CHARACTERS) * self.character_bytes
        return sum(max(1.0, length / piece) for length in self.plain) + self.other_documents

    @property
    def is_divided(self) -> bool:
        """Whether documents are held out of its training files."""
        return not {"validation", "test"} <= {*self.splits}


@dataclass(frozen=True)
class Look:
    """What was found: sources by folder, or one source to be clustered."""

    place: str
    sources: tuple[Source, ...]

    @property
    def name(self) -> str:
        """A name for the run: that of the folder."""
        own = self.place if not paths.is_local(self.place) else str(paths.local_path(self.place).absolute())
        return _label(own.rstrip("/").rsplit("/", 1)[-1])

    def describe(self) -> str:
        """What was found, in one line."""
        labels = ", ".join(source.name for source in self.sources)
        how = f"a domain for each of {labels}" if len(self.sources) > 1 else f"{self.experts} clusters of {labels}"
        return f"about {self.tokens:,.0f} tokens; {how}"

    @property
    def tokens(self) -> float:
        """About how many there are."""
        return sum(source.text_bytes for source in self.sources) / BYTES_PER_TOKEN

    @property
    def heldout(self) -> float:
        """The share of documents for each split without files, of which every source should have some."""
        fewest = min((source.documents for source in self.sources if source.is_divided), default=math.inf)
        wanted = min(HELD_OUT_DOCUMENTS / fewest, MOST_SHARE)
        return max(USUAL_SHARE, math.ceil(100 * wanted) / 100)

    @property
    def smallest_part(self) -> float:
        """Tokens that each expert surely has: clusters differ in size, and tokens may be half of those estimated."""
        if len(self.sources) > 1:
            return min(source.text_bytes for source in self.sources) / BYTES_PER_TOKEN / 4
        return self.tokens / self.experts / 8

    @property
    def experts(self) -> int:
        """One a folder, or as many clusters as there is text for."""
        if len(self.sources) > 1:
            return len(self.sources)
        documents = sum(source.documents for source in self.sources)
        most = min(self.tokens / TOKENS_PER_EXPERT, documents / DOCUMENTS_PER_EXPERT, MOST_CLUSTERS)
        return max(2, int(most))


def look_at(place: str) -> Look:
    """The text below a folder or URL; raises DataError where there is none, or too little."""
    place = place.rstrip("/") or "/"
    found = [(info.url, info.size) for info in _listed(place) if _is_text(place, info.url)]
    if not found:
        raise DataError(
            f"{redact(place)} must hold text (such as {', '.join(ENDINGS[:5])}, plain or compressed), but has none; "
            "name another folder, or write the settings by hand (docs/text.md)"
        )
    look = Look(place, tuple(_sources(place, found)))
    if look.tokens < LEAST_TOKENS:
        raise DataError(
            f"{redact(place)} must hold text of {LEAST_TOKENS:,} tokens or more, but has about {look.tokens:,.0f}; "
            "add text, or try `modularforge run-all --config configs/quickstart.yaml`, which brings its own"
        )
    return replace(look, sources=tuple(_with_pieces(_with_field(source)) for source in look.sources))


def _listed(place: str) -> Iterable[Any]:
    if paths.is_local(place) and not paths.local_path(place).is_dir():
        raise DataError(f"{place} must be a folder of text, but is none; name the folder that your files lie in")
    try:
        return paths.walk(place)
    except (OSError, StoreError) as error:
        raise DataError(f"{redact(place)} must be a folder of text that can be listed, but: {error}") from error


def _is_text(place: str, url: str) -> bool:
    name = paths.relative(url, place)
    return not any(part.startswith(".") for part in name.split("/")) and _ending(name) is not None


def _ending(name: str) -> str | None:
    """`.jsonl.gz`: the ending by which a file is read; None for what is no text."""
    packed = compression_of(name) or ""
    plain = name[: len(name) - len(packed)].lower()
    return next((ending + packed for ending in ENDINGS if plain.endswith(ending)), None)


def _sources(place: str, found: list[tuple[str, int]]) -> Iterator[Source]:
    """A source for each folder right below the place, if nearly all text lies in several; else one of all."""
    folders: dict[str, list[tuple[str, int]]] = {}
    for url, length in found:
        head, slash, _ = paths.relative(url, place).partition("/")
        folders.setdefault(head if slash else "", []).append((url, length))
    loose = sum(length for _, length in folders.pop("", []))
    if 2 <= len(folders) <= MOST_FOLDERS and loose < 0.1 * sum(length for _, length in found):
        names = Counter(map(_label, folders))
        for folder, files in sorted(folders.items()):
            name = _label(folder) if names[_label(folder)] == 1 else f"{_label(folder)}-{len(folder)}"
            yield _source(name, paths.join(place, folder), files)
        return
    yield _source(_label(place.rsplit("/", 1)[-1]), place, found)


def _label(folder: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", folder).strip("-.") or "text"


def _source(name: str, folder: str, files: list[tuple[str, int]]) -> Source:
    splits: dict[str, list[str]] = {}
    for url, _ in files:
        found = SPLIT.fullmatch(paths.relative(url, folder).split("/")[0])
        word = found[1].lower() if found else ""
        splits.setdefault(SPLITS.get(word, word), []).append(url)
    has_splits = "" not in splits and "train" in splits
    plain = tuple(length * _expansion(url) for url, length in files if _is_plain(url) and length)
    others = [(url, length * _expansion(url)) for url, length in files if not _is_plain(url)]
    documents = sum(max(1.0, length / _document_bytes(url)) if length else 0.0 for url, length in others)
    names = splits if has_splits else {"train": _patterns(folder, files)}
    return Source(name, names, plain, sum(length for _, length in others), documents)


def _patterns(folder: str, files: list[tuple[str, int]]) -> list[str]:
    endings = sorted({str(_ending(url)) for url, _ in files})
    return [paths.join(folder, "**", f"*{ending}") for ending in endings]


def _expansion(url: str) -> float:
    return COMPRESSED if compression_of(url) else PARQUET if url.lower().endswith(".parquet") else 1.0


def _document_bytes(url: str) -> int:
    return ARTICLE_BYTES if str(_ending(url)).startswith(ARTICLES) else RECORD_BYTES


def _is_plain(url: str) -> bool:
    """Whether a file's documents are pieces of it, not records or articles."""
    return not str(_ending(url)).startswith((*RECORDS, ".parquet", *ARTICLES))


def _with_pieces(source: Source) -> Source:
    """With pieces that are short enough for the usual share of documents to be some, where its files are few."""
    wanted = HELD_OUT_DOCUMENTS / USUAL_SHARE
    if not source.is_divided or not source.plain or source.documents >= wanted:
        return source
    source = replace(source, character_bytes=_character_bytes(source))
    piece = sum(source.plain) / source.character_bytes / max(1.0, wanted - source.other_documents)
    digits = 10 ** (len(str(int(piece))) - 2)
    short = replace(source, piece_characters=max(LEAST_PIECE, int(piece / digits) * digits))
    return short if short.documents > source.documents else source


def _character_bytes(source: Source) -> float:
    """Of the beginning of one of its files."""
    for file in find_files(source.splits["train"]):
        if _is_plain(file) and (text := next(read_text(file), "")):
            return len(text.encode()) / len(text)
    return 1.0


def _with_field(source: Source) -> Source:
    """With the name of the field that holds the text, where the first record has another one than `text`."""
    first = next((file for file in source.splits["train"] if str(_ending(file)).startswith(RECORDS)), None)
    if first is None:
        return source
    try:
        record = json.loads(next(read_lines(find_files(first)[0])))
    except (ValueError, StopIteration):
        return source
    texts = (
        {name: value for name, value in record.items() if isinstance(value, str)} if isinstance(record, dict) else {}
    )
    if "text" in texts or not texts:
        return source
    return replace(source, text_field=max(texts, key=lambda name: len(texts[name])))


def write_config(look: Look, name: str) -> str:
    """Settings that fit, as YAML with comments; names the machine's share of the choice."""
    fitting = [step for step in LADDER if _tokens_wanted(step) <= look.tokens * MOST_EPOCHS] or [LADDER[0]]
    chosen, seconds = _quick_enough(look, name, fitting)
    return _text(look, name, chosen, seconds)


def _quick_enough(look: Look, name: str, fitting: list[Any]) -> tuple[Any, float]:
    """The largest of these that this machine trains within `LONGEST_SECONDS`, or the smallest."""
    for step in reversed(fitting):
        config = _config(_text(look, name, step, 0.0))
        seconds = sum(part.flops for part in parts_of(config)) / this_machine(config).flops_per_second
        if seconds <= LONGEST_SECONDS or step is fitting[0]:
            return step, seconds
    raise AssertionError("one is the first")


def _config(text: str) -> Config:
    return make_config(parse_yaml(text.encode()), "the settings that fit")


def _parameters(step: Any) -> int:
    return model_sizes(_shape_of(step), step[0][-1]).parameters


def _shape_of(step: Any) -> Any:
    return ModelConfig(**dict(zip(SHAPE, step[0][:-1], strict=True)))


def _tokens_wanted(step: Any) -> float:
    return USUAL_TOKENS * _parameters(step)


def _text(look: Look, name: str, step: Any, seconds: float) -> str:
    shape, rate, batch = step
    context, experts, parameters = shape[5], look.experts, _parameters(step)
    wanted = min(_tokens_wanted(step), look.tokens * MOST_EPOCHS)
    steps = max(20, math.ceil(wanted / (batch * context)))
    own = min(SHARE_OF_EXPERTS * wanted / experts, MOST_EXPERT_EPOCHS * look.tokens / experts)
    # A batch must fit into half of what is held out for validation, of which chance takes more or less.
    fitted = min(16, max(1, int(look.heldout * look.tokens / 2 / HELD_OUT_DOCUMENTS / context)))
    windows = max(1, int(look.smallest_part / context))  # of which every partition has a batch
    own_batch = min(8, windows)
    is_domain, tokens, often = len(look.sources) > 1, steps * batch * context, max(20, steps // 5)
    lines = {
        "name": json.dumps(name),
        "output_dir": json.dumps(f"runs/{name}"),
        "vocab_size": shape[-1],
        "heldout": f"{100 * look.heldout:.0f} %",
        "share": f"  heldout_fraction: {look.heldout}    # more than the usual 0.01: documents are few\n"
        if look.heldout > USUAL_SHARE
        else "",
        "pieces": PIECES if any(source.piece_characters for source in look.sources) else "",
        "sources": "\n".join(f"    - {{{_source_text(source)}}}" for source in look.sources),
        "method": "domain" if is_domain else "clustered",
        "parts": "a part for each folder" if is_domain else "documents that resemble each other",
        "model": ", ".join(f"{key}: {value}" for key, value in zip(SHAPE, shape[:-1], strict=True)),
        "found": f"{redact(look.place)}: {size(look.tokens * BYTES_PER_TOKEN)}, {look.tokens:,.0f} tokens or so",
        "time": f", about {span(seconds)} here" if seconds else "",
        "parameters": f"{parameters:,}",
        "why": TOO_LITTLE if wanted < _tokens_wanted(step) else ENOUGH,
        "each": f"{tokens:,} tokens, {tokens / parameters:.0f} for each parameter; the text is read "
        f"{tokens / look.tokens:.1f} times",
        "backbone": f"steps: {steps}, batch_size: {batch}, peak_learning_rate: {rate:.1e}, "
        f"warmup_steps: {max(5, steps // 15)}",
        "experts": f"count: {experts}, steps: {max(10, int(own / (own_batch * context)))}, batch_size: {own_batch}, "
        f"peak_learning_rate: {rate * 2 / 3:.1e}, warmup_steps: 5",
        "batch": min(batch, windows),
        "calibration": f"steps: 60, batch_size: {fitted}, peak_learning_rate: {rate / 3:.1e}, warmup_steps: 5",
        "training": f"log_every: 20, validate_every: {often}, checkpoint_every: {often}, validation_tokens: 20000",
    }
    return TEMPLATE.format(**lines)


ENOUGH = (
    f"the largest model whose parameters get {USUAL_TOKENS} tokens each from the text, read at most {MOST_EPOCHS} times"
)
PIECES = """\
    # piece_characters: documents are pieces of files, short ones, so that little of this text is held out and from all
    # of it. Pieces of one file may be in training and in test: files of your own for both measure more.
"""
TOO_LITTLE = (
    f"the smallest model here, for which the text is little: {USUAL_TOKENS} tokens for each parameter are usual"
)
TEMPLATE = """\
# Written by `modularforge init` for {found}.
# Next: modularforge info --config FILE (what it costs), then modularforge run-all --config FILE{time}.
# Every setting: modularforge settings, docs/settings.md.
name: {name}
output_dir: {output_dir}

data:
  vocab_size: {vocab_size}    # small text fills only a small vocabulary
{share}  sources:    # without files of their own, {heldout} of the documents is held out for validation, and for test
{pieces}{sources}

partition: {{method: {method}}}    # {parts}

# {parameters} parameters: {why},
# and that this machine trains within an hour or so.
model: {{{model}}}

# {each}.
backbone: {{{backbone}}}
# Short: a quarter of the backbone's tokens for all experts together, in small batches.
experts: {{{experts}}}
joint: {{batch_size: {batch}}}    # of what the experts are compared with
calibration: {{{calibration}}}

training: {{{training}}}
evaluation: {{tokens_per_domain: 20000, prompts: ["The"]}}
"""


def _source_text(source: Source) -> str:
    fields: dict[str, Any] = {"name": source.name}
    fields |= {split: files[0] if len(files) == 1 else files for split, files in source.splits.items()}
    fields |= {"text_field": source.text_field} if source.text_field != "text" else {}
    fields |= {"piece_characters": source.piece_characters} if source.piece_characters else {}
    return ", ".join(f"{key}: {json.dumps(value)}" for key, value in fields.items())


def save(text: str, path: str) -> None:
    """Write the settings; raises ConfigError where a file lies already."""
    try:
        paths.create_bytes(path, text.encode())
    except FileExistsError as error:
        raise ConfigError(
            f"{path} must not exist yet, but does; name another file with --output, or delete it"
        ) from error
