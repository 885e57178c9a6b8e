"""The code of this program as it was when a long command began, so that `git pull` does not change it halfway.

Python reads a module when it is first needed, hours after the start perhaps. `keep_code` reads all files of our
packages into memory (2 MB, within a tenth of a second, where importing them would load torch), and what is imported
from then on comes from there. Nothing is kept for new processes: jobs of the launcher have a snapshot of their own.
"""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import cache_from_source, decode_source, spec_from_file_location
from pathlib import Path
from types import ModuleType

from modularforge.provenance import source_commit

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("modularforge", "launcher", "checkpoints")


class _Loader(SourceFileLoader):
    """Reads a module, and what Python compiled of it, from memory."""

    def __init__(self, name: str, path: str, kept: _Kept) -> None:
        super().__init__(name, path)
        self._kept = kept

    def exec_module(self, module: ModuleType) -> None:
        # What reads a function's text (inspect, torch.compile, a traceback) must not see the newer file's.
        text = decode_source(self.get_data(self.path))
        linecache.cache[self.path] = (len(text), None, text.splitlines(keepends=True), self.path)
        super().exec_module(module)

    def get_data(self, path: str) -> bytes:
        found = self._kept.files.get(path)
        return super().get_data(path) if found is None else found

    def path_stats(self, path: str) -> Mapping[str, float]:
        return self._kept.stats.get(path) or super().path_stats(path)


class _Kept:
    """The first of `sys.meta_path`: finds the modules whose files were read."""

    def __init__(self, root: Path, packages: Sequence[str]) -> None:
        self.files: dict[str, bytes] = {}
        self.stats: dict[str, dict[str, float]] = {}
        self.paths: dict[str, str] = {}
        for path in (path for package in packages for path in (root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            self.paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = str(path)
            self._read(str(path))

    def _read(self, path: str) -> None:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            self.files[path] = file.read()
        self.stats[path] = {"mtime": found.st_mtime, "size": found.st_size}
        compiled = cache_from_source(path)
        if os.path.exists(compiled):
            self.files[compiled] = Path(compiled).read_bytes()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Of a module of ours that was there at the start; None for all others, which are found as ever."""
        place = self.paths.get(name)
        if place is None:
            return None
        return spec_from_file_location(
            name,
            place,
            loader=_Loader(name, place, self),
            submodule_search_locations=[os.path.dirname(place)] if place.endswith("__init__.py") else None,
        )


def keep_code(root: Path = ROOT) -> None:
    """Import our own modules as they are now from here on, and record this commit as theirs; once for a process."""
    if not any(isinstance(finder, _Kept) for finder in sys.meta_path):
        sys.meta_path.insert(sys.meta_path.index(PathFinder), _Kept(root, PACKAGES))
        source_commit()
