"""The documentation as a site: every page is reachable, every link and anchor leads somewhere, the sizes are true.

None of it needs the network or the site's own packages; where these are installed (`make docs`), the site is built too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import modularforge
from modularforge.config_files import load_config
from modularforge.cost import disk_bytes, memory_bytes, size
from modularforge.model.sizes import model_sizes
from modularforge.observe.table import count
from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages_in(navigation: list[dict[str, Any]]) -> list[str]:
    found: list[str] = []
    for entry in navigation:
        for place in entry.values():
            found += pages_in(place) if isinstance(place, list) else [place]
    return found


def test_the_navigation_has_every_page_once() -> None:
    assert sorted(pages_in(SITE["nav"])) == [page.name for page in PAGES]


def test_the_site_has_its_style_sheets() -> None:
    assert SITE["extra_css"]
    assert [place for place in SITE["extra_css"] if not (DOCS / place).is_file()] == []


def headings(page: Path) -> set[str]:
    """Anchors of a page, as Markdown's table of contents makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        there = page.parent / target if target else page
        assert there.exists(), f"{page.name} links to {target}"
        assert DOCS in there.resolve().parents, f"{page.name} links to {target}, which the site does not have"
        assert not anchor or anchor in headings(there), f"{page.name} links to {target}#{anchor}"


def test_the_api_page_has_all_that_is_public() -> None:
    named = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), flags=re.MULTILINE)
    for_models = {"continue_fixed", "captured"}  # which are not exported at the top
    assert {name.rpartition(".")[2] for name in named} == {*modularforge.__all__, "huggingface", *for_models}
    source = ast.parse((ROOT / "modularforge/notebook.py").read_text())
    documented = {node.name for node in source.body if hasattr(node, "name") and ast.get_docstring(node)}  # type: ignore[arg-type]
    assert documented >= {*modularforge.__all__}


@pytest.mark.parametrize("name", ["quickstart", "small", "default"])
def test_the_table_of_sizes_is_what_info_says(name: str) -> None:
    config = load_config(str(ROOT / f"configs/{name}.yaml"), [])
    (row,) = [
        line for line in (DOCS / "sizes.md").read_text().splitlines() if line.startswith(f"| `configs/{name}.yaml`")
    ]
    backbone = model_sizes(config.model, config.data.vocab_size).parameters
    assert f"| {rounded(backbone)} |" in row
    assert row.endswith(f"| {size(disk_bytes(config))} | {size(memory_bytes(config))} |")


def rounded(number: float) -> str:
    """A count in two digits."""
    return count(int(float(f"{number:.2g}")) if number >= 1e6 else int(number))


@pytest.mark.skipif(not (find_spec("material") and find_spec("mkdocstrings")), reason="extra `docs` is not installed")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.stem for path in tmp_path.glob("*.html")} >= {page.stem for page in PAGES}
    assert (
        "Raises" in (tmp_path / "api.html").read_text() or "StreamingAssembler" in (tmp_path / "api.html").read_text()
    )
