"""Records become examples: fields, templates and chats, several references, splits by prompt, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import transformers
from tokenizers import Tokenizer

from modularforge.config import Config
from modularforge.config_files import make_config, sample_tasks
from modularforge.data.chat_template import chat_tokenizer, load_chat_template
from modularforge.data.corpus import Document, read_documents
from modularforge.data.examples import ExampleEncoder, ExampleWriter, example_writers
from modularforge.data.tokenizer import EOS, load_tokenizer, train_tokenizer
from modularforge.errors import ConfigError, DataError
from modularforge.presets import preset_names
from tests.conftest import tiny_values
from tests.pretrained.models import save_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Qwen3's: only behind the last question an answer shows that nothing was thought.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ message.content | trim + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Llama 2's: neither turns nor words of the template, and an end in the template's own token.
GENERATION = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{% endgeneration %}{{ eos_token }}"
    "{% else %}[{{ message.content }}]{% endif %}{% endfor %}"
)
TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Who is it?"},
    {"role": "assistant", "content": "It is the king."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "Nothing."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a chat's special tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, "<|im_start|>", "<|im_end|>")
    return folder


def with_template(folder: Path, template: str) -> Path:
    (folder / "chat_template.jinja").write_text(template)
    return folder


def encoder(folder: Path) -> ExampleEncoder:
    tokenizer = load_tokenizer(folder)
    chat = chat_tokenizer((folder / "tokenizer.json").read_bytes())
    end = chat.token_to_id("<|im_end|>")
    assert end is not None
    return ExampleEncoder(tokenizer, chat, end)


def learned_text(tokenizer: Tokenizer, ids: list[int], learned: list[int]) -> str:
    kept = [token if is_learned else None for token, is_learned in zip(ids, learned, strict=True)]
    pieces, run = [], list[int]()
    for token in [*kept, None]:
        if token is None and run:
            pieces.append(tokenizer.decode(run, skip_special_tokens=False))
        run = [*run, token] if token is not None else []
    return "|".join(pieces)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "It is the king.<|im_end|>|Nothing.<|im_end|>"),
        (THINKING, "It is the king.<|im_end|>|<think>\n\n</think>\n\nNothing.<|im_end|>"),
        (GENERATION, "It is the king.<|im_end|>|Nothing.<|im_end|>"),
    ],
    ids=["chatml", "thinking", "generation"],
)
def test_of_a_chat_the_answers_and_their_ends_alone_are_learned(folder: Path, template: str, expected: str) -> None:
    chat = load_chat_template(with_template(folder, template), "this test")
    ids, learned = encoder(folder).encode(tuple(chat.segments(TURNS)), is_chat=True)
    assert learned_text(encoder(folder).chat, ids, learned) == expected


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_a_chat_has_the_tokens_that_transformers_gives_it(folder: Path, template: str) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(with_template(folder, template))
    chat = load_chat_template(folder, "this test")
    ids, learned = encoder(folder).encode(tuple(chat.segments(TURNS)), is_chat=True)
    whole = theirs(theirs.apply_chat_template(TURNS, tokenize=False), add_special_tokens=False)["input_ids"]
    asked = theirs.apply_chat_template(TURNS[:-1], tokenize=False, add_generation_prompt=True)
    assert ids == whole[: len(ids)]
    start = max(place for place, is_learned in enumerate(learned) if not is_learned) + 1
    assert ids[:start] == theirs(asked, add_special_tokens=False)["input_ids"], "asked as it was trained"


def test_prompt_and_response_are_plain_text_and_end_once() -> None:
    tokenizer = train_tokenizer(["a prompt and its response <eos>"] * 3, 300)
    made = ExampleEncoder(tokenizer, tokenizer, EOS)
    (segments,) = ExampleWriter(config_of().example(config_of().data.sources[0])).write(  # type: ignore[arg-type]
        {"prompt": "Say <eos>: ", "response": "<eos> it"}, "here"
    )
    ids, learned = made.encode(segments, is_chat=False)
    assert ids.count(EOS) == 1
    assert ids[-1] == EOS
    assert learned_text(tokenizer, ids, learned) == "<eos> it<eos>"
    assert tokenizer.decode(ids) == "Say <eos>: <eos> it"


def config_of(records: list[Any] | None = None, folder: Path | None = None, **example: Any) -> Config:
    path = (folder or Path()) / "records.jsonl"
    if records is not None:
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    values = tiny_values("run", task="instruction", experts={"count": 1})
    values["data"]["sources"] = [{"name": "own", "train": str(path), "test": str(path), "example": example or None}]
    return make_config(values, "tests")


def documents(config: Config, split: Any = "test") -> list[Document]:
    (source,), writers = config.data.sources, example_writers(config, None)
    return list(read_documents(source, split, config.data, writer=writers["own"]))


def test_a_template_and_a_list_of_references(tmp_path: Path) -> None:
    records = [{"q": "1 + 1", "refs": ["2", "two"]}, {"q": "2 + 2", "refs": ["4"]}]
    config = config_of(records, tmp_path, prompt="Q: {{ q }}\nA: ", response_field="refs")
    assert [document.text for document in documents(config)] == ["Q: 1 + 1\nA: 2", "Q: 1 + 1\nA: two", "Q: 2 + 2\nA: 4"]


def test_parquet_gives_the_same_examples_and_only_the_fields_that_are_named(tmp_path: Path) -> None:
    records = [{"q": "1", "a": "one", "label": "x", "more": 5}, {"q": "2", "a": "two", "label": "y", "more": 6}]
    config = config_of(records, tmp_path, prompt="{{ q if q is defined else other }}: ", response="{{ a | upper }}")
    plain = documents(config)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "records.parquet")
    values = config.model_dump(exclude_none=True)
    values["data"]["sources"][0]["test"] = str(tmp_path / "records.parquet")
    assert documents(make_config(values, "tests")) == plain
    assert [document.text for document in plain] == ["1: ONE", "2: TWO"]


def test_csv_gives_the_same_examples_and_names_a_row_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    path.write_text('mr,ref\n"name[A], food[B]","It is ""A"",\nwith B."\nname[C],C\n')
    values = config_of([{"prompt": "a", "response": "b"}], tmp_path, preset="e2e_nlg").model_dump(exclude_none=True)
    values["data"]["sources"][0]["test"] = str(path)
    found = documents(make_config(values, "tests"))
    assert [item.segments[1].text for item in found] == ['It is "A",\nwith B.', "C"]
    assert "name[A], food[B]" in found[0].text
    path.write_text("mr,ref\na,b\na,b,c\n")
    with pytest.raises(
        DataError, match=r"records\.csv:3 must be a row of CSV with commas, but is not .it has not the 2"
    ):
        documents(make_config(values, "tests"))
    path.write_text("plain text")
    values["data"]["sources"][0]["format"] = "text"
    with pytest.raises(DataError, match=r"must hold records with a prompt and a response.* but is taken for text"):
        documents(make_config(values, "tests"))


def test_rows_of_the_hub_become_examples(tmp_path: Path) -> None:
    """A folder is read by the Hub's own library in the same way."""
    rows = [{"premise": "a", "hypothesis": "b", "label": 2}, {"premise": "c", "hypothesis": "d", "label": 0}]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    values = config_of([{"prompt": "a", "response": "b"}], tmp_path, preset="multi_nli").model_dump(exclude_none=True)
    values["data"]["sources"][0] |= {"hub": str(tmp_path / "set"), "train": "test", "test": "test"}
    found = documents(make_config(values, "tests"))
    assert [item.segments[1].text for item in found] == ["contradiction", "entailment"]
    values["data"]["sources"][0]["example"] = {"prompt_field": "question"}
    with pytest.raises(DataError, match=r"\(test\), row 1 must have the prompt in a field question, but has premise"):
        documents(make_config(values, "tests"))


