"""Names and samples within Markdown and its front matter: a parser finds in them nothing but their text."""

from __future__ import annotations

import pytest
import yaml
from markdown_it import MarkdownIt

from checkpoints import Artifact
from checkpoints.manifest import Manifest
from checkpoints.markdown import code, plain, table
from modularforge.assembly.card import _front_matter, model_card
from modularforge.observe.evaluation import markdown
from modularforge.observe.table import listing
from tests.conftest import tiny_config
from tests.synthetic_runs import evaluation

HOSTILE = [
    "a|b", "`a`", "``", "**bold**", "_a_", "a_b_c", "__x__", "[v2](http://x)", "![x](http://t/y.png)", "<img src=x>",
    "# head", "a\n# head", "a\n\n---\nb", "- item", "1. item", "&lt;", "$x_$", "~~gone~~", ":smile:", "\\", "a\\|b",
    "<!-- -->", "```\ncode", "http://x/<b>", "x" * 300, "\x1b[2J", "'\": {a: b}", "*",
]  # fmt: skip
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def shown(text: str) -> str:
    """A name as it must be seen: on one line, with control characters escaped."""
    return " ".join(text.split()).replace("\x1b", "\\x1b")


def inner(source: str) -> list[tuple[str, str]]:
    """(type, content) of everything within the lines of a document."""
    return [(child.type, child.content) for token in PARSER.parse(source) for child in token.children or ()]


def text_of(source: str) -> str:
    return "".join(content for kind, content in inner(source) if kind in ("text", "text_special", "code_inline"))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_text_in_headings_cells_and_lines(name: str) -> None:
    for source in (f"# {plain(name)}", f"x {plain(name)} y", "\n".join(table(["a", "b"], [[plain(name), "1"]]))):
        assert {kind for kind, _ in inner(source)} <= {"text", "text_special"}
        assert shown(name) in text_of(source)
        structure = [token.type for token in PARSER.parse(source)]
        assert structure == [token.type for token in PARSER.parse(source.replace(plain(name), "name"))]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_as_code_is_one_piece_of_code(name: str) -> None:
    assert [kind for kind, _ in inner(f"x {code(name)} y")] == ["text", "code_inline", "text"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_report_has_the_same_structure_whatever_the_names(name: str) -> None:
    def structure(text: str) -> list[str]:
        results = evaluation(2, domains=[text, "law"])
        results["models"] = {**results["models"], text: results["models"]["backbone"]}
        results["routing"] = {text: results["routing"]["assembled"]}
        sample = {"prompt": text, "greedy": text, "sampled": text}
        results |= {"name": text, "chosen": text, "samples": {text: [sample]}}
        tokens = PARSER.parse(markdown(results))
        kinds = [child.type for token in tokens for child in token.children or () if child.type[:4] != "text"]
        return [*(token.type for token in tokens), *kinds]

    assert structure(name) == structure("name")


def test_ordinary_names_stay_as_they_are() -> None:
    for name in (
        "c_code",
        "expert-0",
        "english_novels",
        "a run 2.5 (b), 10 % of it",
        "name: part",
        "Salesforce/wikitext",
    ):
        assert plain(name) == name
    assert code("org/model") == "`org/model`"
    assert listing(["variant", "a"], [["x", "1"]]).markdown() == ["| variant | a |", "| --- | ---: |", "| x | 1 |"]


def artifact(**facts: object) -> Artifact:
    return Artifact("run/part", Manifest("part", "f" * 32, facts=facts))


@pytest.mark.parametrize("name", [*HOSTILE, "org/model", "yes", "1e3", "@x", "a: b", "---", "null"])
def test_the_front_matter_of_a_model_card_is_yaml_whatever_the_base_model(name: str) -> None:
    front = _front_matter(artifact(pretrained={"hub": name, "identity": name}))
    assert front.startswith("---\n")
    assert front.endswith("\n---")
    values = yaml.safe_load(front.removeprefix("---\n").removesuffix("\n---"))
    assert values["base_model"] == name
    assert set(values) == {"library_name", "pipeline_tag", "tags", "base_model"}


def test_the_front_matter_of_an_ordinary_model_is_as_it_was() -> None:
    front = _front_matter(artifact(pretrained={"hub": "org/model", "identity": "x"}))
    assert front.splitlines()[-2:] == ["base_model: org/model", "---"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_model_card_has_the_same_structure_whatever_the_names(name: str, tmp_path: object) -> None:
    def structure(text: str) -> list[str]:
        config = tiny_config(str(tmp_path)).model_copy(update={"name": text})  # settings refuse some of these names
        source = {"name": text, "hub": text, "hub_config": text}
        made = {"config": {"data": {"sources": [source]}, "backbone": {text: text}}}
        count = {"documents": 1, "tokens": 2, "bytes": 3}
        backbone = artifact(pretrained={"hub": text, "identity": text}, provenance={**made, "versions": {text: text}},
                            data={"splits": {"train": {text: count}}})  # fmt: skip
        facts = {"public_expert": True, "parameters": 1, "active_parameters": 1, "experts_per_token": 1,
                 "architecture": text, "router": text}  # fmt: skip
        card = model_card(config, backbone, [artifact(index=text, provenance=made)], facts, "A model.")
        body = card.split("\n---\n", 1)[1] if "\n---\n" in card else card
        return [token.type for token in PARSER.parse(body)]

    assert structure(name) == structure("name")
