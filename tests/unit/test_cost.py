"""What a run is said to cost before it begins, and while it goes on."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launcher import plan as launch_plan
from launcher.tasks import build_groups, build_tasks
from modularforge import cost
from modularforge.cli import _announced, _done_before, _make
from modularforge.config import Config
from modularforge.config_files import load_config
from modularforge.cost import (
    Machine,
    Parts,
    Peak,
    Rates,
    describe_cost,
    disk_bytes,
    gpu_hours,
    memory_bytes,
    parts_of,
    span,
    training_flops_per_token,
)
from modularforge.info import describe
from modularforge.model.backbone import build_backbone
from modularforge.pipeline import STAGES
from modularforge.run import Run
from modularforge.training.job import Job
from tests.conftest import ROOT, tiny_config


def quickstart(**changes: object) -> Config:
    return load_config(str(ROOT / "configs/quickstart.yaml"), [*changes.items()])


def test_flops_of_a_training_are_those_that_torch_counts() -> None:
    config = quickstart()
    model, tokens = build_backbone(config.model, config.data.vocab_size), 128
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long)).sum().backward()
    # torch counts attention over all positions, and in another number of products on the way back.
    assert training_flops_per_token(config, "backbone") == pytest.approx(counter.get_total_flops() / tokens, rel=0.2)
    assert training_flops_per_token(config, "expert") < training_flops_per_token(config, "backbone")
    assert training_flops_per_token(config, "joint") > training_flops_per_token(config, "dense")
    assert training_flops_per_token(config, "evaluate") == 0


def test_parts_of_a_run_are_those_that_run_all_makes_in_its_order() -> None:
    names = [str(part.job) for part in parts_of(quickstart())]
    experts = [f"expert-{index}" for index in range(5)]
    assert names == ["prepare-data", "partition", "backbone", *experts, "assemble", "calibrate", "dense", "evaluate"]
    tokens = {str(part.job): part.tokens for part in parts_of(quickstart())}
    assert tokens["backbone"] == 800 * 32 * 128
    assert tokens["dense"] == 5 * 200 * 8 * 128, "the dense baseline is part of what it costs"


def test_the_rest_of_a_run_is_told_as_the_machine_is_thought_to_be_and_then_as_it_was() -> None:
    config = quickstart()
    flops = {str(part.job): part.flops for part in parts_of(config)}
    total = sum(flops.values())
    parts = Parts(config, Machine("test", total / 600))
    assert parts.line("prepare-data") == "part 1 of 12: prepare-data, about 10 min left"
    parts.took("prepare-data", None, 1000.0)  # which nobody estimated
    assert parts.line("backbone") == "part 3 of 12: backbone, about 10 min left"
    parts.took("backbone", None, 3600 * flops["backbone"] / total)  # six times as slow
    left = sum(part.flops for part in parts.parts[5:]) / total
    assert parts.line("expert", 2) == f"part 6 of 12: expert-2, about {span(3600 * left)} left"
    assert Parts(config).line("backbone") == "part 3 of 12: backbone", "nothing is said of what nobody knows"


def test_what_an_earlier_start_did_of_a_part_is_not_this_machines_pace() -> None:
    """Seen: of a backbone that went on at 73 %, the whole was counted, and the rest was said to take a quarter."""
    config = quickstart()
    flops = {str(part.job): part.flops for part in parts_of(config)}
    rate = sum(flops.values()) / 600
    parts = Parts(config, Machine("test", rate))
    left = 600 - 0.75 * flops["backbone"] / rate
    assert parts.line("backbone", None, 0.75) == f"part 3 of 12: backbone, about {span(left)} left"
    parts.took("backbone", None, 10 * 0.25 * flops["backbone"] / rate, 0.75)  # ten times as slow as was thought
    rest = sum(part.flops for part in parts.parts[3:])
    assert parts.line("expert", 0) == f"part 4 of 12: expert-0, about {span(10 * rest / rate)} left"


def test_run_all_knows_from_checkpoints_how_much_of_a_part_is_done(tmp_path: Path) -> None:
    run = Run(tiny_config(tmp_path / "run", experts={"count": 2}))
    assert _done_before(run, "backbone", None) == 0
    assert _done_before(run, "prepare-data", None) == 0
    half = run.config.experts.steps // 2
    (tmp_path / "run" / "checkpoints" / "expert-1" / f"step-{half:08}").mkdir(parents=True)
    assert _done_before(run, "expert", 1) == half / run.config.experts.steps
    assert _done_before(run, "expert", 0) == 0


def test_lengths_of_time_have_one_unit() -> None:
    assert [span(value) for value in (0.1, 40, 720, 12_240, 864_000)] == ["1 s", "40 s", "12 min", "3.4 h", "10 days"]


def test_info_says_time_tokens_disk_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    total = sum(part.flops for part in parts_of(quickstart()))
    monkeypatch.setattr("modularforge.info.this_machine", lambda _: Machine("a laptop", total / 600))
    shown = describe(quickstart())
    assert "time:       about 10 min here (a laptop): backbone 6 min, 5 x expert " in shown
    assert "5,447,680 tokens are trained on" in shown
    assert "space:      about " in shown


def test_disk_and_memory_are_near_what_a_run_takes(finished_run: Config) -> None:
    root = Path(finished_run.output_dir)
    taken = sum(
        path.stat().st_size
        for path in root.rglob("*")
        if path.is_file() and path.suffix == ".safetensors" and "statistics" not in path.name
    )
    assert taken / 3 < disk_bytes(finished_run) < 3 * taken
    batch = finished_run.model_copy(update={"backbone": finished_run.backbone.model_copy(update={"batch_size": 400})})
    assert memory_bytes(batch) > 10 * memory_bytes(finished_run), "activations count"
    assert describe_cost(finished_run, Machine("x", 1e9)).count("\n") == 1


def test_what_a_cluster_costs_is_told_beside_what_is_asked_for() -> None:
    config = load_config(str(ROOT / "configs/cluster.yaml"), ["cluster.price_per_gpu_hour=2.5"])
    groups = build_groups(build_tasks(config))
    needed = gpu_hours(config, [group.name for group in groups])
    line = launch_plan.hours(config, groups)
    assert f"the FLOPs need about {needed:,.2g}, at 40% of the peak of A100s" in line
    assert f"at 2.5 per GPU-hour about {2.5 * needed:,.2f}, at most 1,055.00" in line
    no_gpus = load_config(str(ROOT / "configs/cluster-cpu.yaml"))
    assert "FLOPs" not in launch_plan.hours(no_gpus, build_groups(build_tasks(no_gpus)))


def test_a_job_of_a_run_knows_its_flops() -> None:
    job = Job.of_run(quickstart(), "expert-3", quickstart().experts, "")
    assert job.flops_per_unit == training_flops_per_token(quickstart(), "expert") > 0


def test_the_peak_is_the_best_of_tries_apart_and_what_was_reached_is_no_more_than_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured, now = iter([1e9, 4e9, 2e9, *[1e9] * 20]), iter(range(1000))
    monkeypatch.setattr(cost, "matrix_rates", lambda *_: Rates(next(measured), 0.0))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    peak = Peak()
    assert peak.rate == 1e9, "measured while the machine was busy"
    assert peak.share(1e9) == 0.25
    assert peak.share(1e9) == 0.25, "a worse try changes nothing"
    assert peak.share(9.64e9) == 1.0, "not 241 %"
    assert peak.share(4.82e9) == 0.5
    for _ in range(20):
        peak.share(1e9)
    assert sum(1 for _ in measured) == 20 + 3 - cost.PEAK_TRIES, "it stops trying"


def test_tries_of_the_peak_are_no_closer_than_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = iter([1e9])
    monkeypatch.setattr(cost, "matrix_rates", lambda *_: Rates(next(tries), 0.0))
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    peak = Peak()
    assert peak.share(5e8) == peak.share(5e8) == 0.5


def test_a_gpu_that_is_known_by_its_name_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    monkeypatch.setattr(cost, "matrix_rates", lambda *_: pytest.fail("a known peak was measured"))
    assert Peak().share(378e12) == 0.5


def test_a_machine_that_was_busy_is_measured_again_until_a_part_has_shown_it() -> None:
    config = quickstart()
    total = sum(part.flops for part in parts_of(config))
    measured = iter([Machine("test", total / 6000), Machine("test", total / 600)])
    parts = Parts(config, Machine("test", total / 1200), measure=lambda: next(measured))
    assert parts.line("prepare-data") == "part 1 of 12: prepare-data, about 1.7 h left", "others came"
    assert parts.line("backbone") == "part 3 of 12: backbone, about 10 min left"
    parts.took("backbone", None, 60.0)
    assert ", about " in parts.line("expert", 0), "which is not measured any more"


def test_a_busy_machine_is_told_by_its_mean_and_a_single_thread_where_that_is_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen at load 10: two threads reached 300 GFLOPs a second in the best try and 4 in the mean, one thread 34."""
    config, total = quickstart(), sum(part.flops for part in parts_of(quickstart()))
    rate = total / 60 / cost.SHARE_REACHED
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    busy = "beside what else computes here, about 70 min at the pace of this moment"
    for rates, single, said in (
        (Rates(rate, rate / 1.5), Rates(rate, rate), []),
        (Rates(rate, rate / 70), Rates(rate, rate / 9), [busy + ", about 9 min with OMP_NUM_THREADS=1"]),
        (Rates(rate / 60, rate / 70), Rates(rate, rate / 9), [busy + ", about 9 min with OMP_NUM_THREADS=1"]),
        (Rates(rate, rate / 70), Rates(rate, rate / 50), [busy]),
    ):
        monkeypatch.setattr(cost, "_rates", lambda _, rates=rates: rates)
        monkeypatch.setattr(cost, "_rates_of_one_thread", lambda _, single=single: single)
        lines = describe_cost(config, cost.this_machine(config)).splitlines()
        assert lines[1:-1] == said
        assert lines[-1].endswith(" of memory")
    assert Parts(config, cost.this_machine(config)).line("prepare-data").endswith("about 70 min left")