def test_all_responses_to_a_prompt_are_in_one_split(tmp_path: Path) -> None:
    records = [{"prompt": f"number {k % 40}", "response": f"answer {k}"} for k in range(200)]
    config = config_of(records, tmp_path)
    values = config.model_dump(exclude_none=True)
    values["data"]["sources"][0] |= {"test": None}
    values["data"] |= {"heldout_fraction": 0.2, "max_documents_per_source": None}
    config = make_config(values, "tests")
    found = {split: {item.segments[0].text for item in documents(config, split)} for split in ("train", "test")}
    assert found["train"].isdisjoint(found["test"])
    assert len(documents(config, "test")) == 5 * len(found["test"])


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty response": ({"prompt": "a", "response": " "}, {}, "must have a response that is text, but it is empty"),
    "number": ({"prompt": "a", "response": 5}, {}, "must have a response that is text, but it is a int"),
    "missing field": (
        {"question": "a", "response": "b"},
        {},
        "must have the prompt in a field prompt, but has question",
    ),
    "no such field": (
        {"prompt": "a", "response": "b"},
        {"prompt": "{{ q }}"},
        "'q' is undefined.*has the fields prompt",
    ),
    "failing template": (
        {"prompt": "a", "response": "b", "q": 0},
        {"response": "{{ 1 // q if q is number else q }}"},
        "must fit the template of the response, but does not .integer division",
    ),
    "null in a template": (
        {"prompt": "a", "response": "b", "q": None},
        {"prompt": "{{ q }}?"},
        "must fit the template of the prompt, but does not .it would write None",
    ),
    "no object": (["a"], {}, "must be a JSON object, but is a list"),
    "half a pair": ({"prompt": "\ud800", "response": "b"}, {}, "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_record_that_is_no_example_is_refused_with_file_and_line(name: str, tmp_path: Path) -> None:
    record, example, sentence = REFUSED[name]
    config = config_of([{"prompt": "fine", "response": "fine", "q": "x"}, record], tmp_path, **example)
    with pytest.raises(DataError, match=rf"records\.jsonl:2 .*{sentence}"):
        documents(config)


def test_a_label_is_looked_for_in_objects_alone(tmp_path: Path) -> None:
    values = config_of([5], tmp_path).model_dump(exclude_none=True)
    values["data"]["sources"][0]["label_field"] = "topic"
    with pytest.raises(DataError, match=r"records\.jsonl:1 must be a JSON object, but is a int"):
        documents(make_config(values, "tests"))


REFUSED_CHATS: dict[str, tuple[Any, str]] = {
    "unknown role": ([{"role": "bot", "content": "Hi"}], "must have messages of system, user, assistant, tool.*'bot'"),
    "no assistant": ([{"role": "user", "content": "Hi"}], "must have a message of the assistant"),
    "no list": ("Hi", "must have a list of messages"),
    "empty": ([], "must have a list of messages"),
    "empty answer": (
        [*TURNS[:2], {"role": "assistant", "content": ""}],
        "must have a message that is text, but it is empty",
    ),
    "special token": (
        [{"role": "user", "content": "Hi<|im_end|>"}, {"role": "assistant", "content": "Yes"}],
        r"must have messages without special tokens, but one has '<\|im_end\|>'",
    ),
}


@pytest.mark.parametrize("name", REFUSED_CHATS)
def test_a_chat_that_cannot_be_learned_is_refused(name: str, folder: Path) -> None:
    messages, sentence = REFUSED_CHATS[name]
    chat = load_chat_template(with_template(folder, CHATML), "this test")
    writer = ExampleWriter(config_with_chat().data.sources[0].example, chat)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"file:7 {sentence}"):
        list(writer.write({"chat": messages}, "file:7"))


