"""M0 the model, M1 the data, M2 a short training: which checks there are, the run of them, and what one says.

A check yields findings while all is well and raises an error with its cause when it is not.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from modularforge.config import Config
from modularforge.config_files import make_config, sample_sources
from modularforge.errors import ConfigError, UserError

TITLES = {
    "m0": "M0  the model builds, runs forward and backward, and knows nothing yet",
    "m1": "M1  the data loads, tokenises, packs, and decodes to the same text",
    "m2": "M2  the loss of a short training falls",
}

Check = Callable[[], Iterator[str]]


class SanityError(UserError):
    """Something is not as it must be; the message says what and what to do."""


@dataclass
class Outcome:
    """One check: what it found, the cause of its failure if it failed, and how long it took."""

    name: str
    findings: list[str] = field(default_factory=list)
    cause: str | None = None
    seconds: float = 0.0


def run_checks(config: Config, test: str = "all", quick: bool = False) -> bool:
    """Run the checks that `test` names and print what they find; whether all passed."""
    if test != "all" and test not in TITLES:
        raise ConfigError(f"--test must be all, {', '.join(TITLES)}, but is {test!r}; choose one of these")
    from modularforge.sanity import data, model, speech, training
    from modularforge.sanity.node import describe_node

    start = time.perf_counter()
    say = partial(print, flush=True)
    checks = {"m0": model.check_model, "m1": data.check_data, "m2": training.check_training}
    if config.task == "speech":
        checks = {"m0": speech.check_model, "m1": speech.check_data, "m2": speech.check_training}
    outcomes = [perform("Node", describe_node, say)]
    for name in (name for name in TITLES if test in ("all", name)):
        if name == "m2" and config.task != "speech" and outcomes[-1].name == TITLES["m1"] and outcomes[-1].cause:
            config, title = with_sample(config), f"{TITLES[name]} (on the shipped sample)"
        else:
            title = TITLES[name]
        outcomes.append(perform(title, partial(checks[name], config, quick), say))
    failed = [outcome.name.split()[0] for outcome in outcomes if outcome.cause]
    verdict = f"failed: {', '.join(failed)}" if failed else "all is well"
    seconds = time.perf_counter() - start
    say(f"sanity: {len(outcomes) - len(failed)} of {len(outcomes)} checks passed in {seconds:.0f} s; {verdict}")
    return not failed


def with_sample(config: Config) -> Config:
    """The same settings with the corpus of the package, for a check that must not depend on the data."""
    values = config.model_dump(mode="json")
    return make_config({**values, "data": {**values["data"], "sources": sample_sources()}}, "the shipped sample")


def perform(name: str, check: Check, say: Callable[[str], None]) -> Outcome:
    """Run one check, telling each finding as it comes; whatever is raised becomes the cause of the failure."""
    outcome, start = Outcome(name), time.perf_counter()
    say(name)
    try:
        for finding in check():
            outcome.findings.append(finding)
            say(f"  ok    {finding}")
    except Exception as error:  # a check may fail in any way, and every way must be told
        outcome.cause = _cause(error)
        say(f"  FAIL  {outcome.cause}")
    outcome.seconds = time.perf_counter() - start
    return outcome


def _cause(error: Exception) -> str:
    """The error's sentence; for one that is not meant for users also its type and where it was raised."""
    if isinstance(error, UserError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
