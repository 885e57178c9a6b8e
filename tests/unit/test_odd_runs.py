"""Metrics, events and results as crashes, foreign programs and attackers leave them break no reader."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from checkpoints import StoreError, paths
from checkpoints.manifest import Manifest
from launcher.events import append_event, merge_events, progress_of, read_all_events
from modularforge.errors import DataError, UserError
from modularforge.evaluation.results import checked_results, parse_results
from modularforge.log import MetricsLog
from modularforge.observe.canvas import house_style
from modularforge.observe.compare import as_json, as_text
from modularforge.observe.comparison import compare
from modularforge.observe.completion import headline
from modularforge.observe.evaluation import markdown, print_table
from modularforge.observe.metrics import JobMetrics, parse_metrics
from modularforge.observe.page import make_page
from modularforge.observe.report import draw_run, write_report
from modularforge.observe.run import Run, read_run
from modularforge.observe.timeline import timeline_figure
from tests import mutation
from tests.conftest import tiny_config
from tests.synthetic_runs import evaluation, training_line, validation_line, write_run

LINES = [line for step in range(5, 45, 5) for line in (training_line("b", step, 5.0), validation_line("b", step, 4.5))]
METRICS = "".join(json.dumps(line) + "\n" for line in LINES).encode()
DRAWN = max(3, mutation.FUZZ_INPUTS // 250)  # figures take half a second


def show(run: Run) -> None:
    """All that is made of a run but the figures."""
    headline(run)
    make_page(run, [])
    compared = compare({"one": run, "two": run})
    as_text(compared)
    as_json(compared)


def odd_metrics(count: int, seed: int = 0) -> itertools.chain[bytes]:
    """Broken bytes, and whole lines with wrong types in them."""
    wrong = mutation.values({"lines": LINES}, count // 2, seed)
    texts = (b"".join(_line(line) for line in _lines(value)) for value in wrong)
    return itertools.chain(mutation.texts([METRICS], count // 2, seed), texts)


def _lines(value: Any) -> list[Any]:
    found = value.get("lines") if isinstance(value, dict) else None
    return found if isinstance(found, list) else [found]


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def test_no_metrics_break_curves_report_or_comparison() -> None:
    for number, content in enumerate(odd_metrics(mutation.FUZZ_INPUTS)):
        job = parse_metrics("backbone", content)
        assert job.unreadable_lines >= 0
        for curve in job.curves.values():
            assert curve.steps.ndim == curve.values.ndim == 1
            assert len(curve.steps) == len(curve.values)
        if number % 20 == 0:
            show(Run("runs/x", {}, {"backbone": job}, {"experts": {"count": 1}}))


@pytest.mark.parametrize(
    ("line", "steps"),
    [
        (b'{"step": "x", "loss": 1}', []),
        (b'{"step": 7, "loss": []}', []),
        (b'{"step": 7, "loss": [1]}\n{"step": 8, "loss": [2]}', []),
        (b'{"step": 7, "loss": {"a": 1}}', []),
        (b'{"step": 7, "loss": true, "time": "x"}', []),
        (b'{"step": -1, "loss": 1}', []),
        (b'{"step": 1e300, "loss": 1}', []),
        (b'{"step": 7, "loss": 1' + b"0" * 400 + b"}", [7]),
        (b'{"step": 7, "loss": 1, "note": "\xff\xfe"}', [7]),
        (b'{"step": 7, "loss": 1}\n\xff\xfe', [7]),
        (b"[" * 100_000, []),
        (b'{"step": 7, "loss": 1}\n' + b'{"a":' * 100_000, [7]),
        (b'{"step": 7, "loss": "1_0"}', []),
    ],
)
def test_a_line_of_wrong_types_is_passed_over(line: bytes, steps: list[int]) -> None:
    job = parse_metrics("b", line)
    curve = job.curves.get("loss")
    assert ([] if curve is None else curve.steps.tolist()) == steps


def test_numbers_beyond_float32_are_infinite() -> None:
    job = parse_metrics("b", b'{"step": 1, "loss": 1e200}\n{"step": 2, "loss": -1e39}\n{"step": 3, "loss": "nan"}')
    values = job.curves["loss"].values.tolist()
    assert values[:2] == [math.inf, -math.inf]
    assert math.isnan(values[2])


def test_no_results_break_report_table_or_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    good, kept = json.loads(json.dumps(evaluation(2))), 0
    for value in mutation.values(good):
        results = _checked(_line(value))
        if results is None:
            continue
        kept += 1
        markdown(results)
        print_table(results)
        if kept % 20 == 0:
            show(Run("runs/x", {}, {}, {}, results))
    assert kept > mutation.FUZZ_INPUTS // 20, "some of what is odd is still good"
    for content in mutation.texts([json.dumps(good).encode()]):
        _checked(content)


def test_results_of_a_diverged_model_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    good = evaluation(2)
    for value in ("inf", "nan", "-inf"):
        for name in ("calibrated", "backbone", "dense"):
            results = json.loads(json.dumps(good))
            results["models"][name] |= {"mean_loss": value, "perplexity": value, "bits_per_byte": value}
            results["models"][name]["domains"]["law"] |= {"loss": value, "perplexity": value, "bits_per_byte": value}
            markdown(results)
            print_table(results)
            run = Run("runs/x", {}, {}, {}, checked_results(results))
            make_page(run, draw_run(run) if value == "inf" else [])


def records(count: int) -> list[dict[str, Any]]:
    names, events = ("backbone", "expert-1", "prepare-data"), ("submitted", "started", "requeued", "ended")
    return [{"job": n, "event": e, "time": 1.7e9 + i} for i, (n, e) in enumerate(itertools.product(names, events))][
        :count
    ]


def test_no_events_break_the_timeline_or_the_status(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    append_event(config, "backbone", "started", step=3)
    good = records(12)
    paths.replace_bytes(str(tmp_path / "metrics" / "backbone.jsonl"), METRICS)
    content = b"".join(map(_line, good))
    wrong = (b"".join(map(_line, _lines(v))) for v in mutation.values({"lines": good}, mutation.FUZZ_INPUTS // 2))
    for number, odd in enumerate([*mutation.texts([content], mutation.FUZZ_INPUTS // 2), *wrong]):
        (tmp_path / "cluster" / "events" / "expert-1.jsonl").write_bytes(odd)
        read_all_events(config)
        merge_events(config, ())
        if number % 50 == 0:
            run = read_run(str(tmp_path))
            show(run)
            if number % (mutation.FUZZ_INPUTS // 2) == 0:
                with house_style():
                    timeline_figure(run)


def test_no_metrics_break_the_launchers_status_or_a_job_that_goes_on(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    url = str(tmp_path / "metrics" / "backbone.jsonl")
    for number, content in enumerate(odd_metrics(mutation.FUZZ_INPUTS // 2, seed=1)):
        paths.replace_bytes(url, content)
        found = progress_of(config, "backbone")
        assert found.loss is None or math.isfinite(found.loss)
        if number % 5 == 0:
            log = MetricsLog(url, "on" if number % 50 == 0 else "off")
            log.restart_after(20)
            log.write(job="backbone", step=21, loss=float("inf"))
            log.close()
            assert parse_metrics("backbone", paths.read_bytes(url)).last_step == 21


def test_no_recorded_settings_and_facts_break_a_report(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    write_run(url)
    run = read_run(url)
    facts = run.artifacts["backbone"].manifest.facts
    for number, value in enumerate(mutation.values(facts, mutation.FUZZ_INPUTS // 10)):
        if not isinstance(value, dict):
            continue
        folder = tmp_path / "run" / "backbone"
        written = Manifest("backbone", "f" * 32, facts=value, created="2126-01-01T00:00:00+00:00", attempt="x")
        try:
            content = written.to_json()
        except (ValueError, TypeError):
            continue
        (folder / "manifest.json").write_bytes(content)
        try:
            found = read_run(url)
        except UserError:
            continue
        make_page(found, [])
        if number % 25 == 0:
            show(found)


def test_figures_of_odd_runs_are_drawn(tmp_path: Path) -> None:
    good = json.loads(json.dumps(evaluation(2)))
    odd = itertools.islice(odd_metrics(4000, seed=2), 0, None, 4000 // DRAWN)
    results = filter(None, (_checked(_line(value)) for value in mutation.values(good, 200, seed=2)))
    for content, found in zip(odd, results, strict=False):
        jobs: dict[str, JobMetrics] = {name: parse_metrics(name, content) for name in ("backbone", "expert-0", "$x_$")}
        run = Run("runs/x", {}, jobs, {}, found)
        make_page(run, draw_run(run))


def _checked(content: bytes) -> dict[str, Any] | None:
    """The results, or None where they are refused, in a short sentence."""
    refused = ""
    try:
        return parse_results(content, "x/results.json")
    except DataError as error:
        refused = str(error)
    assert len(refused) < 600
    return None


def test_a_run_with_a_torn_line_of_foreign_bytes_is_reported(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    paths.replace_bytes(f"{url}/metrics/backbone.jsonl", METRICS + b"\xff\xfe")
    paths.replace_bytes(f"{url}/metrics/expert-99999999999999.jsonl", METRICS)
    run, page = write_report(url)
    assert run.jobs["backbone"].unreadable_lines == 1
    assert run.num_experts == 0, "a name with a huge index is no expert"
    assert "backbone" in Path(page).read_text()


@pytest.mark.timeout(20)
def test_lines_are_not_written_into_a_pipe(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    for pipe in (tmp_path / "metrics" / "x.jsonl", tmp_path / "cluster" / "events" / "x.jsonl"):
        pipe.parent.mkdir(parents=True)
        os.mkfifo(pipe)
    with pytest.raises(StoreError, match="is a named pipe"):
        MetricsLog(str(tmp_path / "metrics" / "x.jsonl")).write(step=1)
    with pytest.raises(StoreError, match="is a named pipe"):
        append_event(config, "x", "started")


def test_a_run_with_pipes_for_metrics_and_events_is_reported(tmp_path: Path) -> None:
    write_run(str(tmp_path / "run"))
    (tmp_path / "run" / "cluster" / "events").mkdir(parents=True)
    pipes = [tmp_path / "run" / name for name in ("metrics/odd.jsonl", "cluster/events/odd.jsonl")]
    for pipe in pipes:
        os.mkfifo(pipe)
    run = read_run(str(tmp_path / "run"))
    assert "backbone" in run.jobs
    assert all(any(f"{pipe} must be a file, but is a named pipe" in text for text in run.problems) for pipe in pipes)
