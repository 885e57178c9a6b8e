"""Real documents in which passages of another kind stand, as files for `evaluation.general` or a study's `texts`.

    python benchmarks/mixed_texts.py texts OUTPUT --split valid

reads `FOLDER/DOMAIN/SPLIT.jsonl.gz` and writes OUTPUT/NAME.jsonl, one for each rule:

- `proposals_with_code`: PEPs and EIPs (domain `standards`) with blocks of code: ``` fences in Markdown, and in
  reStructuredText the indented lines behind a paragraph that ends with `::` or a `code-block`;
- `python_with_prose`: Python files (domain `python_code`) with docstrings;
- `c_with_prose`: C files (domain `c_code`) with block comments, licences among them.

A passage of the other kind counts from 200 characters on, and at 4,000 it is cut. A document is the passages of one
source document with up to 500 characters around each, what lies further off left out; it needs at least two passages.
Every document of the split is looked at, in order, and none is chosen by hand or by any model.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHORTEST, LONGEST, AROUND, FEWEST = 200, 4000, 500, 2


@dataclass(frozen=True)
class Rule:
    """Where documents come from, and what a passage of the other kind looks like (the pattern's first group)."""

    name: str
    domain: str
    pattern: re.Pattern[str]


LITERAL = r"(?:::[ ]*|^\.\. code(?:-block)?::[^\n]*)\n(?:[ \t]*\n)+(?P<literal>(?:[ \t]+\S[^\n]*\n|[ \t]*\n)+)"
FENCED = r"^```[^\n]*\n(?P<fenced>.*?)^```"
RULES = [
    Rule("proposals_with_code", "standards", re.compile(f"{FENCED}|{LITERAL}", re.MULTILINE | re.DOTALL)),
    Rule("python_with_prose", "python_code", re.compile(r'"""(?P<docstring>(?:[^"\\]|\\.|"(?!""))*)"""')),
    Rule("c_with_prose", "c_code", re.compile(r"/\*(?P<comment>.*?)\*/", re.DOTALL)),
]


def passages(text: str, rule: Rule) -> Iterator[tuple[int, int]]:
    """Beginning and end of each passage of the other kind that is long enough."""
    for match in rule.pattern.finditer(text):
        start, end = match.span(str(match.lastgroup))
        if len(text[start:end].strip()) >= SHORTEST:
            yield start, min(end, start + LONGEST)


def excerpt(text: str, found: list[tuple[int, int]]) -> str:
    """The passages with what stands around them, from line to line."""
    pieces: list[tuple[int, int]] = []
    for start, end in found:
        first = text.rfind("\n", 0, max(0, start - AROUND)) + 1
        last = text.find("\n", min(len(text), end + AROUND))
        last = len(text) if last < 0 else last + 1
        if pieces and first <= pieces[-1][1]:
            pieces[-1] = (pieces[-1][0], max(last, pieces[-1][1]))
        else:
            pieces.append((first, last))
    return "".join(text[first:last] for first, last in pieces)


def documents(folder: Path, split: str, rule: Rule) -> Iterator[dict[str, str]]:
    """The excerpts of one domain's split."""
    with gzip.open(folder / rule.domain / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            document = json.loads(line)
            if len(found := list(passages(document["text"], rule))) >= FEWEST:
                yield {"text": excerpt(document["text"], found), "source": document.get("source", "")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--split", default="valid")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for rule in RULES:
        found = list(documents(options.folder, options.split, rule))
        lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in found)
        (options.output / f"{rule.name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{rule.name}: {len(found)} documents, {sum(len(item['text']) for item in found):,} characters")


if __name__ == "__main__":
    main()
