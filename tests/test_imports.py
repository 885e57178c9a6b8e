"""The rooms and who may import whom; a breach is named with file and line."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import rooms as picture
from tests.conftest import ROOT

PROJECT = ("modularforge", "launcher", "checkpoints")
TORCH_FREE_FOR_LAUNCHER = {
    "modularforge.config",
    "modularforge.config_files",
    "modularforge.cost",
    "modularforge.pipeline",
    "modularforge.run",
    "modularforge.options",
    "modularforge.exits",
    "modularforge.errors",
    "modularforge.json_lines",
    "modularforge.kept_code",
    "modularforge.log",
    "modularforge.memory",
    "modularforge.mistakes",
    "modularforge.provenance",
}
TORCH_FREE_MODEL = {f"modularforge.model.{name}" for name in ("names", "hub_config", "supported", "sizes")}
# What somebody else wrote is read through these.
READERS = {"checkpoints.urls", "checkpoints.parsing", "checkpoints.safetensors"}
PLAIN = {"modularforge.config", "modularforge.errors", "modularforge.log", "modularforge.facts"} | READERS


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import anywhere in a file; `from a import b` counts as a.b and a."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def breaches(folder: str, is_allowed) -> list[str]:
    found = []
    for path in python_files(folder):
        for line, module in imports(path):
            if module.split(".")[0] in PROJECT and not is_allowed(module):
                found.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    return found


def within(module: str, *rooms: str) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


def one_of(module: str, modules: set[str]) -> bool:
    """The module, a name in it, or a package on the way to it."""
    return any(within(module, known) or known.startswith(module + ".") for known in modules)


def rooms(*names: str) -> tuple[str, ...]:
    return tuple(f"modularforge.{name}" for name in names)


# Rooms that put parts together or show them; no part imports them.
ABOVE = ("launcher", *rooms("stages", "study", "observe", "sanity", "cli", "notebook"))

RULES = {
    "checkpoints": lambda module: within(module, "checkpoints"),
    "modularforge": lambda module: within(module, "modularforge", "checkpoints"),
    "modularforge/model": lambda module: (
        one_of(module, PLAIN | {"checkpoints.tensors"}) or within(module, "modularforge.model")
    ),
    "modularforge/data": lambda module: one_of(module, PLAIN) or within(module, "modularforge.data", "checkpoints"),
    "modularforge/tasks": lambda module: not within(module, *ABOVE, *rooms("training", "experts", "calibration")),
    "modularforge/experts": lambda module: not within(module, *ABOVE, *rooms("calibration", "evaluation")),
    "modularforge/speech": lambda module: (
        not within(module, *ABOVE, *rooms("training", "tasks", "experts", "calibration", "evaluation", "assembly"))
    ),
    "modularforge/assembly": lambda module: (
        one_of(module, PLAIN | TORCH_FREE_MODEL | {"modularforge.experts.kind"})
        or within(module, "modularforge.assembly", "checkpoints")
    ),
    "modularforge/routing": lambda module: (
        one_of(module, PLAIN) or within(module, *rooms("routing", "model", "assembly"), "checkpoints")
    ),
    # Of kinds and tasks, the pages alone that say what one answers.
    "modularforge/training": lambda module: (
        not within(module, *ABOVE, *rooms("calibration", "evaluation", "experts", "tasks"))
        or one_of(module, {"modularforge.experts.trainable", "modularforge.tasks.task"})
    ),
    "launcher": lambda module: one_of(module, TORCH_FREE_FOR_LAUNCHER) or within(module, "launcher", "checkpoints"),
}


@pytest.mark.parametrize("folder", RULES)
def test_a_room_imports_only_what_it_may(folder: str) -> None:
    assert breaches(folder, RULES[folder]) == []


def test_stages_never_import_each_other() -> None:
    names = {f"modularforge.stages.{path.stem}" for path in python_files("modularforge/stages")}
    found = []
    for path in python_files("modularforge/stages"):
        found += [f"{path}:{line} imports {module}" for line, module in imports(path) if module in names]
    assert found == []


def breaches_of_kinds(root: Path) -> list[str]:
    """Imports of a kind's folder by another kind, or by what all kinds share."""
    kinds = {path.name for path in root.iterdir() if (path / "__init__.py").is_file()}
    found = []
    for path in sorted(root.rglob("*.py")):
        own = path.relative_to(root).parts[0]
        others = [f"modularforge.experts.{kind}" for kind in kinds - {own}]
        found += [f"{path.name}:{line} imports {module}" for line, module in imports(path) if within(module, *others)]
    return found


def test_kinds_of_expert_never_import_each_other(tmp_path: Path) -> None:
    assert breaches_of_kinds(ROOT / "modularforge/experts") == []
    copy = tmp_path / "experts"
    shutil.copytree(ROOT / "modularforge/experts", copy)
    for place in ("lora/__init__.py", "shared.py"):
        (copy / place).parent.mkdir(exist_ok=True)
        (copy / place).write_text("from modularforge.experts.ffn import FFN\n")
    assert {line.split(":")[0] for line in breaches_of_kinds(copy)} == {"__init__.py", "shared.py"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_there_are_no_import_cycles() -> None:
    """Modules imported at the top of files form no cycle (imports inside functions are made later)."""
    files = {module_name(path): path for folder in PROJECT for path in python_files(folder)}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
        # `from package import module` needs the module; `from module import name` the module itself.
        pairs = [(str(node.module), f"{node.module}.{alias.name}") for node in nodes for alias in node.names]
        graph[name] = {inner if inner in files else outer for outer, inner in pairs} & set(files)
    seen: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path[path.index(name) :], name))
        if seen.get(name):
            return
        for target in sorted(graph.get(name, ())):
            visit(target, (*path, name))
        seen[name] = 1

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    "module",
    [
        "modularforge",
        "launcher",
        "launcher.__main__",
        "checkpoints",
        "modularforge.cli",
        "modularforge.pretrained.fetch",
        "modularforge.tasks.task",
        "modularforge.experts.kind",
        "modularforge.assembly.assemble",
        "modularforge.experts.ffn.merging",
        "modularforge.experts.steering.merging",
        "modularforge.experts.lora.merging",
    ],
)
def test_importing_loads_neither_torch_nor_network_code(module: str) -> None:
    heavy = "{'torch', 'transformers', 'sklearn', 'datasets', 's3fs', 'aiobotocore', 'matplotlib', 'scipy'}"
    program = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_the_picture_of_the_rooms_is_of_this_code() -> None:
    """Accept a change on purpose with `python -m tests.rooms`."""
    page = picture.PAGE.read_text(encoding="utf-8")
    assert picture.with_picture(page) == page


def test_the_report_of_a_run_does_not_wait_for_scipy() -> None:
    """Only a comparison tests anything; a report of an unfinished run is asked for again and again."""
    program = "import sys, modularforge.observe.report; print({'scipy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"
