"""How figures of runs are laid out: nothing covers anything, nothing is cut, and baselines have places of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from modularforge.observe.canvas import EXPERT_COLOURS, colour_of, house_style, letters, luminance
from modularforge.observe.comparison import compare
from modularforge.observe.completion import headline, parts_of
from modularforge.observe.curves import MOST_PANELS, _metric_figure, _overview, curve_figures
from modularforge.observe.evaluation_figures import evaluation_figure, routing_figures
from modularforge.observe.metrics import CURVES
from modularforge.observe.run import job_order, read_run
from modularforge.observe.timeline import timeline, timeline_figure
from tests.synthetic_runs import evaluation, falling, training_line, write_metrics, write_run, write_stage

BASELINES = ["dense", "soup", "joint", "btx"]


def write_run_with_baselines(url: str, num_experts: int, trained: bool = True) -> None:
    """A finished run that also has the joint baseline and branches; with `trained` off, they are only wanted."""
    steps = 100
    config = write_run(url, num_experts, steps, evaluation={"baselines": BASELINES})
    if not trained:
        return
    write_metrics(url, "joint", *two_curves(steps * num_experts, 50))
    write_stage(url, "baselines/joint", "joint", config)
    for index in range(num_experts):
        write_metrics(url, f"branch-{index}", *two_curves(steps, 60 + index, 2.8 - 0.8 * index / num_experts))
        write_stage(url, f"baselines/branches/branch-{index}", "branch", config)


def two_curves(steps: int, seed: int, end: float = 2.6) -> tuple[dict[int, float], dict[int, float]]:
    losses = falling(range(5, steps + 1, 5), 5.9, end, 0.02, seed)
    return losses, {step: loss + 0.05 for step, loss in losses.items() if step % 20 == 0}


def drawn_texts(figure: Figure) -> Iterator[Any]:
    """Every text that the figure shows."""
    found: list[Any] = figure.findobj(lambda one: hasattr(one, "get_xaxis"))
    for axes in found:
        yield from (axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts)
        if axes.axison:
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
                yield from (tick.label1 for tick in ticks)
                yield from (tick.label2 for tick in ticks)


def boxes(figure: Figure) -> list[tuple[str, Any]]:
    figure.canvas.draw()
    found = [text for text in drawn_texts(figure) if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent()) for text in found]


def collisions(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts of which one covers the other by more than a pixel's rounding."""
    found = []
    for (one, a), (two, b) in combinations(boxes(figure), 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        if width > 2 and height > 2:
            found.append((one, two))
    return found


def panel_titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


@pytest.mark.parametrize(("num_experts", "trained"), [(5, False), (8, True), (14, True), (40, True)])
def test_no_text_covers_another_or_leaves_the_figure(num_experts: int, trained: bool, tmp_path: Path) -> None:
    write_run_with_baselines(str(tmp_path / "run"), num_experts, trained)
    run = read_run(str(tmp_path / "run"))
    with house_style():
        curves = curve_figures(run)
        others = {"timeline": timeline_figure(run), "evaluation": evaluation_figure(run), **routing_figures(run)}
        stacked = curve_figures(run, narrow=("loss",))
        for name, figure in {**curves, **others, "narrow": stacked["loss"]}.items():
            assert figure is not None
            assert collisions(figure) == [], name
        for name, figure in {**curves, "narrow": stacked["loss"]}.items():
            width = figure.bbox.width
            assert [text for text, box in boxes(figure) if box.x0 < 0 or box.x1 > width] == [], name


@pytest.mark.parametrize("count", [2, 5, 10])
def test_domains_with_long_names_cover_nothing(count: int, tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    config = write_run(url, 5)
    domains = [
        f"{letter}xample of a label which_may have_two hundred_characters" * 3 for letter in "abcdefghij"[:count]
    ]
    results = evaluation(5, domains=domains)
    write_stage(f"{url}-long", "evaluation", "evaluation", config, {"results.json": results})
    run = read_run(f"{url}-long")
    with house_style():
        for figure in (evaluation_figure(run), *routing_figures(run).values()):
            assert figure is not None
            covered = {text for pair in collisions(figure) for text in pair}
            assert covered == set()


def test_overlapping_labels_are_found_out() -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.set_xticks([0, 1, 2], ["alpha" * 9, "beta" * 9, "gamma" * 9])
    assert len(collisions(figure)) == 2


def test_baselines_have_panels_of_their_own_and_branches_the_colours_of_their_experts(tmp_path: Path) -> None:
    write_run_with_baselines(str(tmp_path / "run"), 4)
    with house_style():
        figure = curve_figures(read_run(str(tmp_path / "run")))["loss"]
    assert panel_titles(figure) == ["backbone", "4 experts", "4 branches", "baselines", "calibration"]
    labels = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert sorted(labels[2]) == ["0", "1", "2", "3"]
    assert sorted(labels[3]) == ["dense", "joint"]
    assert colour_of("branch-2", 4) == colour_of("expert-2", 4)
    assert len({colour_of(job, 4) for job in ("backbone", "dense", "joint", "calibrate")}) == 4


def test_one_baseline_is_named_in_the_title(tmp_path: Path) -> None:
    write_run(str(tmp_path / "run"))
    with house_style():
        figure = curve_figures(read_run(str(tmp_path / "run")))["loss"]
    assert panel_titles(figure) == ["backbone", "3 experts", "dense baseline", "calibration"]


def test_baselines_are_parts_of_the_run(tmp_path: Path) -> None:
    write_run_with_baselines(str(tmp_path / "run"), 3)
    run = read_run(str(tmp_path / "run"))
    names = [part.name for part in parts_of(run)]
    assert names[6:] == ["dense", "joint", "branch-0", "branch-1", "branch-2", "assemble", "calibrate", "evaluate"]
    steps = {part.name: part.steps for part in parts_of(run)}
    assert (steps["joint"], steps["branch-1"]) == (300, 100)
    assert {part.state for part in parts_of(run)} == {"finished"}
    assert [row.name for row in timeline(run)] == names


def test_an_unfinished_run_counts_the_baselines_it_wants(tmp_path: Path) -> None:
    write_run_with_baselines(str(tmp_path / "run"), 3, trained=False)
    run = read_run(str(tmp_path / "run"))
    waiting = [part.name for part in parts_of(run) if part.state == "waiting"]
    assert waiting == ["joint", "branch-0", "branch-1", "branch-2"]
    del run.artifacts["evaluate"]
    # 100 steps of the backbone, 3 x 100 of the experts and 300 of dense; 300 and 3 x 100 of the others are to come.
    assert "54 % of the training tokens" in headline(run)


def test_jobs_are_ordered_by_number() -> None:
    jobs = ["calibrate", "branch-10", "branch-2", "joint", "expert-10", "expert-9", "dense", "backbone"]
    expected = ["backbone", "expert-9", "expert-10", "dense", "joint", "branch-2", "branch-10", "calibrate"]
    assert sorted(jobs, key=job_order) == expected


@pytest.mark.parametrize("num_experts", [9, 11, 15])
def test_heat_maps_of_many_experts_have_all_numbers(num_experts: int, tmp_path: Path) -> None:
    write_run(str(tmp_path / "run"), num_experts)
    run = read_run(str(tmp_path / "run"))
    assert run.evaluation is not None
    with house_style():
        figure = routing_figures(run)["routing_assembled"]
    shares = np.array(run.evaluation["routing"]["assembled"]["share_per_layer_and_expert"])
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written == [f"{100 * share:.0f}" for share in shares.ravel()]


OF_SPEECH = ("scale", "vector_norm")  # which runs of text have not


def test_every_run_of_a_comparison_is_named_and_nothing_covers_anything(tmp_path: Path) -> None:
    """Also a run that lacks the job of the last panel."""
    write_run_with_baselines(str(tmp_path / "first"), 6)
    write_run_with_baselines(str(tmp_path / "second"), 6)
    write_run(str(tmp_path / "third"), 6)
    (tmp_path / "third" / "metrics" / "calibration.jsonl").unlink()
    found = compare({name: read_run(str(tmp_path / name)) for name in ("first", "second", "third")})
    for metric in (metric for metric in CURVES if metric.column not in OF_SPEECH):
        with house_style():
            figure = _metric_figure(found, metric)
        assert len(figure.axes) <= MOST_PANELS
        texts = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert {"first", "second", "third"} <= set(texts), metric.column
        assert collisions(figure) == [], metric.column


def test_the_overview_shows_every_point_and_every_value_axis(tmp_path: Path) -> None:
    """Also where a later panel has the largest values, and where the first one lacks the metric."""
    for name in ("a", "b"):
        write_run(str(tmp_path / name), 2)
        lines = [training_line("dense", step, 50.0, gradient_norm=1e4, data_wait_share=0.9) for step in (5, 10)]
        (tmp_path / name / "metrics" / "dense.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        backbone = tmp_path / name / "metrics" / "backbone.jsonl"
        backbone.write_text(backbone.read_text().replace("peak_memory_bytes", "other"))
    found = compare({name: read_run(str(tmp_path / name)) for name in ("a", "b")})
    with house_style():
        shown = [metric for metric in CURVES if metric.column not in OF_SPEECH]
        figure = _overview(found, shown)
    figure.canvas.draw()
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert all(low <= value <= high for line in axes.lines for value in np.asarray(line.get_ydata()))
    labels = [axes.get_ylabel().replace("\n", " ") for axes in figure.axes if axes.axison and axes.get_ylabel()]
    assert labels == [metric.axis for metric in shown]
    labelled = [axes for axes in figure.axes if axes.axison and axes.get_ylabel()]
    assert all(any(tick.label1.get_visible() for tick in axes.yaxis.get_major_ticks()) for axes in labelled)


def test_a_zero_on_a_log_axis_does_not_stretch_the_figure(tmp_path: Path) -> None:
    for name in ("a", "b"):
        lines = [training_line("backbone", step, 5.0, gradient_norm=float(step != 20)) for step in (10, 20, 30)]
        (tmp_path / name / "metrics").mkdir(parents=True)
        (tmp_path / name / "metrics" / "backbone.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = {name: read_run(str(tmp_path / name)) for name in ("a", "b")}
    metric = next(metric for metric in CURVES if metric.scale == "log" and metric.column == "gradient_norm")
    with house_style():
        for figure in (_metric_figure(compare(runs), metric), curve_figures(runs["a"])["gradient_norm"]):
            assert isinstance(figure.canvas, FigureCanvasAgg)
            drawn = figure.get_tightbbox(figure.canvas.get_renderer())
            assert -1 < drawn.y0 < drawn.y1 < 5


def test_rows_that_decide_differ_in_number_and_colour(tmp_path: Path) -> None:
    """A single expert that is far off on other domains does not make all else pale; 28.24 is not 28.13."""
    write_run(str(tmp_path), 3)
    run = read_run(str(tmp_path))
    assert run.evaluation is not None
    models = run.evaluation["models"]
    for name, perplexity in (("backbone", 30.0), ("dense", 28.24), ("assembled", 28.13), ("expert-0", 90.0)):
        models[name] = {**models["backbone"], "mean_loss": math.log(perplexity)}
        models[name]["domains"] = {label: {"loss": math.log(perplexity)} for label in run.evaluation["domains"]}
    figure = evaluation_figure(run)
    assert figure is not None
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"28.24", "28.13", "90.00"} <= texts
    reach: Any = figure.axes[0].images[0].norm.vmax
    assert reach < 100, "the expert is 200 % worse, and no measure of the others"


def test_letters_in_the_colours_of_experts_are_read_on_a_light_and_on_a_dark_page() -> None:
    """The page turns pictures with `invert(0.9) hue-rotate(180deg)`; the colours alone had 2.3 to 1 on white."""
    turn = np.array([[-0.574, 1.430, 0.144], [0.426, 0.430, 0.144], [0.426, 1.430, -0.856]])  # CSS Filter Effects, 180°
    for colour in EXPERT_COLOURS:
        light = letters(colour)
        dark = np.clip(turn @ (0.9 - 0.8 * np.array(light)), 0, 1)
        paper = luminance([0x1A / 255] * 3)
        assert 1.05 / (luminance(light) + 0.05) >= 4.5
        assert (luminance([*dark]) + 0.05) / (paper + 0.05) >= 4.5
    assert letters("#0072b2") == pytest.approx((0, 0x72 / 255, 0xB2 / 255)), "what is read well stays"
