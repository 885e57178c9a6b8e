"""The page of a run with hostile names: nothing of it becomes an element, an attribute or a path."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from checkpoints import paths
from checkpoints.urls import safe_part
from modularforge.observe.compare import compare_runs
from modularforge.observe.page import Plot, make_page
from modularforge.observe.report import report_runs, write_report
from modularforge.observe.run import Run, read_run
from tests import synthetic_runs
from tests.conftest import tiny_config
from tests.synthetic_runs import evaluation, training_line, write_stage

HOSTILE = [
    '"><img src=x onerror=alert(1)>', "<script>alert(1)</script>", "' onload='x", "{{ 7 * 7 }}", "{% raw %}",
    "&lt;b&gt;", "--></style><b>", "../../x", "$x_$", "$\\frac", "a\x00\x1b[2Jb", "\u202e", "]]>", "x" * 300,
]  # fmt: skip


class Elements(HTMLParser):
    """Every element with its attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.values: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))
        self.values += [value or "" for name, value in attrs if name not in ("alt", "aria-label", "id")]

    def handle_data(self, data: str) -> None:
        self.text += data


def run_with(name: str) -> Run:
    """A run in which every text that a report shows is `name`."""
    results = evaluation(2, domains=[name, "law"])
    results["models"] = {**results["models"], name: results["models"]["backbone"]}
    results["routing"] = {name: {**results["routing"]["assembled"], "experts": [name, "expert-0", "expert-1"]}}
    results |= {"name": name, "chosen": name, "samples": {name: [{"prompt": name, "greedy": name, "sampled": name}]}}
    config = {"name": name, name: name, "data": {"sources": [{"name": name}]}}
    return Run(f"memory://runs/{name}", {}, {}, config, results, problems=[name])


def page_of(run: Run, name: str) -> str:
    return make_page(run, [Plot(name, "training", name, name, b"png"), Plot("loss", "routing", "Loss", name, b"png")])


@pytest.mark.parametrize("name", HOSTILE)
def test_no_element_and_no_attribute_comes_from_data(name: str) -> None:
    plain, hostile = Elements(page_of(run_with("plain"), "plain")), Elements(page_of(run_with(name), name))
    assert hostile.found == plain.found
    assert hostile.values == plain.values
    assert "\x1b" not in hostile.text
    assert "\x00" not in hostile.text
    assert hostile.text.count(name if name.isprintable() else "a\\x00" if "\x00" in name else "\\u202e") >= 10


@pytest.mark.parametrize("name", HOSTILE)
def test_a_plot_is_a_file_in_its_folder_whatever_its_name(name: str) -> None:
    part = safe_part(name)
    assert part == paths.relative(paths.join("/x", part), "/x")
    assert part.isascii()
    assert not set(part) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert len(part) < 130
    assert safe_part(name + "!") != part
    assert safe_part("routing_assembled") == "routing_assembled"


def write_hostile_run(url: str, name: str) -> None:
    config = tiny_config(url, name=name)
    results = evaluation(2, domains=[name, "a|b"])
    results["routing"] = {name: results["routing"]["assembled"]}
    results |= {"name": name, "samples": {name: [{"prompt": name, "greedy": name, "sampled": name}]}}
    results["models"][name] = results["models"]["backbone"]
    write_stage(url, "data", "corpus", config)
    synthetic_runs.write_metrics(url, "backbone", {step: 5.0 - step / 100 for step in range(5, 50, 5)})
    content = "\n".join(map(str, [training_line("x", 5, 4.0)])).replace("'", '"')
    paths.replace_bytes(paths.join(url, "metrics", "$x_$.jsonl"), content.encode())
    write_stage(url, "evaluation", "evaluation", config, {"results.json": results})


def test_hostile_names_are_drawn_and_stay_below_the_report(tmp_path: Path) -> None:
    """matplotlib would read `$\\frac` as a formula and fail."""
    for place, name in enumerate(("$\\frac$ ../../<b>", "$x_$")):
        url = str(tmp_path / f"run-{place}")
        write_hostile_run(url, name)
        write_report(url, str(tmp_path / "out" / str(place)))
        assert "Elements" not in read_run(url).problems
    files = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.png")}
    assert files == {"out"}
    assert {path.parent.name for path in tmp_path.rglob("*.png")} == {"plots"}
    compare_runs([str(tmp_path / "run-0"), str(tmp_path / "run-1")], str(tmp_path / "out" / "both"))


def test_reports_of_several_runs_lie_below_the_output_whatever_they_are_called(tmp_path: Path) -> None:
    for name in ("one/a", "two/a"):
        synthetic_runs.write_metrics(str(tmp_path / name), "backbone", {5: 4.0})
    urls = [f"{tmp_path}/one/x/../a", f"{tmp_path}/two/../two/a"]
    (tmp_path / "one" / "x").mkdir()
    report_runs(urls, str(tmp_path / "out" / "deep"))
    pages = {str(path.relative_to(tmp_path)).split("/")[0] for path in tmp_path.rglob("report.html")}
    assert pages == {"out"}
