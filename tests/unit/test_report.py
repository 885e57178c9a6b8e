"""Reading runs and drawing them: unfinished, torn and large runs, discovery, colours, and the files of the report."""

from __future__ import annotations

import json
import math
import re
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape
from matplotlib.image import imread

from benchmarks.report import MOST_MEGABYTES, measure, write_large_run
from checkpoints import paths
from modularforge.errors import DataError, UserError
from modularforge.observe.canvas import EXPERT_COLOURS, colour_of, spread
from modularforge.observe.completion import headline, parts_of
from modularforge.observe.discover import choose_runs, find_runs, resolve, short_names
from modularforge.observe.evaluation import verdict
from modularforge.observe.metrics import parse_metrics
from modularforge.observe.report import write_report
from modularforge.observe.run import Run, read_run
from modularforge.observe.table import duration
from modularforge.observe.timeline import Span, spans_of_metrics, spans_of_records, timeline
from modularforge.pipeline import STAGES
from tests import synthetic_runs
from tests.conftest import run_command, tiny_config
from tests.synthetic_runs import START, training_line, validation_line, write_metrics, write_run, write_stage

PLOTS = {
    "timeline", "loss", "validation_loss", "validation_perplexity", "learning_rate", "gradient_norm",
    "tokens_per_second", "data_wait_share", "peak_memory_bytes", "evaluation", "routing_assembled",
    "routing_calibrated",
}  # fmt: skip


def lines(*values: object) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def test_interleaved_training_and_validation_lines_become_curves_of_their_own() -> None:
    content = lines(training_line("b", 10, 5.0), validation_line("b", 10, 4.5), training_line("b", 20, 4.0))
    job = parse_metrics("b", content)
    assert job.curves["loss"].steps.tolist() == [10, 20]
    assert job.curves["loss"].values.tolist() == [5.0, 4.0]
    assert job.curves["validation_loss"].steps.tolist() == [10]
    assert job.times.steps.tolist() == [10, 20]
    assert job.last_step == 20
    assert job.last_time == START + 20 * synthetic_runs.STEP_SECONDS


def test_a_torn_line_is_skipped_and_counted() -> None:
    job = parse_metrics("b", lines(training_line("b", 10, 5.0)) + b'{"job": "b", "step": 20, "lo')
    assert job.curves["loss"].values.tolist() == [5.0]
    assert job.unreadable_lines == 1


def test_missing_columns_non_finite_values_and_repeated_steps_are_read() -> None:
    content = lines(
        {"step": 1, "loss": 3.0}, {"step": 2, "loss": "inf", "extra": 1}, {"step": 1, "loss": 2.0}, {"a": 1}
    )
    job = parse_metrics("b", content)
    assert job.curves["loss"].steps.tolist() == [1, 2]
    assert job.curves["loss"].values.tolist() == [2.0, math.inf]
    assert job.curves["loss"].finite().values.tolist() == [2.0]
    assert job.curves["extra"].steps.tolist() == [2]
    assert job.last_time is None


def test_an_empty_metrics_file_is_no_curve() -> None:
    assert parse_metrics("b", b"").curves == {}


