"""Comparing runs: known answers for where they diverge, spikes, plateaus and statistics."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from checkpoints import paths
from modularforge.config_files import to_yaml
from modularforge.observe import divergence
from modularforge.observe.anomalies import convergence, find_anomalies, overfitting, running_median
from modularforge.observe.compare import as_json, as_text, in_short
from modularforge.observe.comparison import compare, compare_seeds, group_by_settings
from modularforge.observe.divergence import pair_curves
from modularforge.observe.metrics import MEASURED, Curve, Metric
from modularforge.observe.run import MEANS, Run, read_run
from tests.conftest import run_command, tiny_config, tiny_values
from tests.synthetic_runs import falling, validation_line, write_metrics, write_run, write_stage

STEPS = np.arange(1.0, 401.0)
SLOW = [222.25, 162.95, 137.18, 147.75, 120.52]
FAST = [242.06, 134.95, 68.46, 24.34, 7.16]


def curve(values: object, steps: object = None) -> Curve:
    values = np.asarray(values, dtype=float)
    return Curve(np.arange(1.0, len(values) + 1) if steps is None else np.asarray(steps, dtype=float), values)


def noisy(seed: int = 0, noise: float = 0.01) -> np.ndarray:
    return 3 + 3 * np.exp(-STEPS / 100) + noise * np.random.default_rng(seed).normal(size=len(STEPS))


def test_known_perplexities_diverge_at_step_1500_and_end_at_ratio_16_83() -> None:
    steps = [500, 1000, 1500, 2000, 2500]
    pair = pair_curves(curve(SLOW, steps), curve(FAST, steps), band=2.0)
    found = pair.divergence(2.0)
    assert found is not None
    assert (found.step, found.for_good_from) == (1500, 1500)
    assert found.ratio == pytest.approx(137.18 / 68.46)
    assert pair.final_ratio == pytest.approx(16.83, abs=0.005)
    back = pair_curves(curve(FAST, steps), curve(SLOW, steps), band=2.0)
    assert back.divergence(2.0).step == 1500, "the ratio may leave the band downwards as well"  # type: ignore[union-attr]
    assert pair.final_ratio is not None
    assert back.final_ratio == pytest.approx(1 / pair.final_ratio)


def test_curves_that_touch_the_band_and_come_back_are_not_parted_for_good() -> None:
    other = np.ones(100)
    other[40:45] = 3.0
    found = pair_curves(curve(np.ones(100)), curve(other), 2.0).divergence(2.0)
    assert found is not None
    assert (found.step, found.for_good_from) == (41, None)


def test_equal_curves_differ_nowhere() -> None:
    pair = pair_curves(curve(noisy()), curve(noisy()), 2.0)
    assert pair.is_equal
    assert pair.mean_difference == 0
    assert pair.interval == (0.0, 0.0)
    assert pair.divergences == ()
    assert pair.paired_t_test is None
    assert not pair.is_clear


def test_curves_without_common_steps_say_so() -> None:
    assert pair_curves(curve([1, 2], [1, 3]), curve([1, 2], [2, 4]), 2.0).common_steps == 0


def p_by_integration(statistic: float, freedom: float) -> float:
    """Two-sided p of Student's t from its density, by Simpson's rule."""
    logarithm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    points = np.linspace(0, abs(statistic), 20_001)
    density = np.exp(logarithm - (freedom + 1) / 2 * np.log1p(points**2 / freedom))
    weights = np.where(np.arange(len(points)) % 2, 4.0, 2.0)
    weights[[0, -1]] = 1.0
    return float(1 - 2 * (weights @ density) * (points[1] - points[0]) / 3)


@given(st.integers(0, 1000), st.integers(3, 200))
@settings(max_examples=50, deadline=None)
def test_tests_of_means_are_those_of_the_textbook(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    first, second = random.normal(3, 1, count), random.normal(3.2, 2, count)
    paired, welch = divergence.paired_t_test(first, second), divergence.welch_t_test(first, second)
    assert paired is not None
    assert welch is not None
    changes = second - first
    assert paired.statistic == pytest.approx(changes.mean() / (changes.std(ddof=1) / count**0.5))
    assert paired.degrees_of_freedom == count - 1
    a, b = first.var(ddof=1) / count, second.var(ddof=1) / count
    assert welch.statistic == pytest.approx((second.mean() - first.mean()) / (a + b) ** 0.5)
    assert welch.degrees_of_freedom == pytest.approx((a + b) ** 2 / ((a * a + b * b) / (count - 1)))
    for found in (paired, welch):
        assert found.p == pytest.approx(p_by_integration(found.statistic, found.degrees_of_freedom), abs=1e-9)
    interval = divergence.welch_interval(first, second)
    assert interval is not None
    low, high = interval
    assert (low + high) / 2 == pytest.approx(second.mean() - first.mean())
    reach = (high - low) / 2 / (a + b) ** 0.5
    assert p_by_integration(reach, welch.degrees_of_freedom) == pytest.approx(0.05, abs=1e-9)
    pooled = math.sqrt((first.var(ddof=1) + second.var(ddof=1)) / 2)
    assert divergence.cohens_d(first, second) == pytest.approx((second.mean() - first.mean()) / pooled)


def test_means_without_spread_are_not_tested() -> None:
    flat = np.full(5, 3.0)
    for test in (divergence.paired_t_test, divergence.welch_t_test, divergence.welch_interval):
        assert test(flat, flat + 1) is None
        assert test(flat[:1], flat[:1]) is None


@given(st.integers(1, 40), st.sampled_from([5, 11]), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_a_running_median_is_that_of_the_values_around_each(count: int, window: int, seed: int) -> None:
    values, half = np.random.default_rng(seed).normal(size=count), window // 2
    expected = [
        np.median(values[max(0, i - half if i >= half else 0) : (2 * i + 1 if i < half else i + half + 1)])
        for i in range(count)
    ]
    if count <= 2 * half:
        expected = [np.median(values)] * count
    assert running_median(values, window) == pytest.approx(expected, abs=0)


def test_a_summary_has_the_plain_numbers() -> None:
    values = np.array([4.0, 3.0, 1.0, 2.0])
    found = divergence.summarise(curve(values, [10, 20, 30, 40]), "lower")
    assert (found.first, found.final, found.final_step, found.best, found.best_step) == (4.0, 2.0, 40, 1.0, 30)
    assert found.mean == values.mean()
    assert found.standard_deviation == pytest.approx(stats.tstd(values))
    assert found.coefficient_of_variation == pytest.approx(stats.variation(values, ddof=1))
    assert found.improvement == 0.5
    assert divergence.summarise(curve(values), "higher").improvement == -0.5


def test_the_bootstrap_agrees_with_scipy_where_points_are_independent() -> None:
    differences = np.random.default_rng(1).normal(0.1, 1.0, 500)
    expected = stats.bootstrap((differences,), np.mean, n_resamples=4000, random_state=0, method="percentile")
    low, high = divergence.bootstrap_interval(differences)
    assert low == pytest.approx(expected.confidence_interval.low, abs=0.02)
    assert high == pytest.approx(expected.confidence_interval.high, abs=0.02)


def test_the_block_bootstrap_covers_the_mean_of_dependent_points_where_the_t_test_does_not() -> None:
    """An AR(1) series with mean 0: 95 % intervals should hold it nearly always, those of independent points do not."""
    covered, believed = 0, 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        noise, series = random.normal(size=400), np.zeros(400)
        for index in range(1, 400):
            series[index] = 0.8 * series[index - 1] + noise[index]
        low, high = divergence.bootstrap_interval(series, seed)
        covered += low <= 0 <= high
        believed += divergence.paired_t_test(np.zeros(400), series).p > 0.05  # type: ignore[union-attr]
    assert covered >= 85
    assert believed <= 65


def test_dependent_points_count_less() -> None:
    walk = np.cumsum(np.random.default_rng(0).normal(size=300))
    assert divergence.effective_count(walk) < 30
    assert divergence.effective_count(np.random.default_rng(0).normal(size=300)) > 200
    assert divergence.block_length(walk) > divergence.block_length(np.random.default_rng(0).normal(size=300))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_quiet_training_has_no_spikes(seed: int, noise: float) -> None:
    assert [one.kind for one in find_anomalies(curve(noisy(seed, noise)), plateaus=False)] == []


@pytest.mark.parametrize("count", [8, 12, 16, 20, 30])
def test_few_quiet_points_have_no_spikes(count: int) -> None:
    """A share of 2 % may be taken for one: the spread of so few differences is itself uncertain."""
    places = np.arange(count) / count
    quiet = [
        5 + 1.5 * np.exp(-4 * places) + 0.05 * np.random.default_rng(seed).normal(size=count) for seed in range(200)
    ]
    assert sum(bool(find_anomalies(curve(values), plateaus=False)) for values in quiet) <= 4


def test_a_spike_among_few_points_is_found() -> None:
    values = 3 + 0.01 * np.random.default_rng(1).normal(size=16)
    values[9] += 1.0
    assert [(one.kind, one.first) for one in find_anomalies(curve(values), plateaus=False)] == [("spike", 10)]


@pytest.mark.parametrize("step", [5, 120, 399])
@pytest.mark.parametrize("height", [1.5, -1.0])
def test_a_planted_spike_is_found_at_its_step(step: int, height: float) -> None:
    values = noisy()
    values[step - 1] += height
    found = find_anomalies(curve(values), plateaus=False)
    assert [(one.kind, one.first, one.last) for one in found] == [("spike", step, step)]
    assert np.sign(found[0].score) == np.sign(height)


def test_a_spike_of_several_points_and_a_jump_are_told_apart() -> None:
    values = noisy()
    values[99:102] += 1.0
    values[249:] += 1.0
    found = find_anomalies(curve(values), plateaus=False)
    assert [(one.kind, one.first, one.last) for one in found] == [("spike", 100, 102), ("jump", 250, 250)]


@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_a_planted_plateau_is_found_at_its_steps(noise: float) -> None:
    values = 6 - STEPS / 100
    values[150:230] = values[150]
    values[230:] += values[150] - values[230]
    values += noise * np.random.default_rng(0).normal(size=len(values))
    found = [one for one in find_anomalies(curve(values)) if one.kind == "plateau"]
    assert len(found) == 1
    assert found[0].first == pytest.approx(151, abs=6)
    assert found[0].last == pytest.approx(231, abs=6)


def test_a_straight_fall_has_no_plateau() -> None:
    assert find_anomalies(curve(6 - STEPS / 100)) == []


def test_non_finite_values_are_found_and_left_out_of_all_else() -> None:
    values = noisy()
    values[[10, 20]] = np.nan, np.inf
    found = find_anomalies(curve(values), plateaus=False)
    assert [(one.kind, one.first) for one in found] == [("non-finite", 11), ("non-finite", 21)]
    assert pair_curves(curve(values), curve(noisy()), 2.0).common_steps == 398


def test_convergence_tells_falling_from_settled_and_rising() -> None:
    assert convergence(curve(6 - STEPS / 100)).state == "improving"  # type: ignore[union-attr]
    assert convergence(curve(3 + np.exp(-STEPS / 10))).state == "settled"  # type: ignore[union-attr]
    assert convergence(curve(3 + STEPS / 100)).state == "worsening"  # type: ignore[union-attr]
    assert convergence(curve([3.0, 2.0])) is None


def test_overfitting_is_validation_that_rises_while_training_falls() -> None:
    training = curve(4 - STEPS / 200)
    at = STEPS[::40]
    good = overfitting(training, curve(4.1 - at / 200, at))
    assert good is not None
    assert not good.is_overfitting
    assert good.final_gap == pytest.approx(0.1)
    bad = overfitting(training, curve(3 + ((at - 161) / 100) ** 2, at))
    assert bad is not None
    assert bad.is_overfitting
    assert bad.best_step == 161
    assert bad.rise == pytest.approx(((at[-1] - 161) / 100) ** 2)
    assert overfitting(training, None) is None


def test_identical_runs_differ_nowhere(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(str(tmp_path / name), num_experts=2, steps=40)
    found = compare({name: read_run(str(tmp_path / name)) for name in ("a", "b")})
    assert found.are_equal
    assert found.settings == {}
    assert "differ nowhere" in as_text(found)


def test_runs_of_different_length_and_columns_are_compared_on_what_they_share(tmp_path: Path) -> None:
    write_metrics(str(tmp_path / "long"), "backbone", falling(range(1, 201)), {50: 3.0, 100: 2.9, 150: 2.8})
    short = falling(range(2, 101, 2), 6.5)
    write_metrics(str(tmp_path / "short"), "backbone", {})
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in short.items()]
    lines.insert(25, json.dumps(validation_line("backbone", 50, 3.3)))
    (tmp_path / "short" / "metrics" / "backbone.jsonl").write_text("\n".join(lines) + "\n")
    found = compare({name: read_run(str(tmp_path / name)) for name in ("long", "short")})
    metrics = found.jobs["backbone"].metrics
    pair = metrics["loss"].pairs["short"]
    assert (pair.common_steps, pair.first_step, pair.last_step) == (50, 2, 100)
    assert metrics["validation_loss"].pairs["short"].common_steps == 1
    assert metrics["learning_rate"].missing == ["short"]
    assert not found.are_equal
    assert "not logged" in as_text(found)


def test_what_can_be_said_leads_although_one_step_of_another_loss_is_common(tmp_path: Path) -> None:
    """Validations share no step, but one line of the training loss does: seen of a smoke test and a whole run."""
    write_metrics(str(tmp_path / "a"), "backbone", falling([10, 20]), {20: 3.0})
    write_metrics(str(tmp_path / "b"), "backbone", falling([20, 40]), {40: 2.0})
    found = compare({name: read_run(str(tmp_path / name)) for name in ("a", "b")})
    assert found.jobs["backbone"].metrics["loss"].pairs["b"].common_steps == 1
    said = as_text(found)
    assert "no step in common with a: backbone of b" in said
    assert said.index("\nSettings") < said.index("\nIn short")


def test_runs_of_different_tokenizers_are_compared_by_bits_per_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nats for each token of one vocabulary beside those of another were a ratio, and a divergence, of nothing."""
    for name, vocab_size in (("a", 400), ("b", 500), ("c", 400), ("d", 400)):
        data = {**tiny_values(tmp_path)["data"], "vocab_size": vocab_size}
        config = write_run(str(tmp_path / name), seed=vocab_size, data=data)
        files = {"tokenizer.json": {"of": vocab_size}}
        shutil.rmtree(tmp_path / name / "data")
        monkeypatch.setenv("MODULARFORGE_HASH", "blake3" if name == "d" else "sha256")
        write_stage(str(tmp_path / name), "data", "corpus", config, files)
    runs = {name: read_run(str(tmp_path / name)) for name in ("a", "b", "c", "d")}
    found = compare({name: runs[name] for name in ("a", "b")})
    said = in_short(found)
    assert not found.have_one_tokenizer
    assert json.loads(as_json(found))["have_one_tokenizer"] is False
    assert "The runs have different tokenizers" in said
    assert "at step" not in said, "no ratio and no divergence"
    order = [
        "Test: bits/byte",
        "Test: mean loss (nats per token), each by tokens of its own, not comparable",
        "In short",
    ]
    assert sorted(order, key=said.index) == order
    same = compare({name: runs[name] for name in ("a", "c")})
    assert same.have_one_tokenizer
    assert "tokenizers" not in in_short(same)
    assert compare({name: runs[name] for name in ("a", "d")}).have_one_tokenizer, "hashed by another algorithm"
    for run in runs.values():
        del run.artifacts["prepare-data"]
    assert not compare({name: runs[name] for name in ("a", "b")}).have_one_tokenizer, "their settings say so too"