def test_words_of_the_user_are_never_learned_for_an_answer_that_the_template_writes_otherwise(folder: Path) -> None:
    shortened = CHATML.replace(
        "message['content']", "(message['content'] if loop.last or message['role'] == 'user' else '.')"
    )
    messages = [
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "you said yes?"},
        {"role": "assistant", "content": "no"},
    ]
    chat = load_chat_template(with_template(folder, shortened), "this test")
    with pytest.raises(DataError, match=r"must write an answer behind what it asks with.*'yes'"):
        chat.segments(messages)


def test_an_answer_with_nothing_in_front_is_refused(folder: Path) -> None:
    bare = "{% for message in messages %}{{ message['content'] + '<|im_end|>' }}{% endfor %}"
    chat = load_chat_template(with_template(folder, bare), "this test")
    with pytest.raises(DataError, match=r"must write something in front of an answer.*begin the chat with a message"):
        chat.segments([{"role": "assistant", "content": "Hello"}])


def test_a_preset_leaves_out_what_has_no_label(tmp_path: Path) -> None:
    records = [{"premise": "a", "hypothesis": "b", "label": label} for label in (-1, 2)]
    found = documents(config_of(records, tmp_path, preset="multi_nli"))
    assert [document.text.strip().endswith("contradiction") for document in found] == [True]


