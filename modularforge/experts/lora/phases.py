"""Which adapters learn at which step: the phases of `experts.lora.phases`, whether listed or named; needs no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from modularforge.config import MLP_MODULES, LoraConfig, LoraPhaseConfig

NAMED = {"attn": ("attention",), "mlp": ("mlp",), "both": ("attention", "mlp")}
_PLACE = re.compile(r"\.layers\.(\d+)\..*?\.([a-z]+_proj)\.")


@dataclass(frozen=True)
class Phase:
    """The adapters that learn until so many steps are done."""

    until: int
    groups: Collection[str]
    layers: Collection[int]

    def trains(self, name: str) -> bool:
        """Whether a parameter of an adapter learns, by its name in the decoder."""
        found = _PLACE.search(name)
        assert found is not None
        group = "mlp" if found[2] in MLP_MODULES else "attention"
        return group in self.groups and int(found[1]) in self.layers


def phases_of(lora: LoraConfig, steps: int, layers: int) -> list[Phase]:
    """The phases of a training of so many steps; one, in which all learn, where the settings name none.

    Those of a name are equally long.
    """
    everything = ("attention", "mlp")
    if lora.phases is None:
        return [Phase(steps, everything, range(layers))]
    if not isinstance(lora.phases, str):
        return [_listed(phase, steps, layers) for phase in lora.phases]
    parts = lora.phases.split("->")
    ends = [steps * (number + 1) // len(parts) for number in range(len(parts))]
    return [
        Phase(end, NAMED.get(part, everything), _layers(part, layers)) for part, end in zip(parts, ends, strict=True)
    ]


def stretched(phases: Iterable[Phase], factor: float) -> list[Phase]:
    """The phases of a training that is so many times as long."""
    return [replace(phase, until=round(phase.until * factor)) for phase in phases]


def phase_at(phases: Iterable[Phase], step: int) -> tuple[int, Phase]:
    """Number and phase of a step (0-based); the last one lasts."""
    numbered = list(enumerate(phases))
    return next((item for item in numbered if step < item[1].until), numbered[-1])


def _listed(phase: LoraPhaseConfig, steps: int, layers: int) -> Phase:
    chosen = _layers(phase.layers, layers) if isinstance(phase.layers, str) else phase.layers
    return Phase(steps if phase.until is None else phase.until, phase.train, chosen)


def _layers(name: str, layers: int) -> range:
    half = layers // 2
    return {"early": range(half), "late": range(half, layers)}.get(name, range(layers))
