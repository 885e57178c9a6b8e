"""Train the runs of a study on a cluster: each is handed to `python -m launcher --cluster` as the run that it is.

Data and partitions are prepared here, because runs share them. Runs that need a backbone of their own go first; the
others copy it from them, and whatever else they share, and follow. What the launcher made is then found like anything
else, so that only measuring is left to this process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from checkpoints import paths
from checkpoints.commands import shown_command
from modularforge.config import Config
from modularforge.errors import TrainingError
from modularforge.log import logger
from modularforge.pipeline import NEVER, STAGES, fingerprint, stage_settings
from modularforge.settings import to_yaml
from modularforge.study.models import NEEDS
from modularforge.study.runs import Runs, StudyRun
from modularforge.study.study_file import Variant

SETTINGS_NAME = "launch.yaml"
# The router of a BTX merge is trained here, from branches that the cluster trained.
BASELINE_OF = {name: stage.baseline for name, stage in STAGES.items() if stage.baseline not in (None, NEVER)}
BASELINE_OF |= {"btx": "btx"}


def train_on_cluster(runs: Runs, variants: Sequence[Variant], seeds: Sequence[int]) -> None:
    """Submit what the variants need, in two waves, and wait for it; raises TrainingError when a run failed."""
    waves: tuple[list[StudyRun], list[StudyRun]] = ([], [])
    for seed in seeds:
        backbones: set[str] = set()
        for recipe in dict.fromkeys(variant.recipe for variant in variants if seed in variant.seeds):
            run = runs.run(seed, recipe)
            backbone = fingerprint("backbone", stage_settings(run.config, "backbone"), {})
            waves[backbone in backbones].append(run)
            backbones.add(backbone)
    for wave in waves:
        launched = [_launch(run, _baselines(variants, run)) for run in wave]
        failed = [url for url in launched if not _launcher("wait", url)]
        if failed:
            command = shown_command("python", "-m", "launcher", "status", "--config", failed[0])
            raise TrainingError(
                f"all runs of the study must end well, but these did not: {', '.join(failed)}; see `{command}`, and "
                "repeat the command"
            )


def _launch(run: StudyRun, baselines: list[str]) -> str:
    """Submit one run; returns the URL of its settings."""
    run.obtain("partitions")
    run.take_all()
    evaluation = run.config.evaluation.model_copy(update={"baselines": baselines})
    config: Config = run.config.model_copy(update={"evaluation": evaluation})
    url = paths.join(config.output_dir, SETTINGS_NAME)
    paths.replace_bytes(url, to_yaml(config).encode())
    logger.info("submitting %s", config.output_dir)
    if not _launcher("--cluster", url):
        raise TrainingError(f"{config.output_dir} must be submitted, but the launcher failed; see its message above")
    return url


def _baselines(variants: Sequence[Variant], run: StudyRun) -> list[str]:
    """The baselines that the variants of a run need, as `evaluation.baselines` names them."""
    recipe = run.config.output_dir.rstrip("/").rsplit("/", 1)[-1]
    stages = {NEEDS[variant.kind] for variant in variants if variant.recipe == recipe}
    return list(dict.fromkeys(name for stage, name in BASELINE_OF.items() if stage in stages))


def _launcher(command: str, settings_url: str) -> bool:
    """Run a command of the launcher; whether it ended well."""
    words = [sys.executable, "-m", "launcher", command, "--config", settings_url]
    return subprocess.run(words, check=False).returncode == 0
