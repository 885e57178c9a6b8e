"""What is shown on a terminal: names stay names, whatever language they look like."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

import checkpoints.__main__
import launcher.__main__
import modularforge.cli
from checkpoints import screen, write_artifact
from modularforge.observe.evaluation import print_table
from tests.conftest import ROOT, run_command
from tests.synthetic_runs import evaluation
from tests.test_imports import imports, python_files

HOSTILE = [
    "sweep [/final]",
    "[v2]",
    "[en]",
    ":smile:",
    "[red]x",
    "total",
    "\x1b[2Jgone",
    "a\u202eb",
    "[link=file:///x]y",
]


def test_only_one_file_makes_tables_consoles_and_bars() -> None:
    """Elsewhere a string would be read as markup; `rich.filesize` only formats numbers."""
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for folder in ("checkpoints", "modularforge", "launcher", "benchmarks", "slurm")
        for path in python_files(folder)
        for line, module in imports(path)
        if module.startswith("rich") and not module.startswith("rich.filesize") and path.name != "screen.py"
    ]
    assert found == []


def helps(command: Any) -> Iterator[str]:
    """All texts of a command's help, and of the commands below it."""
    yield command.help or ""
    yield from (getattr(parameter, "help", None) or "" for parameter in command.params)
    for below in getattr(command, "commands", {}).values():
        yield from helps(below)


@pytest.mark.parametrize("program", [modularforge.cli, launcher.__main__, checkpoints.__main__])
def test_no_help_has_what_would_be_read_as_markup(program: Any) -> None:
    """typer gives its help to rich as markup; these texts are ours, so that they only must have none."""
    assert [text for text in helps(typer.main.get_command(program.app)) if "[" in text] == []


@pytest.mark.parametrize("name", HOSTILE)
def test_a_table_shows_names_as_they_are(name: str) -> None:
    file = io.StringIO()
    made = screen.table([name, "b"], [[name, "1"]], title=name, numbers_from=1, marked=0)
    screen.console(file=file, width=100).print(made)
    assert file.getvalue().count(screen.literal(name)) == 3
    assert "\x1b" not in file.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bar_shows_its_name_and_note_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(screen, "console", lambda **_: Console(file=file, width=200, force_terminal=True))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with screen.progress(name, 3, "steps", 0) as bar:
        bar.advance(1, name)
        bar.advance(1, "")
    assert screen.literal(name) in file.getvalue()
    assert "\x1b[2Jgone" not in file.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_the_table_of_an_evaluation_shows_every_domain_and_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    results = {**evaluation(2, domains=[name, "active", "training tokens"]), "name": name}
    print_table(results)
    shown = capsys.readouterr().out
    assert shown.count(screen.literal(name).replace("_", "\n")) >= 2, "in the title and as a column"
    table = shown.split("Not worth it")[0].split("Worth it")[0]
    assert table.count("active") == 2, "the count and the domain of that name"
    assert "training tokens" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("name", "shown"),
    [("english_novels", "english\nnovels"), ("_hidden", "_hidden"), ("__x__", "__x__"), ("a_b_c", "a\nb\nc")],
)
def test_a_name_is_broken_between_its_words_and_loses_none_of_its_signs(name: str, shown: str) -> None:
    assert screen.breakable(name, "\n") == shown
    assert screen.breakable(name, "_") == name


def test_no_table_is_cut_because_a_pipe_or_a_screen_is_narrow(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{letter * 40}/step-00000010" for letter in "abcd"]
    screen.show(screen.table(["artifact", *names], [[*names, "1"]]))
    screen.show(screen.table(names, [["1"] * 4], numbers_from=0))
    shown = capsys.readouterr().out
    assert [shown.count(name) for name in names] == [3] * 4


def test_a_listing_shows_the_folders_as_they_are(tmp_path: Path) -> None:
    for name in ("run[/x]", "[v2]", ":smile:"):
        with write_artifact(str(tmp_path / name), "test", "f" * 32) as writer:
            writer.write_json("a.json", {})
            writer.commit()
    shown = run_command("checkpoints", "ls", str(tmp_path)).stdout
    assert all(name in shown for name in ("run[/x]", "[v2]", ":smile:"))


def test_what_is_said_has_no_terminal_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    screen.say("a\x1b[2J\u202e\x07\n\tb\r\ud83d")
    assert capsys.readouterr().out == "a\\x1b[2J\\u202e\\x07\n\tb\\r\\ud83d\n"
    done = run_command("modularforge", "report", "\x1b[2Jrun [/x]", check=False)
    assert done.returncode == 2
    assert "\\x1b[2Jrun [/x]" in done.stderr
    assert "\x1b" not in done.stderr


def test_log_lines_have_neither_secrets_nor_terminal_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_Planted")
    try:
        raise ValueError("hf_Planted\x1b[2J")
    except ValueError:
        record = logging.LogRecord("x", logging.INFO, "", 1, "%s at %s", ("hf_Planted", "http://a:b@c"), sys.exc_info())
    line = screen.LogFormatter("%(message)s").format(record)
    assert line.startswith("*** at http://***@c\nTraceback")
    assert line.endswith("ValueError: ***\\x1b[2J")


def test_the_store_speaks_as_the_rest_of_a_program_does() -> None:
    lines = "import logging; logging.getLogger('checkpoints').warning('a\\x1b %s', 'http://me:pw@host')"
    program = f"from modularforge.log import configure_logging; configure_logging(); {lines}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert re.fullmatch(r"\d\d:\d\d:\d\d a\\x1b http://\*\*\*@host\n", done.stderr), done.stderr


def test_nothing_reaches_the_streams_with_a_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_Planted")
    with screen.safe_streams():
        print("hf_Planted")
        sys.stderr.writelines(["hf_Planted\n"])
        logging.getLogger("somebody").error("hf_Planted")
        assert sys.stdout.isatty() is False
    assert "hf_" not in "".join(capsys.readouterr())


def test_a_bug_shows_its_traceback_without_secrets() -> None:
    program = (
        "from modularforge.exits import run_app\n"
        "def app(): raise ZeroDivisionError('at http://user:Planted@host and hf_Planted')\n"
        "run_app(app)"
    )
    done = run_program(program)
    assert done.returncode == 1
    assert "ZeroDivisionError: at http://***@host and ***" in done.stderr
    assert "Planted" not in done.stderr.replace(program.splitlines()[1].strip(), "")


def run_program(program: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_TOKEN": "hf_Planted"}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
