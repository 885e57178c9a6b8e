"""YAML is read as its version 1.2 says, names occur once, and whatever the input, a reader fails with a sentence."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modularforge.config import Config, Prose
from modularforge.config_files import load_config, make_config, read_yaml, to_yaml
from modularforge.errors import ConfigError
from modularforge.mistakes import LISTED_MISTAKES
from modularforge.study.study_file import load_study, variants_of
from modularforge.yaml_text import MAX_BYTES, parse_yaml, to_yaml_text
from tests import mutation
from tests.conftest import ROOT, tiny_values
from tests.fuzzing import allows_only

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(30)
)


def complaint(*changes: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, changes)
    return str(caught.value)


def test_a_name_that_is_there_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("name: x\n\nbackbone:\n  steps: 1\nseed: 0\nbackbone: {warmup_steps: 3}\n")
    with pytest.raises(ConfigError, match="backbone is there twice, lines 3 and 6"):
        read_yaml(str(path))
    with pytest.raises(ConfigError, match="name is there twice"):
        load_study(str(_file(tmp_path, "name: a\nname: b\n")))
    assert "steps is there twice" in complaint("backbone={steps: 1, steps: 2}")


def test_merge_keys_go_on_working() -> None:
    read = parse_yaml("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\nz: {<<: [*x, {c: 4}], a: 5}\n")
    assert read["y"] == {"a": 1, "b": 3}
    assert read["z"] == {"a": 5, "b": 2, "c": 4}


def test_what_an_alias_stands_for_is_changed_in_one_place_only(tmp_path: Path) -> None:
    path = _file(
        tmp_path, Path(QUICKSTART).read_text().split("backbone:")[0] + "backbone: &b {steps: 7}\nexperts: *b\n"
    )
    config = load_config(str(path), ["backbone.steps=9"])
    assert (config.backbone.steps, config.experts.steps) == (9, 7)


@pytest.mark.parametrize(
    "text", ["12:00:00", "010", "0x10", "0b1", "1_000", "yes", "NO", "on", "Off", "2001-02-30", "="]
)
def test_words_of_older_yaml_stay_text(text: str) -> None:
    assert parse_yaml(f"[{text}]") == [text]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e5", 1e5), ("1e-3", 1e-3), ("1.0e-05", 1e-5), (".5", 0.5), ("+.5E+2", 50.0), ("-12", -12), ("TRUE", True)],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


@pytest.mark.parametrize(
    ("change", "end"),
    [
        ("cluster.expert.time_minutes=12:00:00", "must be a whole number, but is '12:00:00'; write 720"),
        ("cluster.expert.time_minutes=1-00:00:30", "write 1441"),
        ("cluster.warning_seconds=00:02:00", "write 120"),
        ("seed=010", "seed must be a whole number, but is '010'; write 10"),
        ("seed=0x10", "write 16"),
        ("seed=1_000", "write 1000"),
        ("backbone.steps=yes", "must be a whole number, but is 'yes'; change it"),
        ("backbone.steps=true", "must be a whole number, but is True; change it"),
        ("training.compile=yes", "must be true or false, but is 'yes'; write true"),
        ("training.compile=0", "must be true or false, but is 0; write false"),
        ("name=1e5", "name must be a text, but is 100000.0; put it in quotes"),
        ("name=2024", "put it in quotes"),
        ("output_dir=true", "put it in quotes"),
        ("output_dir=null", "output_dir must be a text, but is None; put it in quotes"),
        ("data.sources=[{name: a, train: 7}]", "train must be a text or a list, but is 7; put it in quotes"),
        ("cluster.sbatch_options={mem: 1.5}", "but is 1.5; put it in quotes"),
        ("seed=1.5", "seed must be a whole number, but is 1.5; change it"),
        ("backbone.steps=1" + "0" * 30, "must be a number of less than twenty digits"),
        ("backbone.weight_decay=1e999", "must be a finite number"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused_with_what_to_write(change: str, end: str) -> None:
    assert end in complaint(change)


def test_text_becomes_a_number_only_where_one_is_wanted() -> None:
    changes = ['name="1e5"', 'backbone.steps="200"', "experts.steps=1e2", "backbone.peak_learning_rate='1e-3'"]
    config = load_config(QUICKSTART, [*changes, "cluster.sbatch_options={begin: 18:00, nice: 010, exclusive: yes}"])
    assert (config.name, config.backbone.steps, config.experts.steps) == ("1e5", 200, 100)
    assert config.backbone.peak_learning_rate == 1e-3
    assert config.cluster.sbatch_options == {"begin": "18:00", "nice": "010", "exclusive": "yes"}
    assert load_config(QUICKSTART, ["name=2001-02-30"]).name == "2001-02-30"


@pytest.mark.parametrize(
    "text",
    [
        "!!int x", "!!timestamp x", "!!python/object:os.system x", "!!binary aGk=", "!!set {a}", "!!omap [a: 1]",
        "!x y",
        "9" * 5000, "[" * 3000, "{a: " * 3000, "- " * 3000, "&a [*a]", "*a", BOMB, "1: 2", "{[a]: 1}", "a: \x01",
        '"\\ud800"',
        '"\\U99999999"', "a\n---\nb", "%YAML 3.0\n--- a", "<<: 1", "x" * (MAX_BYTES + 1), "- a\n" * 200_000,
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_one_short_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_yaml(text)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_a_file_in_another_encoding_is_read_or_refused_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes("name: é\n".encode("utf-16"))
    assert read_yaml(str(path)) == {"name": "é"}
    path.write_bytes("\ufeffname: é\n".encode())
    assert read_yaml(str(path)) == {"name": "é"}
    for content in ("name: é\n".encode("utf-16-le"), b"name: \xe9\n", b"PK\x03\x04\x00\x00"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="save it as plain UTF-8 text"):
            read_yaml(str(path))


def test_a_huge_file_is_read_no_further_than_needed(tmp_path: Path) -> None:
    with open(tmp_path / "weights.bin", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ConfigError, match="larger than 2 MiB"):
        read_yaml(str(tmp_path / "weights.bin"))


def test_messages_are_short_whatever_the_settings() -> None:
    values = tiny_values("out") | {f"{'x' * 1000}{number}": "y" * 1_000_000 for number in range(50)}
    values["evaluation"] = {"prompts": [0] * 5000}
    with pytest.raises(ConfigError) as caught:
        make_config(values, "here")
    assert "5050 mistake(s)" in str(caught.value)
    assert str(caught.value).endswith("more")
    assert len(str(caught.value)) < 10_000
    assert len(str(caught.value).splitlines()) <= LISTED_MISTAKES + 2


def test_messages_hold_no_secrets() -> None:
    assert "hunter22" not in complaint("data.sources=s3://me:hunter22@host/x")
    assert "hunter22" not in complaint("seed='https://h/x?X-Amz-Signature=hunter22'")


@example("a\x85\u2028b\r\n c ")
@given(
    st.recursive(
        st.text() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.booleans() | st.none(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
@settings(max_examples=300)
def test_what_is_written_is_read_as_the_same(value: Any) -> None:
    assert parse_yaml(to_yaml_text({"x": value})) == {"x": value}


@pytest.mark.parametrize(
    "text",
    ["1e5", "+.5", "1e-3", "yes", "012", "12:30:00", "~", "2001-02-03", "", "=", "<<", "1_0", ".inf", "0x1f", "null"],
)
def test_text_that_looks_like_something_else_is_quoted_for_every_reader(text: str) -> None:
    written = to_yaml_text({"x": text})
    assert parse_yaml(written) == yaml.safe_load(written) == {"x": text}


@pytest.mark.parametrize("name", ["default", "quickstart", "small", "domains", "cluster", "cluster-cpu"])
def test_shipped_settings_mean_the_same_as_ever_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    config = load_config(str(path))
    assert read_yaml(str(path)) == yaml.safe_load(path.read_text())
    assert to_yaml(config) == yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    assert load_config(str(_file(tmp_path, to_yaml(config)))) == config


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a\n", "é" * 70_000])
def test_names_in_a_study_file_stay_within_its_folder(name: str, tmp_path: Path) -> None:
    text = to_yaml_text(
        {"name": "x", "base": "b", "output_dir": "o", "recipes": {name: {}}, "variants": {"v": {"kind": "soup"}}}
    )
    with pytest.raises(ConfigError, match="as it names a folder"):
        load_study(str(_file(tmp_path, text)))


def test_values_in_a_grid_stay_within_the_study_s_folder(tmp_path: Path) -> None:
    study = (ROOT / "configs" / "study-quick.yaml").read_text()
    values = parse_yaml(study)
    values["variants"] = {"v": {"kind": "assembled", "set": {"assembly.router": ["evidence", "../../x"]}}}
    found = variants_of(load_study(str(_file(tmp_path, to_yaml_text(values)))))
    assert [variant.name for variant in found] == ["v-router_evidence", "v-router_.._.._x"]


def _file(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return path


SEEDS = [
    (ROOT / "configs" / name).read_bytes() for name in ("quickstart.yaml", "cluster.yaml")
] + [b"a: &a [x, y]\nb: {<<: {c: *a}, d: 1e-3}\n", BOMB.encode()]  # fmt: skip
CHANGES = [
    b"name=x", b"seed=3", b"backbone.steps=1e2", b"data.sources=[{name: a, train: [x, y]}]", b"output_dir=s3://b/c",
    b"cluster.sbatch_options={begin: 18:00}", b"cluster.setup=[module load x]", b"evaluation.prompts=['a', \"b\\n\"]",
    b"model.rope_scaling={rope_type: yarn, factor: 2}", b"seed=2001-99-99",
    b"backbone={<<: &a {steps: 1}, warmup_steps: 2}",
]  # fmt: skip


@pytest.mark.timeout(1800)  # with ten thousand inputs, on a busy machine
def test_mutated_settings_files_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        make_config(read_yaml(str(path)), "x.yaml")

    allows_only(ConfigError, mutation.texts(SEEDS), read)


@pytest.mark.timeout(1800)  # with ten thousand inputs, on a busy machine
def test_mutated_values_of_settings_are_accepted_or_refused() -> None:
    good = parse_yaml(SEEDS[1])
    good["cluster"] |= {"sbatch_options": {"a": "b"}, "setup": ["x"]}
    allows_only(ConfigError, mutation.values(good), lambda values: to_yaml(make_config(values, "x")).encode())


@pytest.mark.timeout(1800)  # with ten thousand inputs, on a busy machine
def test_mutated_changes_on_the_command_line_are_accepted_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = read_yaml(QUICKSTART)
    monkeypatch.setattr("modularforge.config_files.read_yaml", lambda _: copy.deepcopy(base))
    changes = (content.decode(errors="surrogateescape") for content in mutation.texts(CHANGES))
    allows_only(ConfigError, changes, lambda change: to_yaml(load_config(QUICKSTART, [change])).encode())


@pytest.mark.timeout(1800)  # with ten thousand inputs, on a busy machine
def test_mutated_study_files_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    seed = (ROOT / "configs" / "study-quick.yaml").read_bytes()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        variants_of(load_study(str(path)))

    half = mutation.FUZZ_INPUTS // 2
    allows_only(ConfigError, mutation.texts([seed], half), read)
    allows_only(
        ConfigError,
        mutation.values(parse_yaml(seed), half),
        lambda values: read(to_yaml_text(values).encode(errors="surrogatepass")),
    )


def test_every_text_setting_is_one_line_but_prompts() -> None:
    """The kind is closed by types: a plain `str` in the settings would let a line break through."""

    def plain(schema: Any, place: str) -> Iterator[str]:
        if isinstance(schema, dict):
            if schema.get("type") == "string" and not {"pattern", "enum", "const"} & set(schema):
                yield place
            for name, inner in schema.items():
                yield from plain(inner, f"{place}.{name}")
        elif isinstance(schema, list):
            for inner in schema:
                yield from plain(inner, place)

    assert list(plain(Config.model_json_schema(), "settings")) == []
    assert Prose.__metadata__[0].metadata  # type: ignore[attr-defined]