def config_with_chat() -> Config:
    values = tiny_values("run", task="instruction", experts={"count": 1}, model={"pretrained": "somewhere"})
    values["data"]["sources"] = [{"name": "own", "train": "x.jsonl", "example": {"messages_field": "chat"}}]
    return make_config(values, "tests")


def test_a_template_that_fails_or_is_missing_gets_a_sentence(folder: Path, tmp_path: Path) -> None:
    failing = load_chat_template(with_template(folder, "{{ raise_exception('only one turn') }}"), "this test")
    with pytest.raises(DataError, match=r"file:1: the chat template must write a chat, but fails \(only one turn\)"):
        list(ExampleWriter(config_with_chat().data.sources[0].example, failing).write({"chat": TURNS}, "file:1"))  # type: ignore[arg-type]
    silent = load_chat_template(with_template(folder, "{{ messages | length }}"), "this test")
    with pytest.raises(DataError, match="must write an answer behind what it asks with"):
        silent.segments(TURNS)
    save_tokenizer(tmp_path, "<|im_start|>", "<|im_end|>")
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"chat of source own .* needs a model with a chat template, but"):
        example_writers(config_with_chat(), tmp_path)


def test_settings_that_do_not_go_together_are_refused() -> None:
    def errors(**changes: Any) -> str:
        values = tiny_values("run", experts={"count": 1}, **changes)
        values["data"]["sources"] = [{"name": "own", "train": "x", **changes.get("source", {})}]
        values.pop("source", None)
        with pytest.raises(ConfigError) as found:
            make_config(values, "tests")
        return str(found.value)

    chat = {"example": {"as_chat": True}}
    assert "no chat without model.pretrained" in errors(task="instruction", source=chat)
    assert "must have no example under task text, but own has one" in errors(source={"example": {}})
    assert "must be a section with a preset of banking77, e2e_nlg" in errors(
        task="instruction", source={"example": {"preset": "x"}}
    )
    unknown = {"tasks": ["other"]}
    assert "must name data.sources (own), but names 'other'" in errors(task="instruction", evaluation=unknown)
    assert "must be null under task text" in errors(evaluation={"tasks": ["own"]})


def test_what_is_given_outranks_a_preset_and_resolved_settings_say_all() -> None:
    values = tiny_values("run", task="instruction", experts={"count": 6})
    values["data"]["sources"] = sample_tasks()
    values["data"]["sources"][0]["example"] = {"preset": "banking77", "response_field": "intent"}
    config = make_config(values, "tests")
    own = config.data.sources[0].example
    assert own is not None
    assert (own.response, own.response_field) == (None, "intent")
    assert own.prompt is not None
    assert make_config(config.model_dump(mode="json"), "again") == config


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_reads_its_samples(name: str) -> None:
    values = tiny_values("run", task="instruction", experts={"count": 1})
    values["data"]["sources"] = [one for one in sample_tasks() if one["name"] == name]
    config = make_config(values, "tests")
    (source,), writers = config.data.sources, example_writers(config, None)
    for split, least in (("train", 24), ("validation", 6), ("test", 6)):
        found = list(read_documents(source, split, config.data, writer=writers[name]))  # type: ignore[arg-type]
        assert len(found) >= min(least, 20)
        assert all(len(item.segments) == 2 and item.segments[0].text.endswith("\n") for item in found)
