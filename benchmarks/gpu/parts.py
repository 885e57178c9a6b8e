"""Parts of the proof, and their results as small files: what has a result is not done again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MINUTES = 8.5
"""Of a call; machines that are lent end a command after ten minutes."""

Values = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One result of a slice.

    `run` gets the seconds that are left, and returns the result, or None where it stopped in between and goes on next
    time. It is begun only while `seconds` are left, or first in a call.
    """

    slice: str
    name: str
    run: Callable[[float], Values | None]
    seconds: float = 60.0


@dataclass(frozen=True)
class Proof:
    """A folder of results: `results/SLICE-PART.json`, which are all that has to be carried on to another machine."""

    folder: Path

    def file(self, part: Part) -> Path:
        """Where a part's result is."""
        return self.folder / "results" / f"{part.slice}-{part.name}.json"

    def result(self, part: Part) -> Values | None:
        """What a part came to; None where it is not done."""
        if not self.file(part).is_file():
            return None
        values: Values = json.loads(self.file(part).read_text())
        return values

    def go_on(self, parts: Iterable[Part], minutes: float = MINUTES) -> list[Part]:
        """Do what is not done while there is time; returns what is left."""
        end, left, is_first = time.monotonic() + 60 * minutes, list[Part](), True
        for part in parts:
            if self.result(part) is not None:
                continue
            seconds = end - time.monotonic()
            if left or (seconds < part.seconds and not is_first):
                left.append(part)
                continue
            is_first = False
            print(f"slice {part.slice}: {part.name}", flush=True)
            values = part.run(seconds)
            if values is None:
                left.append(part)
            else:
                self._save(part, values)
        return left

    def _save(self, part: Part, values: Values) -> None:
        file = self.file(part)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({**where(), **values}, indent=1) + "\n")
        unfinished.replace(file)


def where() -> Values:
    """The device and the torch of a result."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "torch": torch.__version__}
