"""Before the first submission: try everything that would fail hours later, and report every problem at once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checkpoints import StoreError, paths
from launcher.arrays import cut
from launcher.command import job_environment
from launcher.layout import FOLDER, work_folder
from launcher.sbatch import Request, script_of
from launcher.slurm import SlurmError, minutes, nodes_of_site, partitions, run_slurm, site_settings
from launcher.snapshot import snapshot_folder
from launcher.tasks import Group, build_groups, build_tasks, nodes_of, nodes_section
from modularforge.config import Config
from modularforge.errors import ConfigError
from modularforge.memory import too_large, trained_stages

NODE_WAIT_SECONDS = 30
NODE_CHECK = (
    "import sys, torch; assert sys.version_info >= (3, 10); "
    "print('python', sys.version.split()[0], 'torch', torch.__version__, 'gpus', torch.cuda.device_count())"
)


def preflight(config: Config, run_id: str) -> list[str]:
    """Check Slurm, storage and a node; returns notes, raises ConfigError with all problems."""
    checks = [_slurm_problems, _storage_problems, _node_problems, _memory_problems]
    notes: list[str] = []
    with ThreadPoolExecutor(len(checks)) as pool:
        found = list(pool.map(lambda check: list(check(config, run_id, notes)), checks))
    problems = [line for lines in found for line in lines]
    if problems:
        listed = "\n".join(f"  {line}" for line in problems)
        raise ConfigError(f"nothing was submitted, because the preflight found {len(problems)} problem(s):\n{listed}")
    return notes


def fingerprint_of(config: Config) -> str:
    """What the checks depend on: with the same, they need not be repeated."""
    values: list[object] = [config.cluster.model_dump(mode="json"), config.output_dir, config.experts.count]
    values += _memory_problems(config, "", [])  # a model that has grown is looked at again
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _slurm_problems(config: Config, run_id: str, _notes: list[str]) -> Iterator[str]:
    """What the site's limits and `sbatch --test-only` say about each stage."""
    try:
        site, queues = site_settings(), partitions()
    except SlurmError as error:
        yield str(error)
        return
    groups = build_groups(build_tasks(config))
    jobs = sum(len(group.tasks) for group in groups)
    if jobs > int(site.get("MaxJobCount", jobs)):
        yield f"experts.count must fit into the site's MaxJobCount ({site['MaxJobCount']}), but there are {jobs} jobs"
    unknown = [name for name in _queue_names(config) if name not in queues]
    if unknown:
        yield f"cluster.queue must be one of {', '.join(queues)}, but is {', '.join(unknown)}; choose one of these"
        return
    yield from dict.fromkeys(found for group in groups for found in _time_problems(config, group, queues))
    max_array = int(site.get("MaxArraySize", 1001))
    refused: dict[str, list[str]] = {}  # groups of jobs by what is said of them, since many share their wishes
    with ThreadPoolExecutor(len(groups)) as pool:
        found = pool.map(lambda group: _refusal(config, run_id, group, queues, max_array), groups)
        for group, refusal in zip(groups, found, strict=True):
            if refusal:
                refused.setdefault(refusal, []).append(group.name)
    for refusal, names in refused.items():
        yield f"{', '.join(names)} must be accepted by sbatch, but: {refusal}"


def _time_problems(config: Config, group: Group, queues: dict[str, dict[str, str]]) -> Iterator[str]:
    limit, wanted = _queue_limit(config, queues), nodes_of(config, group.name).time_minutes
    if wanted > limit:
        section = nodes_section(group.name)
        yield f"cluster.{section}.time_minutes must be at most the queue's {limit:.0f}, but is {wanted}; lower it"


def _refusal(
    config: Config, run_id: str, group: Group, queues: dict[str, dict[str, str]], max_array: int
) -> str | None:
    """What sbatch has against the script of a group, and which wishes are too big; None where it takes it."""
    indices = [task.index for task in group.tasks if task.index is not None]
    part = next(iter(cut(indices, max_array, config.cluster.array_throttle)), None)
    script = script_of(config, Request(group.name, "test", run_id, snapshot_folder(config), part))
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        try:
            run_slurm("sbatch", "--test-only", file.name, env=job_environment(config.cluster.pass_environment))
        except SlurmError as error:
            too_big = "".join(f"; {wish}" for wish in _wishes_too_big(config, group, queues))
            return " ".join(str(error).split()) + too_big
    return None


