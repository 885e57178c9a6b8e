"""The sbatch scripts, which submitit words, and their submission. Only this file knows submitit.

Its defaults that sites or we cannot use are replaced: no wckey, no pickled function (the job runs our node program,
which reads its inputs from the store), no srun around that program, whose signals submitit would swallow, and array
indices that are ours. It does not call sbatch either: it takes `%a` in the name of a folder for a pattern.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.redact import redact
from checkpoints.urls import has_control_characters
from launcher.arrays import ArrayPart
from launcher.command import job_environment
from launcher.layout import log_file, log_pattern, work_folder
from launcher.slurm import SlurmError, run_slurm
from launcher.snapshot import node_words
from launcher.tasks import nodes_of
from modularforge.config import Config
from modularforge.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """One job or array to submit: its group, its key, the snapshot that it runs, and the job ids it waits for."""

    group: str
    key: str
    run_id: str
    snapshot: Path
    part: ArrayPart | None = None
    after_success: tuple[str, ...] = ()
    after_end: tuple[str, ...] = ()
    after_task: tuple[str, ...] = ()
    """Arrays of which each task waits for the one of its own index."""
    patience: int | None = None
    """Minutes from the start of `after_end` after which it waits no more."""


def job_names(run_id: str, groups: list[str]) -> list[str]:
    """Slurm job names of a run, by which one squeue call finds all of them."""
    return [f"{group}-{run_id[:8]}" for group in groups]


def comment_of(run_id: str, key: str) -> str:
    """What is unique to one submission, and tells whether an sbatch without an answer succeeded."""
    return f"modularforge:{run_id}:{key}"


def script_of(config: Config, request: Request) -> str:
    """The sbatch script; raises ConfigError where it would have lines that are not ours."""
    text: str = _executor(config, request)._make_submission_file_text(node_command(config, request), "")
    return text


def submit(config: Config, request: Request) -> str:
    """Call sbatch; returns the job id, raises SlurmError with sbatch's complaint."""
    script = work_folder(config) / "scripts" / f"{request.key}.sh"
    for folder in (script.parent, log_file(config, request.group).parent):
        folder.mkdir(parents=True, exist_ok=True)
    script.write_text(script_of(config, request), encoding="utf-8")
    try:
        answer = run_slurm("sbatch", str(script), env=job_environment(config.cluster.pass_environment))
    except SlurmError as error:
        raise SlurmError(f"sbatch must accept {request.group}, but: {error}") from error
    if match := re.search(r"job (\d+)", answer):
        return match[1]
    raise SlurmError(f"sbatch must name the job of {request.group}, but said: {answer.strip()!r:.200}; look at squeue")


def node_command(config: Config, request: Request) -> str:
    """The line that the batch script runs on its first node."""
    python = config.cluster.python or sys.executable
    words = node_words(python, request.snapshot, request.group, request.key)
    if request.part:
        words += ["--offset", str(request.part.offset)]
    return f"exec {shlex.join([_plain('the command of the job', word) for word in words])}"


def _plain(name: str, value: Any) -> Any:
    """Refuse what a script cannot hold, such as a line break in the name of the working folder."""
    text = str(value)
    if has_control_characters(text) or (name.startswith("-") and "\\" in text):
        raise ConfigError(
            f"{name} must be one line of a script without backslashes, which sbatch drops, but is {redact(text)!r:.80}"
            "; change that setting, or rename that folder"
        )
    return value


def parameters_of(config: Config, request: Request) -> dict[str, Any]:
    """submitit's parameters, which become the options of sbatch."""
    cluster, nodes = config.cluster, nodes_of(config, request.group)
    offset = request.part.offset if request.part else 0
    more: dict[str, Any] = {
        "output": log_pattern(config, request.group, offset, request.part is not None),
        "requeue": True,
        "kill-on-invalid-dep": "yes",
        "chdir": str(Path.cwd()),
    }
    # submitit writes an option without a value for True, and False would become a value.
    more |= {_spelt(name): value for name, value in cluster.sbatch_options.items()}
    more = {name: value for name, value in more.items() if value is not False}
    if request.part:
        more["array"] = request.part.array
    return {
        "job_name": job_names(request.run_id, [request.group])[0],
        "comment": comment_of(request.run_id, request.key),
        "partition": cluster.queue or None,
        "account": cluster.account or None,
        "qos": cluster.qos or None,
        "constraint": cluster.constraint or None,
        "nodes": nodes.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": nodes.cpus,
        "gpus_per_node": nodes.gpus or None,
        "mem": f"{max(1, int(nodes.memory_gb * 1024))}MB" if nodes.memory_gb else None,
        "time": nodes.time_minutes,
        "signal_delay_s": cluster.warning_seconds,
        "dependency": dependency(request),
        "setup": cluster.setup or None,
        "wckey": None,
        "stderr_to_stdout": True,
        "use_srun": False,
        "additional_parameters": more,
    }


def _spelt(option: str) -> str:
    """An option as submitit names it, so that the settings' value takes the place of ours, however it is spelt."""
    dashed = option.replace("_", "-")
    return dashed if dashed in ("open-mode", "kill-on-invalid-dep") else dashed.replace("-", "_")


def dependency(request: Request) -> str | None:
    """The value of sbatch's --dependency, or None."""
    kinds = [("afterok", request.after_success), ("aftercorr", request.after_task)]
    if request.patience is None or not request.after_end:
        kinds.append(("afterany", request.after_end))
        return ",".join(":".join((kind, *jobs)) for kind, jobs in kinds if jobs) or None
    begun = ":".join(("after", *(f"{job}+{request.patience}" for job in request.after_end)))
    # Slurm has "any of these" or "all of these": of several arrays the end of one must not be enough.
    return f"afterany:{request.after_end[0]}?{begun}" if len(request.after_end) == 1 else begun


def _executor(config: Config, request: Request) -> Any:
    from submitit.slurm.slurm import SlurmExecutor

    class AnywhereExecutor(SlurmExecutor):  # type: ignore[misc]
        """One that also writes scripts where no Slurm is installed."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    executor = AnywhereExecutor(work_folder(config) / "scripts")
    parameters = parameters_of(config, request)
    for name, value in {**parameters, **parameters["additional_parameters"]}.items():
        if name != "setup":
            _plain(f"--{name}", value)
    executor.update_parameters(**parameters)
    return executor
