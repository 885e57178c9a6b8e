"""Slice a: the tests marked `gpu`, each file a part. On a CPU they run as well where `ON_CPU` is set."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.parts import Part, Values

FOLDER = Path("tests/gpu")
ON_CPU = "MODULARFORGE_GPU_TESTS_ON_CPU"


def test_parts(tiny: bool) -> list[Part]:
    """A part for each file of tests."""
    return [Part("a", file.stem, partial(run_tests, file, tiny), 150) for file in sorted(FOLDER.glob("test_*.py"))]


def run_tests(file: Path, tiny: bool, seconds: float) -> Values | None:
    """Outcomes of a file's tests; None where one failed, or all did not end in time: they are run again next time."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(file), "-m", "gpu", f"--junitxml={report}"]
        environment = {**os.environ, ON_CPU: "1"} if tiny else dict(os.environ)
        try:
            done = subprocess.run(command, env=environment, timeout=max(60.0, seconds), check=False)
        except subprocess.TimeoutExpired:
            return None
        values = outcomes(report) if report.is_file() else {}
    return values if done.returncode == 0 else None


def outcomes(report: Path) -> Values:
    """Each test's outcome and seconds, and how many had which."""
    tests: Values = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        tests[case.attrib["name"]] = [found, float(case.attrib["time"])]
    return {"outcomes": dict(Counter(outcome for outcome, _ in tests.values())), "tests": tests}