def _wishes_too_big(config: Config, group: Group, queues: dict[str, dict[str, str]]) -> Iterator[str]:
    """Which wish of a group no node of its queue fulfils, with the most that there is."""
    names = _queue_names(config) or [name for name, values in queues.items() if values.get("Default") == "YES"]
    try:
        nodes = [node for node in nodes_of_site() if {*node.get("Partitions", "").split(",")} & {*names}]
    except SlurmError:
        return
    wanted, section = nodes_of(config, group.name), nodes_section(group.name)
    wishes = (
        ("nodes", wanted.nodes, len(nodes), "in the queue"),
        ("cpus", wanted.cpus, max((_number(node.get("CPUTot")) for node in nodes), default=0), "on one node"),
        ("gpus", wanted.gpus, max(map(_gpus_of, nodes), default=0), "on one node"),
        (
            "memory_gb",
            wanted.memory_gb or 0,
            max((_memory_gb(node) for node in nodes), default=0),
            "on one node",
        ),
    )
    for name, wish, most, where in wishes:
        if wish > most:
            yield f"cluster.{section}.{name} is {wish:g}, but there are {most:g} {where} ({', '.join(names)}): lower it"


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def _memory_gb(node: dict[str, str]) -> float:
    return _number(node.get("RealMemory")) / 1024


def _gpus_of(node: dict[str, str]) -> int:
    """`gpu:4`, `gpu:a100:4(S:0-1)`, several of them with commas."""
    return sum(int(found) for found in re.findall(r"gpu(?::[^,:()]+)?:(\d+)", node.get("Gres", "")))


def _queue_limit(config: Config, queues: dict[str, dict[str, str]]) -> float:
    """The longest time, in minutes, that the queue allows; of several the most generous."""
    chosen = [queues[name] for name in _queue_names(config)]
    default = [values for values in queues.values() if values.get("Default") == "YES"]
    limits = [minutes(values.get("MaxTime", "UNLIMITED")) for values in chosen or default]
    return max(limits, default=minutes("UNLIMITED"))


def _queue_names(config: Config) -> list[str]:
    """Slurm takes several partitions, with commas between them, and starts the job in the first that can."""
    return [name.strip() for name in (config.cluster.queue or "").split(",") if name.strip()]


def _memory_problems(config: Config, _run_id: str, _notes: list[str]) -> Iterator[str]:
    """Jobs whose GPUs are too small, where `cluster.gpu_memory_gb` says how large they are."""
    for stage in trained_stages(config):
        if why := too_large(config, stage):
            yield why


def _storage_problems(config: Config, _run_id: str, _notes: list[str]) -> Iterator[str]:
    """Write, conditional write and delete in the run's store; write in the work folder."""
    url = paths.join(config.output_dir, FOLDER, f"probe-{os.urandom(4).hex()}")
    try:
        paths.create_bytes(url, b"first")
        try:
            paths.create_bytes(url, b"second")
            yield f"{config.output_dir} must refuse to create a file twice, but does not; use another store"
        except FileExistsError:
            pass
        paths.remove(url)
        if paths.exists(url):
            yield f"{config.output_dir} must let files be deleted, but {url} is still there; fix the rights"
    except (StoreError, OSError) as error:
        yield f"output_dir must be writable: {error}"
    try:
        work_folder(config).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        yield f"cluster.work_dir must be writable, but: {error}; name a folder that all nodes see"


def _node_problems(config: Config, _run_id: str, notes: list[str]) -> Iterator[str]:
    """Python and torch on a node, with the environment that jobs get; a busy cluster is a note, not a problem."""
    if not shutil.which("srun"):
        return
    cluster, folder = config.cluster, work_folder(config)
    check = f"test -d {shlex.quote(str(_existing(folder)))} && {_python(config)} -c {shlex.quote(NODE_CHECK)}"
    options = {
        "partition": cluster.queue,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
    }
    command = [
        "srun", f"--immediate={NODE_WAIT_SECONDS}", "--nodes=1", "--ntasks=1", "--time=5", "--job-name=preflight",
        *(f"--{name}={value}" for name, value in options.items() if value),
        "bash", "-c", "\n".join([*cluster.setup, check]),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=300,
            env=job_environment(cluster.pass_environment),
        )
    except subprocess.TimeoutExpired:
        yield "python on a node must start within 5 minutes, but did not; try it with srun"
        return
    if done.returncode == 0:
        notes.append(f"on a node: {done.stdout.strip().splitlines()[-1]}")
        return
    last = (done.stderr.strip() or done.stdout.strip() or "it ended without a word").splitlines()[-1]
    if "Unable to allocate" in done.stderr or "Immediate" in done.stderr:
        notes.append(f"python and torch on a node were not tried within {NODE_WAIT_SECONDS} s, because: {last}")
    else:
        yield f"cluster.python ({_python(config)}) must run torch on a node that sees {folder}, but: {last}"


def _python(config: Config) -> str:
    if config.cluster.container:
        return shlex.join([*shlex.split(config.cluster.container), "python3"])
    return shlex.quote(config.cluster.python or sys.executable)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there already."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())
