"""What was measured as Markdown: losses by model and domain, what is kept and lost, and answers side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.real_model.settings import DOMAINS, GENERAL_TEXTS
from checkpoints.markdown import plain, table
from modularforge.evaluation.paired import Difference, paired_difference
from modularforge.evaluation.probes import CHAT, GENERAL, MIXED, SWITCH, TEXT

Row = dict[str, Any]
FIRST = ("backbone", "dense", "lora", "lora_wide", "oracle", "lora oracle")
PROBES = {TEXT: "four domains", SWITCH: "behind a switch", MIXED: "mixed", GENERAL: "no domain", CHAT: "chat"}


def write_report(rows: dict[str, Row], notes: dict[str, Any], split: str, output: Path) -> Path:
    """Write report-SPLIT.md from the rows of `Measurements.rows` and the notes of the trials; returns its path."""
    rows = {name: rows[name] for name in [*(name for name in FIRST if name in rows), *rows]}
    sections = [
        (f"Mean losses, {split}", *_losses(rows)),
        ("Less the backbone, with standard errors over documents (* more than two)", *_differences(rows, "backbone")),
        ("Less dense", *_differences(rows, "dense")),
        ("Less one adapter of all experts' rank", *_differences(rows, "lora_wide")),
        ("Domains", *_domains(rows, TEXT, DOMAINS)),
        ("Behind a switch", *_domains(rows, SWITCH, DOMAINS)),
        ("Text of no domain", *_domains(rows, GENERAL, GENERAL_TEXTS)),
        ("Answers", *_answers(rows)),
        ("Trials", ["trial", "validation loss"], [[key, f"{item['loss']:.4f}"] for key, item in notes.items()]),
    ]
    lines = [line for title, header, cells in sections for line in (f"## {title}", "", *table(header, cells), "")]
    file = output / f"report-{split}.md"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def _losses(rows: dict[str, Row]) -> tuple[list[str], list[list[str]]]:
    """Mean loss on every probe, the share of the oracle's gain, and how the backbone's losses changed."""
    header = ["model", *PROBES.values(), "kept", "no domain, change", "chat, change", "right answers"]
    return header, [[plain(name), *_cells(row, rows)] for name, row in rows.items() if not _is_expert(name)]


def _cells(row: Row, rows: dict[str, Row]) -> list[str]:
    losses = [_number(_loss(row, probe)) for probe in PROBES]
    changes = [_change(_loss(row, probe), _loss(rows["backbone"], probe)) for probe in (GENERAL, CHAT)]
    right = str(sum(item["is_right"] for item in row["answers"])) if "answers" in row else "–"
    return [*losses, _kept(row, rows), *changes, right]


def _loss(row: Row, probe: str) -> float | None:
    found = row if probe == TEXT else row["probes"].get(probe)
    return None if found is None else float(found["mean_loss"])


def _kept(row: Row, rows: dict[str, Row]) -> str:
    if "oracle" not in rows:
        return "–"
    first, last = rows["backbone"]["mean_loss"], rows["oracle"]["mean_loss"]
    return f"{(first - row['mean_loss']) / (first - last):.1%}"


def _change(loss: float | None, before: float | None) -> str:
    return "–" if loss is None or before is None else f"{loss / before - 1:+.2%}"


def _differences(rows: dict[str, Row], other: str) -> tuple[list[str], list[list[str]]]:
    if other not in rows:
        return ["model"], []
    found = [
        [plain(name), *(_difference(row, rows[other], probe) for probe in PROBES)]
        for name, row in rows.items()
        if name != other and not _is_expert(name)
    ]
    return ["model", *PROBES.values()], found


def _difference(row: Row, other: Row, probe: str) -> str:
    known = probe in row["documents"] and probe in other["documents"]
    found = paired_difference(row["documents"][probe], other["documents"][probe]) if known else None
    return "–" if found is None else _with_error(found)


def _with_error(found: Difference) -> str:
    error = "" if found.standard_error is None else f" ± {found.standard_error:.4f}"
    return f"{found.difference:+.4f}{error}{' *' if found.is_clear else ''}"


def _domains(rows: dict[str, Row], probe: str, labels: tuple[str, ...]) -> tuple[list[str], list[list[str]]]:
    found = {name: (row if probe == TEXT else row["probes"].get(probe)) for name, row in rows.items()}
    cells = [
        [plain(name), *(_number(item["domains"][label]["loss"]) for label in labels)]
        for name, item in found.items()
        if item
    ]
    return ["model", *labels], cells


def _answers(rows: dict[str, Row]) -> tuple[list[str], list[list[str]]]:
    """One line a question, one column a model; what is wrong is marked."""
    answered = {name: row["answers"] for name, row in rows.items() if "answers" in row}
    questions: list[Row] = next(iter(answered.values()), [])
    lines = [
        [plain(item["question"]), *(_answer(found[place]) for found in answered.values())]
        for place, item in enumerate(questions)
    ]
    return ["question", *map(plain, answered)], lines


def _answer(item: Row) -> str:
    return plain(item["answer"]) + ("" if item["is_right"] else " ✗")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _is_expert(name: str) -> bool:
    return name.startswith(("expert-", "lora expert-"))