def test_seeds_of_one_experiment_are_grouped_and_weigh_the_difference(tmp_path: Path) -> None:
    losses = {}
    for name, seed, rate in (("a0", 0, 1e-3), ("a1", 1, 1e-3), ("a2", 2, 1e-3), ("b0", 0, 2e-3), ("b1", 1, 2e-3)):
        url = str(tmp_path / name)
        write_run(url, num_experts=2, steps=40, seed=seed, training={"beta2": 1 - rate})
        losses[name] = read_run(url).jobs["backbone"].curves["validation_loss"].values[-1]
    found = compare({name: read_run(str(tmp_path / name)) for name in losses})
    assert found.seeds is not None
    assert found.seeds.groups == {"a0": ["a0", "a1", "a2"], "b0": ["b0", "b1"]}
    result = next(one for one in found.seeds.results if one.job == "backbone" and one.group == "b0")
    a, b = [losses[f"a{i}"] for i in range(3)], [losses[f"b{i}"] for i in range(2)]
    expected = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    assert result.difference == pytest.approx(np.mean(b) - np.mean(a))
    assert result.interval == pytest.approx((expected.low, expected.high), rel=1e-6)
    assert set(found.settings) == {"seed", "training.beta2"}


def test_a_seed_that_is_run_again_is_no_further_seed() -> None:
    runs = {name: Run(name, config={"seed": seed}) for name, seed in (("a0", 0), ("b0", 0), ("a1", 1), ("b1", 1))}
    assert group_by_settings(runs) == {"a0": ["a0", "a1"], "b0": ["b0", "b1"]}
    assert compare_seeds({name: runs[name] for name in ("a0", "b0")}, {"backbone": {"a0": 3.0, "b0": 3.0}}) is None
    unknown = {name: Run(name) for name in ("x", "y")}
    assert group_by_settings(unknown) == {"x": ["x"], "y": ["y"]}


