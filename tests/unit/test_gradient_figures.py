"""Norms of gradients in the report of a run and in a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import paths
from modularforge.norm_files import norms_line
from modularforge.observe.canvas import house_style
from modularforge.observe.compare import compare_runs
from modularforge.observe.gradient_figures import TITLES, mean_norms, norm_figures, norms_of_jobs
from modularforge.observe.report import write_report
from modularforge.observe.run import read_run
from tests.synthetic_runs import write_run
from tests.unit.test_figures import boxes, collisions

LAYERS, PAUSED_UNTIL = 6, 40


def write_norms(url: str, job: str, seed: int = 0, steps: range = range(10, 101, 10)) -> None:
    """Attention is paused at first; the head is never trained."""
    random, lines = np.random.default_rng(seed), []
    for step in steps:
        squares_GL = random.uniform(0.1, 2, (5, 1 + LAYERS)) ** 2 / step
        squares_GL[0, 1:] = squares_GL[1:3, 0] = squares_GL[3] = np.nan
        if step < PAUSED_UNTIL:
            squares_GL[1, 1:] = 0
        lines.append(json.dumps({"job": job, "step": step, **norms_line(squares_GL)}).replace("NaN", '"nan"'))
    paths.replace_bytes(paths.join(url, "metrics", "gradients", job, "norms.jsonl"), "\n".join(lines).encode())


@pytest.fixture
def run(tmp_path: Path) -> str:
    url = str(tmp_path / "a")
    write_run(url, 5)
    for seed, job in enumerate(("backbone", *(f"expert-{index}" for index in range(5)), "dense")):
        write_norms(url, job, seed)
    return url


def test_the_report_has_all_figures_of_gradients_in_a_section(run: str) -> None:
    _, page = write_report(run)
    text = Path(page).read_text()
    assert '<section id="gradients">' in text
    for name, title in TITLES.items():
        assert (Path(run) / "plots" / f"{name}.png").is_file()
        assert title in text


def test_a_run_without_norms_has_no_such_section(tmp_path: Path) -> None:
    write_run(str(tmp_path / "b"), 2)
    assert 'id="gradients"' not in Path(write_report(str(tmp_path / "b"))[1]).read_text()


def test_many_experts_are_shown_by_their_mean(run: str) -> None:
    norms = read_run(run).norms
    shown = norms_of_jobs(norms)
    assert list(shown) == ["backbone", "mean expert", "dense"]
    experts = [norms[f"expert-{index}"] for index in range(5)]
    np.testing.assert_allclose(
        shown["mean expert"].group("mlp"), np.mean([one.group("mlp") for one in experts], axis=0)
    )
    few = {name: norms[name] for name in ("backbone", "expert-0", "expert-1")}
    assert list(norms_of_jobs(few)) == list(few)


def test_a_mean_is_over_the_steps_that_all_have(tmp_path: Path) -> None:
    url = str(tmp_path)
    write_norms(url, "expert-0")
    write_norms(url, "expert-1", steps=range(20, 61, 20))
    write_run(url, 2)
    norms = list(read_run(url).norms.values())
    mean = mean_norms(norms)
    assert mean.steps_S.tolist() == [20, 40, 60]
    expected = (norms[0].group("mlp")[[1, 3, 5]] + norms[1].group("mlp")) / 2
    np.testing.assert_allclose(mean.group("mlp"), expected)


def test_paused_steps_are_gaps_and_untrained_groups_have_no_line(run: str) -> None:
    with house_style():
        figures = dict(norm_figures(norms_of_jobs(read_run(run).norms)))
        assert figures.keys() == TITLES.keys()
        axes = figures["gradient_groups_log"].axes[0]
        drawn = [np.isfinite(np.asarray(line.get_ydata(), dtype=float)) for line in axes.lines]
        counts = sorted(int(found.sum()) for found in drawn)
        assert counts == [0, 7, 10, 10, 10, 10], "head, attention, and four that learn all the time"
        ratio = np.asarray(figures["gradient_ratio"].axes[0].lines[0].get_ydata(), dtype=float)
        assert np.isfinite(ratio).tolist() == [step >= PAUSED_UNTIL for step in range(10, 101, 10)]
        bars: Any = figures["gradient_layer_bars"].axes[0].patches
        heights = [bar.get_height() for bar in bars]
        assert len(heights) == 2 * LAYERS
        assert min(heights) > 0
        image: Any = figures["gradient_evolution"].axes[0].images[0].get_array()
        assert image.shape == (LAYERS, 10)
        assert image.mask[:, :3].all()


def test_no_text_covers_another_or_leaves_the_figure(run: str) -> None:
    with house_style():
        for name, figure in norm_figures(norms_of_jobs(read_run(run).norms)):
            assert collisions(figure) == [], name
            width = figure.bbox.width
            assert [text for text, box in boxes(figure) if box.x0 < 0 or box.x1 > width] == [], name


def test_a_comparison_draws_the_jobs_that_several_runs_measured(run: str, tmp_path: Path) -> None:
    other = str(tmp_path / "b")
    write_run(other, 5)
    write_norms(other, "backbone", 9)
    compare_runs([run, other], str(tmp_path / "compared"))
    found = {path.stem for path in (tmp_path / "compared" / "plots").glob("gradient_*_*.png")}
    assert found == {f"{name}_backbone" for name in TITLES}


def test_a_single_measurement_and_torn_lines_are_drawn(tmp_path: Path) -> None:
    url = str(tmp_path / "one")
    write_run(url, 1)
    write_norms(url, "backbone", steps=range(10, 11))
    path = Path(url) / "metrics" / "gradients" / "backbone" / "norms.jsonl"
    path.write_text(path.read_text() + '\n{"step": 20, "total": "in')
    (path.parent.parent / "strange").mkdir()
    assert list(read_run(url).norms) == ["backbone"]
    write_report(url)
