"""What the results say, beside their targets."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu.parts import Part, Values


def summary(results: Sequence[tuple[Part, Values | None]]) -> str:
    """Lines for people."""
    return "\n".join(line for part, values in results for line in _lines(part, values))


def _lines(part: Part, values: Values | None) -> list[str]:
    if values is None:
        return [f"{part.slice} {part.name}: not done"]
    head = f"{part.slice} {part.name} ({values['device']}, torch {values['torch']})"
    if "outcomes" in values:
        return [f"{head}: {', '.join(f'{count} {outcome}' for outcome, count in values['outcomes'].items())}"]
    if "cases" in values:
        return [head, *_cases(values["cases"]), *_targets(values["targets"])]
    return [head, str(values.get("text", "")).rstrip()]


def _cases(cases: Values) -> list[str]:
    lines = []
    for name, case in cases.items():
        share = f"{100 * case['mfu']:5.1f} % of peak" if case.get("mfu") is not None else ""
        lines.append(f"  {name:<28} {case['tokens_per_second']:>12,.0f} tokens/s  {share}  {case['memory_gb']:.1f} GB")
    return lines


def _targets(targets: Values) -> list[str]:
    return [f"  {name}: {value:.3f} (target {relation} {bound})" for name, (value, relation, bound) in targets.items()]