@pytest.mark.parametrize(("load", "said"), [(5.2, ", at load 5 on 2 cores, so this is rough"), (2.3, "")])
def test_an_estimate_says_that_more_programs_compute_than_there_are_cores(
    monkeypatch: pytest.MonkeyPatch, load: float, said: str
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(cost, "_rates", lambda _: Rates(1e9, 1e9))
    monkeypatch.setattr(cost, "_rates_of_one_thread", lambda _: Rates(1e9, 1e9))
    text = describe_cost(quickstart(), cost.this_machine(quickstart()))
    assert f"of this processor{said}): " in text
    assert text.count("load") == bool(said), "once"


def test_the_mean_of_tries_counts_those_that_others_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    lengths = iter([9.0, 0.01, *[0.1] * 100])  # the first one wakes the library and does not count

    def multiply() -> None:
        clock[0] += next(lengths)

    with_one = cost._rates_of_one_thread(quickstart())
    assert with_one.best >= with_one.mean > 0
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    rates = cost._rates_of(multiply, 1.0, seconds=0.15, least=5)
    assert rates.best == pytest.approx(100)
    assert rates.mean == pytest.approx(5 / 0.41), "longer than asked for, until it is the mean of some tries"
    assert cost._rates_of(multiply, 1.0, seconds=0.15, least=1000).mean == pytest.approx(10), "but not for ever"


def test_run_all_says_what_it_will_cost_and_where_it_is(
    finished_run: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("modularforge"), "propagate", True)
    config = tiny_config(tmp_path / "run", experts={"count": 2}, evaluation={"baselines": []})
    monkeypatch.setattr("modularforge.run.STAGES", {name: _Made() for name in STAGES})
    run = Run(config)
    with caplog.at_level(logging.INFO):
        parts = _announced(run, ["prepare-data", "partition"])
        for job in ("backbone", "expert", "assemble"):
            _make(run, job, parts=parts)
    lines = [*dict.fromkeys(caplog.messages)]  # other tests' libraries may have made a record reach the root twice
    assert lines[0].startswith("about ")
    assert " of memory" in lines[1]
    told = [line for line in lines if line.startswith("part ")]
    assert [line.split(",")[0] for line in told] == [
        "part 1 of 6: backbone",
        "part 2 of 6: expert-0",
        "part 3 of 6: expert-1",
        "part 4 of 6: assemble",
        "part 5 of 6: calibrate",
    ]
    assert told[0].endswith(" left")
    caplog.clear()
    _announced(Run(finished_run), [])
    assert caplog.messages == [], "a finished run costs nothing"


class _Made:
    """A stage that is made at once."""

    job = ""

    def function(self, _task: str) -> object:
        return lambda *_: None
