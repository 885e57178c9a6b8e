"""How LoRA experts become one model; works on committed artifacts of any store and needs no torch."""

from __future__ import annotations


def freezes(name: str) -> bool:
    """All of the backbone."""
    return True
