"""M0 the model, M1 the data, M2 a short training: which checks there are, and the run of them."""

from __future__ import annotations

import time
from functools import partial

from modularforge.config import Config
from modularforge.errors import ConfigError
from modularforge.sanity.findings import perform
from modularforge.settings import make_config, sample_sources

TITLES = {
    "m0": "M0  the model builds, runs forward and backward, and knows nothing yet",
    "m1": "M1  the data loads, tokenises, packs, and decodes to the same text",
    "m2": "M2  the loss of a short training falls",
}


def run_checks(config: Config, test: str = "all", quick: bool = False) -> bool:
    """Run the checks that `test` names and print what they find; whether all passed."""
    if test != "all" and test not in TITLES:
        raise ConfigError(f"--test must be all, {', '.join(TITLES)}, but is {test!r}; choose one of these")
    from modularforge.sanity import data, model, training
    from modularforge.sanity.node import describe_node

    start = time.perf_counter()
    say = partial(print, flush=True)
    checks = {"m0": model.check_model, "m1": data.check_data, "m2": training.check_training}
    outcomes = [perform("Node", describe_node, say)]
    for name in (name for name in TITLES if test in ("all", name)):
        if name == "m2" and outcomes[-1].name == TITLES["m1"] and outcomes[-1].cause:
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