def test_a_finished_run_has_every_plot_and_one_page_with_the_same_pictures(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    write_run(url)
    run, page_url = write_report(url)
    assert headline(run).startswith("finished")
    assert {path.stem for path in (tmp_path / "run" / "plots").glob("*.png")} == PLOTS
    page = Path(page_url).read_text()
    assert page.count('src="data:image/png;base64,') == len(PLOTS)
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the page must need nothing outside itself"
    assert "<script" not in page
    assert "&lt;b&gt;cat &amp; dog" in page, "texts of a model must not become markup"
    for plot in PLOTS:
        height, width = imread(str(tmp_path / "run" / "plots" / f"{plot}.png")).shape[:2]
        assert 1500 <= width <= 2000, plot
        assert 300 <= height <= 2000, plot


def test_the_page_leads_with_the_verdict_and_folds_what_matters_less(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    write_run(url)
    run, page_url = write_report(url)
    page = Path(page_url).read_text()
    assert run.evaluation is not None
    assert f"</h1><p class=verdict>{escape(verdict(run.evaluation))}</p>" in page
    places = [page.index(f'<section id="{name}"') for name in ("evaluation", "samples", "training", "progress")]
    assert places == sorted(places)
    first, aside = page.split("<details class=aside>")
    assert 'id="plot-loss"' in first
    assert 'id="plot-validation_loss"' in first
    assert 'id="plot-peak_memory_bytes"' in aside
    assert page.count("<source media=") == 2  # the other figures scroll sideways on a phone


def test_samples_keep_their_line_breaks(tmp_path: Path) -> None:
    url, config = str(tmp_path / "run"), tiny_config(str(tmp_path / "run"))
    results = synthetic_runs.evaluation(2)
    results["samples"] = {"backbone": [{"prompt": "int f()", "greedy": " {\n  return 0;\n}", "sampled": ";"}]}
    write_stage(url, "evaluation", "evaluation", config, {"results.json": results})
    _, page_url = write_report(url)
    assert "<pre class=text><i>int f()</i> {\n  return 0;\n}</pre>" in Path(page_url).read_text()


@pytest.mark.parametrize("joined", [None, 16, 32])
def test_trainings_are_as_long_as_their_jobs_are(joined: int | None, tmp_path: Path) -> None:
    """Four experts' batches in one of a baseline make a quarter of the steps: 250 of 1,000."""
    names: list[Any] = [
        name for name, stage in STAGES.items() if stage.panel == "baselines" and name not in ("btx", "branch")
    ]
    experts = {"count": 5, "steps": 200, "batch_size": 8}
    config = tiny_config(str(tmp_path), experts=experts, joint={"batch_size": 32}, dense={"batch_size": joined})
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"baselines": names})})
    run = Run(str(tmp_path), config=config.model_dump(mode="json"))
    steps = {part.name: part.steps for part in parts_of(run)}
    assert {name: steps[name] for name in names} == {name: config.baseline_phase(name).steps for name in names}
    assert steps["dense"] == (500 if joined == 16 else 250)


