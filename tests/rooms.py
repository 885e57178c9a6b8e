"""The picture of the rooms in docs/design.md, made from the imports themselves; `python -m tests.rooms` writes it."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.conftest import ROOT

BEGIN, END = "<!-- rooms: python -m tests.rooms -->", "<!-- end of rooms -->"
PAGE = ROOT / "docs/design.md"
PROJECT = ("checkpoints", "launcher", "modularforge")
CORE = "core"
"""The single files of modularforge/: settings, table of stages, run, log, errors."""
PLUGS = "plugs"
"""The pages that say what a kind of expert and a task answer; the rooms behind them are not known to who uses them."""
PAGES = (
    "modularforge.experts.kind",
    "modularforge.experts.trainable",
    "modularforge.tasks.task",
    "modularforge.plugins",
)


def room_of(module: str) -> str | None:
    """The room of a module: a package of modularforge, one of the other two, or the single files."""
    parts = module.split(".")
    if parts[0] not in PROJECT:
        return None
    if parts[0] != "modularforge":
        return parts[0]
    if any(f"{module}.".startswith(f"{page}.") for page in PAGES):
        return PLUGS
    return parts[1] if len(parts) > 1 and (ROOT / "modularforge" / parts[1]).is_dir() else CORE


def imports_of_rooms() -> dict[str, set[str]]:
    """By room, the other rooms that its files import, inside of functions too, but for type checking alone."""
    found: dict[str, set[str]] = {}
    for folder in PROJECT:
        for path in sorted((ROOT / folder).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            room = room_of(module)
            assert room is not None
            mine = found.setdefault(room, set())
            mine |= {other for name in _imported(path) if (other := room_of(name))} - {room}
    return found


def _imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def picture() -> str:
    """A Mermaid graph and a table. Rooms that import each other are one box; an arrow that follows from others is left
    out, as are the rooms that all others use."""
    imports = imports_of_rooms()
    everywhere = {"checkpoints", CORE, PLUGS}
    edges = {room: others - everywhere for room, others in imports.items() if room not in everywhere}
    reached = {room: _reachable(room, edges) for room in edges}
    box = {room: " + ".join(sorted({room} | {o for o in reached[room] if room in reached[o]})) for room in edges}
    arrows: dict[str, set[str]] = {name: set() for name in box.values()}
    for room, others in edges.items():
        arrows[box[room]] |= {box[other] for other in others} - {box[room]}
    lines = [BEGIN, "", "```mermaid", "flowchart TD"]
    numbers = {name: f"r{number}" for number, name in enumerate(sorted(arrows))}
    lines += [f"  {number}[{name}]" for name, number in numbers.items()]
    for name in sorted(arrows):
        implied = {far for step in arrows[name] for far in _reachable(step, arrows)}
        lines += [f"  {numbers[name]} --> {numbers[other]}" for other in sorted(arrows[name] - implied)]
    lines += ["```", "", "| room | imports |", "|---|---|"]
    lines += [f"| `{room}` | {', '.join(sorted(others)) or '–'} |" for room, others in sorted(imports.items())]
    return "\n".join([*lines, "", END])


def _reachable(room: str, edges: dict[str, set[str]]) -> set[str]:
    """All rooms on paths of one arrow or more."""
    found: set[str] = set()
    waiting = [*edges.get(room, ())]
    while waiting:
        other = waiting.pop()
        if other not in found:
            found.add(other)
            waiting += edges.get(other, ())
    return found


def with_picture(page: str) -> str:
    """A page with the picture of now in the place of the old one."""
    before, _, rest = page.partition(BEGIN)
    return before + picture() + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(with_picture(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