def test_runs_recorded_under_old_names_of_routers_are_the_same_experiment(tmp_path: Path) -> None:
    runs = {}
    for name, router in (("old", "data_stats"), ("new", "ridge")):
        paths.replace_bytes(str(tmp_path / name / "config.yaml"), to_yaml(tiny_config(tmp_path)).encode())
        recorded = (tmp_path / name / "config.yaml").read_text()
        assert "router: trained\n" in recorded
        (tmp_path / name / "config.yaml").write_text(recorded.replace("router: trained\n", f"router: {router}\n"))
        write_metrics(str(tmp_path / name), "backbone", {1: 3.0})
        runs[name] = read_run(str(tmp_path / name))
    assert runs["old"].setting("assembly.router", "") == "ridge"
    assert not compare(runs).settings


def test_many_experts_are_compared_by_their_mean(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(str(tmp_path / name), num_experts=6, steps=40, seed=ord(name))
    found = compare({name: read_run(str(tmp_path / name)) for name in ("a", "b")})
    own = [found.jobs[f"expert-{index}"].metrics["loss"].curves["a"].values for index in range(6)]
    assert found.jobs[MEANS["expert"]].metrics["loss"].curves["a"].values == pytest.approx(np.mean(own, axis=0))
    text = as_text(found)
    assert "== expert-3 ==" not in text
    assert "expert-3" in text


def test_branches_are_compared_by_their_mean_too(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(str(tmp_path / name), num_experts=2, steps=40)
        for index in range(6):
            losses = falling(range(5, 41, 5), seed=10 * index + ord(name))
            write_metrics(str(tmp_path / name), f"branch-{index}", losses, losses)
    found = compare({name: read_run(str(tmp_path / name)) for name in ("a", "b")})
    assert [name for name in found.jobs if not name.startswith("branch-")] == [
        "backbone", "mean expert", "expert-0", "expert-1", "dense", "mean branch", "calibrate",
    ]  # fmt: skip
    text = as_text(found)
    assert "== branch-3 ==" not in text
    assert "== expert-1 ==" in text
    assert "single branches" in text


def test_evaluations_are_compared_by_every_metric_of_the_tasks_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: dict[str, Run] = {}
    for name in ("a", "b"):
        write_run(str(tmp_path / name), seed=len(runs))
        runs[name] = read_run(str(tmp_path / name))
    new = Metric("accuracy", "right answers", "%", better="higher")
    monkeypatch.setattr("modularforge.observe.metrics.MEASURED", (*MEASURED, new))
    assert runs["b"].evaluation
    runs["b"].evaluation["models"]["backbone"]["accuracy"] = 97.5
    found = compare(runs)
    assert [*found.evaluation] == [*(one.column for one in MEASURED), "accuracy"]
    assert found.evaluation["accuracy"]["backbone"] == {"b": 97.5}
    loss = runs["a"].evaluation["models"]["backbone"]["mean_loss"]  # type: ignore[index]
    assert found.evaluation["mean_loss"]["backbone"]["a"] == pytest.approx(loss)
    lines = as_text(found).splitlines()
    table = lines[lines.index("Test: right answers (%)") + 1 :]
    assert next(line for line in table if line.split()[:1] == ["backbone"]).split() == ["backbone", "–", "97.5"]
    assert "Test: mean loss (nats per token)" in lines


def test_the_command_writes_text_json_and_plots(tmp_path: Path) -> None:
    steps = range(500, 2501, 500)
    for name, values in (("slow", SLOW), ("fast", FAST)):
        losses = dict(zip(steps, map(math.log, values), strict=True))
        write_metrics(str(tmp_path / name), "backbone", losses, losses)
    output = tmp_path / "out"
    arguments = ["--base-dir", str(tmp_path), "--output", str(output)]
    done = run_command("modularforge", "compare", "slow", "fast", *arguments)
    assert "diverges at step 1500 (ratio 2.00); ratio 16.83" in done.stdout
    text = (output / "compare.txt").read_text()
    for word in ("first", "final", "best", "mean", "deviation", "cv %", "improved %", "Cohen d", "not independent"):
        assert word in text
    values = json.loads((output / "compare.json").read_text())
    pair = values["jobs"]["backbone"]["metrics"]["validation_perplexity"]["pairs"]["fast"]
    assert pair["divergences"][-1]["step"] == 1500
    assert values["reference"] == "slow"
    plots = {path.stem for path in (output / "plots").glob("*.png")}
    assert {"overview", "loss", "validation_perplexity", "gradient_norm"} <= plots
    refused = run_command("modularforge", "compare", "slow", "s", *arguments, check=False)
    assert refused.returncode == 2
    assert "two different runs" in refused.stderr or "match" in refused.stderr
