"""The proof on a GPU, as far as a CPU can have it: results, slices, and the benchmark at its smallest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import speed as measured
from benchmarks.gpu.marked import outcomes, run_tests
from benchmarks.gpu.parts import Part, Proof, Values
from benchmarks.gpu.peers import plain_torch
from benchmarks.gpu.speed import MIXTURE, OURS, PLAIN_EXPERT, Case, speed, speed_parts, targets
from benchmarks.gpu.studies import ended
from benchmarks.gpu.timing import Shape

PLAIN = "plain torch (nanoGPT)"
SMALLEST = Shape(16, 1, 2, 8, 2, 32, 2, 1, 1, False)


def parts(calls: list[str], results: dict[str, Values | None]) -> list[Part]:
    def run(name: str, _seconds: float) -> Values | None:
        calls.append(name)
        return results[name]

    return [Part("b", name, lambda seconds, name=name: run(name, seconds)) for name in results]  # type: ignore[misc]


def test_what_has_a_result_is_not_done_again_on_another_machine_either(tmp_path: Path) -> None:
    calls: list[str] = []
    results: dict[str, Values | None] = {"one": {"value": 1}, "two": None, "three": {"value": 3}}
    left = Proof(tmp_path).go_on(parts(calls, results))
    assert [part.name for part in left] == ["two", "three"]
    assert calls == ["one", "two"]
    # Only the small files are carried.
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "results").rename(other / "results")
    results["two"] = {"value": 2}
    assert Proof(other).go_on(parts(calls, results)) == []
    assert calls == ["one", "two", "two", "three"]
    assert json.loads((other / "results" / "b-two.json").read_text())["value"] == 2


def test_without_time_the_first_part_is_begun_all_the_same_and_no_other(tmp_path: Path) -> None:
    calls: list[str] = []
    for expected in (["one"], ["one", "two"]):
        left = Proof(tmp_path).go_on(parts(calls, {"one": {}, "two": {}}), minutes=0)
        assert calls == expected
    assert left == []


def test_the_command_does_the_slice_it_is_asked_for_and_says_that_there_is_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    chosen = parts(calls, {"one": {"text": "a table"}, "two": None})
    monkeypatch.setattr(command, "parts_of", lambda name, _folder, _tiny: chosen if name == "b" else [])
    assert command.main(["--slice", "b", "--output", str(tmp_path)]) == command.MORE
    said = capsys.readouterr().out
    assert "a table" in said
    assert "b two: not done" in said
    assert "1 of 2 parts are left, two first" in said
    assert command.main(["--slice", "a", "--output", str(tmp_path)]) == 0
    assert calls == ["one", "two"]


def test_all_slices_have_parts_with_names_of_their_own(tmp_path: Path) -> None:
    found = [part for name in command.SLICES for part in command.parts_of(name, tmp_path, tiny=False)]
    assert len({(part.slice, part.name) for part in found}) == len(found)
    assert {part.slice for part in found} == set(command.SLICES)


def test_speed_at_its_smallest_measures_all_that_is_trained_beside_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "ROUNDS", 1)
    monkeypatch.setattr(measured, "peers", lambda: {PLAIN: plain_torch})  # transformers alone takes ten seconds to load
    found = speed(SMALLEST, 60.0)
    assert found["failed"] == {}
    assert {OURS, PLAIN_EXPERT, MIXTURE, PLAIN} <= found["cases"].keys()
    assert all(case["tokens_per_second"] > 0 and 0 < case["mfu"] < 1 for case in found["cases"].values())
    assert len(found["targets"]) == 5
    assert all(part.slice == "b" for part in speed_parts(tiny=True))


def test_ratios_are_those_of_the_times() -> None:
    cases = {name: Case(list, flops) for name, flops in ((OURS, 3.0), (PLAIN_EXPERT, 2.0))}
    median = {OURS: 1.0, PLAIN_EXPERT: 1.0, "plain torch (nanoGPT)": 2.0, f"{OURS}, compiled": 0.5}
    found = targets(median, cases, {OURS: {"mfu": 0.2}, f"{OURS}, compiled": {"mfu": 0.4}})
    assert found["backbone, MFU"][0] == 0.4
    assert found["backbone, of the speed of the best peer"][0] == 4.0
    assert found[f"{PLAIN_EXPERT}, of its arithmetic beside the backbone"][0] == pytest.approx(1.5)


def test_tests_without_a_gpu_are_skipped_and_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="a" time="0.5"/><testcase name="b" time="0"><skipped/></testcase>'
        '<testcase name="c" time="1"><failure/></testcase></testsuite></testsuites>'
    )
    assert outcomes(report)["outcomes"] == {"passed": 1, "skipped": 1, "failure": 1}
    assert run_tests(tmp_path / "there_is_none.py", tiny=False, seconds=60) is None


def test_a_study_is_told_to_stop_when_the_time_is_over() -> None:
    assert ended(["sleep", "0"], 5)
    assert not ended(["sleep", "60"], 0)
