"""A run as it lies in the store: what is committed, what the jobs have logged, and the settings it was made with.

Reads only; works while the run is going on. What cannot be read is told in `problems` instead of hiding the rest.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from checkpoints import Artifact, StoreError, find_artifact, paths
from checkpoints.notes import read_folder
from checkpoints.parallel import in_order
from modularforge.config_files import in_new_names, make_config, read_yaml
from modularforge.errors import ConfigError, DataError
from modularforge.evaluation.results import parse_results
from modularforge.json_lines import moment, objects_in
from modularforge.norm_files import FOLDER, ROWS_NAME, Norms, parse_norms
from modularforge.observe.cleaning import REPORT_NAME, Cleaning, parse_cleaning
from modularforge.observe.metrics import JobMetrics, parse_metrics
from modularforge.pipeline import CHOSEN_FACT, OLD_NAMES, STAGES
from modularforge.provenance import SETTINGS_NAME

Value = TypeVar("Value")
READS_AT_ONCE = 16  # an object store answers in tens of milliseconds, and a run has a file for each expert
METRICS_FOLDER = "metrics"
RECORDS_NAME = "jobs.jsonl"
RESULTS_NAME = "results.json"
EVENTS_FOLDER = "cluster/events"
# Jobs of which there is one for each partition, and where their artifacts lie.
WORKER_FOLDERS = {name: stage.folder.rpartition("/")[0] for name, stage in STAGES.items() if stage.is_of_partitions}
WORKER_NAME = re.compile(rf"({'|'.join(WORKER_FOLDERS)})-(\d{{1,5}})", re.ASCII)
MOST_EXPERTS, MOST_COUNT = 10_000, 2**53  # what is read may be wrong, and is counted with
STAGE_ORDER = {name: order for order, name in enumerate(STAGES)}
# What the mean over all experts, or branches, is called, which is compared as a job of its own.
MEANS = {name: f"mean {name}" for name in WORKER_FOLDERS}


@dataclass(frozen=True)
class Run:
    """Everything that is known of a run; `artifacts` by stage (`backbone`, `expert-3`), `jobs` by the same names.

    `norms` are those of gradients, of the jobs that measured them.
    """

    url: str
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    jobs: dict[str, JobMetrics] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    norms: dict[str, Norms] = field(default_factory=dict)
    cleaning: Cleaning | None = None
    read_at: float = field(default_factory=time.time)

    @property
    def name(self) -> str:
        """The last part of its URL."""
        return self.url.rstrip("/").rsplit("/", 1)[-1]

    @property
    def num_experts(self) -> int:
        """Experts that the run has or shall have."""
        found = [int(match[2]) + 1 for name in {*self.artifacts, *self.jobs} if (match := WORKER_NAME.fullmatch(name))]
        return min(MOST_EXPERTS, max([self.setting("experts.count", 0), *found]))

    def setting(self, path: str, default: Value) -> Value:
        """A setting by its dotted name; the default where the recorded settings have none, or one of another kind."""
        value: Any = self.config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if type(value) is not type(default) or (isinstance(value, int) and not 0 <= value <= MOST_COUNT):
            return default
        return value


def read_run(url: str) -> Run:
    """Read a run; raises DataError when there is none at the URL."""
    problems: list[str] = []
    artifacts = _read_artifacts(url, problems)
    config = _newest_config(url, artifacts, problems)
    data_dir = config.get("data_dir")
    if data_dir and "prepare-data" not in artifacts:
        names = ("clean", "prepare-data", "partition")
        places = {name: STAGES[name].folder.format(data=str(data_dir).rstrip("/")) for name in names}
        artifacts |= _find_all(places, problems)
    logged = paths.list_folder(_metrics_folder(url))
    jobs = _read_jobs(url, logged, problems)
    if not artifacts and not jobs:
        raise DataError(
            f"{url} must be a run, but holds neither metrics nor a committed stage; name its --output-dir, or look "
            "for runs with --base-dir"
        )
    problems += [
        f"{job.name}: {job.unreadable_lines} unreadable lines" for job in jobs.values() if job.unreadable_lines > 1
    ]
    evaluation = _read_evaluation(artifacts, problems)
    problems += _outdated(artifacts)
    norms = _read_norms(url, logged, problems)
    cleaning = _read_cleaning(artifacts, problems)
    return Run(url, artifacts, jobs, config, evaluation, _read_records(url, problems), problems, norms, cleaning)


def is_run(url: str) -> bool:
    """Whether metrics or a committed first stage lie there."""
    names = paths.list_folder(url)
    if METRICS_FOLDER in names and any(name.endswith(".jsonl") for name in paths.list_folder(_metrics_folder(url))):
        return True
    return any(name in names and paths.exists(paths.join(url, name, "manifest.json")) for name in ("data", "backbone"))


def _read(url: str, problems: list[str]) -> bytes:
    """A file that may be missing; what else is wrong with it is told."""
    try:
        return paths.read_bytes(url)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except StoreError as error:  # it is a pipe or a folder, say
        problems.append(str(error))
        return b""


def made_with(artifact: Artifact) -> dict[str, Any]:
    """What a manifest says of settings, versions and code."""
    made = artifact.manifest.facts.get("provenance")
    return made if isinstance(made, dict) else {}


def _read_artifacts(url: str, problems: list[str]) -> dict[str, Artifact]:
    """Committed artifacts in the folders where the stages put them."""
    places = {
        name: paths.join(url, stage.folder.format(data="data"))
        for name, stage in STAGES.items()
        if "{index}" not in stage.folder
    }
    for kind, folder in WORKER_FOLDERS.items():
        for name in paths.list_folder(paths.join(url, folder)):
            if (match := WORKER_NAME.fullmatch(name)) and match[1] == kind:
                places[name] = paths.join(url, folder, name)
    return _find_all(places, problems)


def _find_all(places: dict[str, str], problems: list[str]) -> dict[str, Artifact]:
    def find(url: str) -> Artifact | None:
        try:
            return find_artifact(url)
        except StoreError as error:
            problems.append(str(error))
            return None

    found = zip(places, in_order(find, places.values(), READS_AT_ONCE), strict=True)
    return {name: artifact for name, artifact in found if artifact is not None}


def _newest_config(url: str, artifacts: dict[str, Artifact], problems: list[str]) -> dict[str, Any]:
    """The settings recorded by the newest stage, or in `config.yaml` where nothing is committed yet."""
    # A model whose experts were chosen by hand records another number of experts than the run trains.
    made = [artifact for artifact in artifacts.values() if not artifact.manifest.facts.get(CHOSEN_FACT)]
    newest = max(made or artifacts.values(), key=lambda artifact: artifact.manifest.created, default=None)
    if newest is not None:
        config = made_with(newest).get("config")
        return in_new_names(config) if isinstance(config, dict) else {}
    path = paths.join(url, SETTINGS_NAME)
    try:
        values = read_yaml(path) if paths.exists(path) else {}
        if values:
            make_config(values, path)
        return in_new_names(values)
    except ConfigError as error:
        problems.append(str(error))
        return {}


def _read_jobs(url: str, logged: list[str], problems: list[str]) -> dict[str, JobMetrics]:
    folder = _metrics_folder(url)
    files = [name for name in logged if name.endswith(".jsonl")]
    # Of a run that earlier versions calibrated, and this one again, the newest: the others' models are gone.
    files.sort(key=_newest_last)
    contents = in_order(lambda name: _read(paths.join(folder, name), problems), files, READS_AT_ONCE)
    names = [OLD_NAMES.get(name, name) for name in (file.removesuffix(".jsonl") for file in files)]
    jobs = {name: parse_metrics(name, content) for name, content in zip(names, contents, strict=True)}
    return {name: jobs[name] for name in sorted(jobs, key=job_order)}


def _newest_last(file: str) -> int:
    """Sorts files by the age of their names."""
    return [f"{name}.jsonl" for name in (*OLD_NAMES, file.removesuffix(".jsonl"))].index(file)


def _read_norms(url: str, logged: list[str], problems: list[str]) -> dict[str, Norms]:
    if FOLDER not in logged:
        return {}
    folder = paths.join(_metrics_folder(url), FOLDER)
    names = sorted(paths.list_folder(folder), key=job_order)
    contents = in_order(lambda name: _read(paths.join(folder, name, ROWS_NAME), problems), names, READS_AT_ONCE)
    found = {name: parse_norms(content) for name, content in zip(names, contents, strict=True)}
    return {name: norms for name, norms in found.items() if len(norms)}


def job_order(name: str) -> tuple[int, int, str]:
    """Sorts stages and jobs as the table of stages has them, experts by index, then the rest."""
    match = WORKER_NAME.fullmatch(name)
    kind, index = (match[1], int(match[2])) if match else (name, 0)
    return STAGE_ORDER.get(kind, len(STAGE_ORDER)), index, name


def kind_of(job: str) -> str | None:
    """`expert` or `branch` for one of many such jobs, else None."""
    match = WORKER_NAME.fullmatch(job)
    return match[1] if match else None


def without_members(jobs: Iterable[str], most: int) -> list[str]:
    """Jobs without the single experts, or branches, where there are more than `most` and their mean is there."""
    names = list(jobs)
    many = {kind for kind in MEANS if sum(kind_of(name) == kind for name in names) > most and MEANS[kind] in names}
    return [name for name in names if kind_of(name) not in many]


def _read_evaluation(artifacts: dict[str, Artifact], problems: list[str]) -> dict[str, Any] | None:
    if "evaluate" not in artifacts:
        return None
    try:
        content = artifacts["evaluate"].read_bytes(RESULTS_NAME)
        return parse_results(content, paths.join(artifacts["evaluate"].url, RESULTS_NAME))
    except (StoreError, DataError) as error:
        problems.append(str(error))
        return None


def _read_cleaning(artifacts: dict[str, Artifact], problems: list[str]) -> Cleaning | None:
    if "clean" not in artifacts:
        return None
    try:
        return parse_cleaning(
            artifacts["clean"].read_bytes(REPORT_NAME), paths.join(artifacts["clean"].url, REPORT_NAME)
        )
    except (StoreError, DataError) as error:
        problems.append(str(error))
        return None


def _outdated(artifacts: dict[str, Artifact]) -> list[str]:
    """Say so when the evaluation measured another assembled model than the one that is there now."""
    if "evaluate" not in artifacts or "assemble" not in artifacts:
        return []
    measured = artifacts["evaluate"].manifest.inputs.get("assembled")
    if measured in (None, artifacts["assemble"].manifest.fingerprint):
        return []
    return ["the evaluation is of an assembled model that has been replaced; run `modularforge evaluate` again"]


def _read_records(url: str, problems: list[str]) -> list[dict[str, Any]]:
    """What the launcher noted: {job, event: submitted|started|requeued|ended, time}.

    Each job also keeps notes of its own, which are newer than the merged ones while the run is going on.
    """
    notes = read_folder(paths.join(url, EVENTS_FOLDER), lambda file: _read(file, problems))
    contents = [_read(paths.join(url, RECORDS_NAME), problems), *notes.values()]
    found = [value for content in contents for value in objects_in(content)[0]]
    texts = [v for v in found if isinstance(v.get("job"), str) and isinstance(v.get("event"), str)]
    kept = [{**v, "time": time} for v in texts if (time := moment(v.get("time"))) is not None]
    return list({(v["job"], v["event"], v["time"]): v for v in kept}.values())


def _metrics_folder(url: str) -> str:
    return paths.join(url, METRICS_FOLDER)


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted names and values of nested settings."""
    if isinstance(value, dict):
        inner = [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()]
        return [leaf for name, item in inner for leaf in flatten(item, name)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [leaf for index, item in enumerate(value) for leaf in flatten(item, f"{prefix}.{index}")]
    return [(prefix, "" if value is None else str(value))]