def test_the_same_run_gives_the_same_pictures(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    write_run(url)
    write_report(url, str(tmp_path / "one"))
    write_report(url, str(tmp_path / "two"))
    one, two = tmp_path / "one" / "plots", tmp_path / "two" / "plots"
    assert all((one / path.name).read_bytes() == path.read_bytes() for path in two.glob("*.png"))
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_report_is_read_from_and_written_to_an_object_store() -> None:
    url = f"memory://report-{uuid.uuid4().hex}/run"
    write_run(url)
    _, page_url = write_report(url)
    assert page_url == f"{url}/report.html"
    assert {name.removesuffix(".png") for name in paths.list_folder(f"{url}/plots")} == PLOTS
    assert find_runs(url.rsplit("/", 1)[0]) == {"run": url}


def test_an_unfinished_run_says_how_far_it_is(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    config = tiny_config(url, backbone={"steps": 100, "batch_size": 4})
    write_stage(url, "data", "corpus", config)
    write_metrics(url, "backbone", dict.fromkeys(range(10, 41, 10), 5.0))
    run = read_run(url)
    words = headline(run)
    assert "unfinished" in words
    assert "backbone is at step 40 of 100" in words
    assert {part.name: part.state for part in parts_of(run)}["expert-2"] == "waiting"
    _, page_url = write_report(url)
    assert "of the training tokens" in Path(page_url).read_text()


def test_a_job_that_writes_nothing_for_long_is_called_silent(tmp_path: Path) -> None:
    write_metrics(str(tmp_path), "backbone", {10: 5.0})
    run = read_run(str(tmp_path))
    late = Run(run.url, jobs=run.jobs, read_at=START + 3600)
    assert "no line for 60 min" in headline(late)


def test_a_run_without_config_or_a_damaged_manifest_is_still_shown(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    write_run(url)
    (tmp_path / "run" / "backbone" / "manifest.json").write_text("{")
    run, page_url = write_report(url)
    assert len(run.problems) == 1
    assert "backbone/manifest.json" in Path(page_url).read_text()


def test_settings_lines_and_records_that_cannot_be_read_hide_nothing_else(tmp_path: Path) -> None:
    write_metrics(str(tmp_path), "backbone", {10: 5.0, 20: 4.0})
    (tmp_path / "config.yaml").write_text("model: [1\nb: }")
    with open(tmp_path / "metrics" / "backbone.jsonl", "a") as file:
        file.write('{"step": "nan", "time": 1, "loss": 4}\n{"step": null}\n')
    good = {"job": "backbone", "event": "started", "time": START}
    lines = [good, {**good, "time": "yesterday"}, {**good, "time": None}]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run, page_url = write_report(str(tmp_path))
    assert run.jobs["backbone"].curves["loss"].values.tolist() == [5.0, 4.0]
    assert run.records == [good]
    page = Path(page_url).read_text()
    assert "config.yaml must be YAML, but is not" in page
    assert "backbone: 2 unreadable lines" in page


def test_settings_of_the_wrong_type_are_named_and_hide_nothing_else(tmp_path: Path) -> None:
    write_metrics(str(tmp_path), "backbone", {10: 5.0, 20: 4.0})
    (tmp_path / "config.yaml").write_text("experts: 5\n")
    run, page_url = write_report(str(tmp_path))
    assert run.jobs["backbone"].curves["loss"].values.tolist() == [5.0, 4.0]
    assert "experts must be" in Path(page_url).read_text()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be a run"):
        read_run(str(tmp_path))


def test_discovery_by_name_pattern_and_all(tmp_path: Path) -> None:
    base = str(tmp_path)
    for name in ("wiki-a", "wiki-b", "deep/law"):
        write_metrics(f"{base}/{name}", "backbone", {1: 1.0})
    assert list(find_runs(base)) == ["deep/law", "wiki-a", "wiki-b"]
    assert choose_runs([], base, every=True) == [f"{base}/{name}" for name in ("deep/law", "wiki-a", "wiki-b")]
    assert choose_runs([], base, pattern="wiki-*") == [f"{base}/wiki-a", f"{base}/wiki-b"]
    assert choose_runs(["law", f"{base}/wiki-a"], base) == [f"{base}/deep/law", f"{base}/wiki-a"]
    assert short_names([f"{base}/wiki-a", f"{base}/deep/law"]) == {
        f"{base}/wiki-a": "wiki-a",
        f"{base}/deep/law": "law",
    }


def test_an_ambiguous_or_unknown_name_lists_the_candidates(tmp_path: Path) -> None:
    base = str(tmp_path)
    for name in ("wiki-a", "wiki-b"):
        write_metrics(f"{base}/{name}", "backbone", {1: 1.0})
    with pytest.raises(UserError, match=r"wiki-a, wiki-b match"):
        resolve("wiki", base)
    with pytest.raises(UserError, match=r"wiki-a, wiki-b in .*did you mean wiki-a"):
        resolve("wikia", base)
    with pytest.raises(UserError, match="matches 'law"):
        choose_runs([], base, pattern="law*")
    with pytest.raises(UserError, match="name a run"):
        choose_runs([], base)


def test_names_that_end_alike_keep_what_tells_them_apart() -> None:
    assert short_names(["s3://b/x/run", "s3://b/y/run"]) == {"s3://b/x/run": "x/run", "s3://b/y/run": "y/run"}


def test_a_pause_between_metric_lines_is_an_interruption() -> None:
    first = [training_line("b", step, 1.0) for step in (10, 20)]
    later = [training_line("b", step, 1.0, time=START + 1000 + step * 0.05) for step in (30, 40)]
    spans = spans_of_metrics(parse_metrics("b", lines(*first, *later)))
    assert [span.kind for span in spans] == ["running", "interrupted", "running"]
    assert spans[0].start == pytest.approx(START, abs=1e-3), "the first line tells how long its steps took"
    assert spans[1].end == pytest.approx(START + 1001.0, abs=1e-3)


def test_records_of_the_launcher_give_queue_run_and_requeue() -> None:
    events = [("submitted", 0), ("started", 100), ("requeued", 300), ("started", 420), ("ended", 500)]
    records = [{"job": "backbone", "event": event, "time": time} for event, time in events]
    spans, requeued = spans_of_records(records, now=900)
    first = [Span("queued", 0, 100), Span("running", 100, 300)]
    assert spans == [*first, Span("queued", 300, 420), Span("running", 420, 500)]
    assert requeued == [300]
    assert spans_of_records(records[:2], now=900)[0][-1] == Span("running", 100, 900)


def test_records_in_the_run_replace_what_metrics_tell(tmp_path: Path) -> None:
    url = str(tmp_path)
    write_metrics(url, "backbone", {10: 5.0})
    record = [{"job": "backbone", "event": "submitted", "time": START - 50, "slurm_job": "7"}]
    paths.replace_bytes(f"{url}/jobs.jsonl", lines(*record))
    newer = [*record, {"job": "backbone", "event": "started", "time": START - 10}, {"other": 1}]
    paths.replace_bytes(f"{url}/cluster/events/backbone.jsonl", lines(*newer))
    run = read_run(url)
    assert len(run.records) == 2, "the same event in both files counts once"
    assert [span.kind for span in timeline(run)[0].spans] == ["queued", "running"]


def test_metrics_of_a_calibration_are_the_newest_under_any_of_its_names(
    tmp_path: Path,
) -> None:
    write_run(str(tmp_path), 2)
    for loss, name in enumerate(("calibration", "calibrated", "calibrate"), start=1):
        paths.replace_bytes(str(tmp_path / "metrics" / f"{name}.jsonl"), lines(training_line(name, 5, float(loss))))
        calibrations = [job for name, job in read_run(str(tmp_path)).jobs.items() if name.startswith("calib")]
        assert [(job.name, job.curves["loss"].values[-1]) for job in calibrations] == [("calibrate", loss)]


def test_rows_of_the_timeline_follow_the_pipeline(tmp_path: Path) -> None:
    write_run(str(tmp_path), num_experts=11)
    names = [row.name for row in timeline(read_run(str(tmp_path)))]
    experts = [f"expert-{index}" for index in range(11)]
    assert names == ["prepare-data", "partition", "backbone", *experts, "dense", "assemble", "calibrate", "evaluate"]


@pytest.mark.parametrize(
    ("seconds", "words"), [(5, "5 s"), (600, "10 min"), (12_000, "3 h 20 min"), (190_000, "2 d 4 h")]
)
def test_durations_read_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    places = [10.0, 10.5, 50.0, 10.2]
    found = spread(places, 12.0, 0.0, 100.0)
    ordered = sorted(found)
    assert np.diff(ordered).min() >= 12.0 - 1e-9
    assert np.argsort(found).tolist() == np.argsort(places).tolist()
    assert found[2] == 50.0


# Linear RGB seen with protanopia and deuteranopia (Machado, Oliveira and Fernandes 2009, severity 1).
VISION = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


@pytest.mark.parametrize("vision", VISION)
def test_colours_of_experts_differ_for_colour_blind_people(vision: str) -> None:
    labs = [lab(hexadecimal, np.array(VISION[vision])) for hexadecimal in EXPERT_COLOURS]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(labs) for b in labs[:i]]
    assert min(distances) > 10, "10 is clearly visible; 2.3 is just noticeable"
    assert len({str(colour_of(f"expert-{index}", 64)) for index in range(64)}) == 64


def lab(hexadecimal: str, matrix: np.ndarray) -> np.ndarray:
    """CIE Lab of a colour as it is seen."""
    rgb = np.array([int(hexadecimal[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(matrix @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ seen / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_the_command_reports_runs_and_refuses_unknown_ones(tmp_path: Path) -> None:
    write_run(str(tmp_path / "one"), num_experts=2, steps=20)
    done = run_command("modularforge", "report", "--all", "--base-dir", str(tmp_path))
    assert "one: finished" in done.stdout
    assert (tmp_path / "one" / "report.html").is_file()
    refused = run_command("modularforge", "report", "two", "--base-dir", str(tmp_path), check=False)
    assert refused.returncode == 2
    assert "there is one" in refused.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is in other units elsewhere")
def test_a_large_run_is_reported_in_little_memory(tmp_path: Path) -> None:
    """The time of it is a benchmark: it depends on what else the machine does."""
    assert write_large_run(str(tmp_path), experts=64, lines=100_000) > 99_000
    *_, megabytes = measure(str(tmp_path))
    assert megabytes < MOST_MEGABYTES
    assert "expert-63" in (tmp_path / "report.html").read_text()
