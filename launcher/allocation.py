"""What this job was given: by Slurm, from its environment, or by the local launcher; and where its processes meet.

The only file of the launcher that reads SLURM_ variables.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass

from launcher.slurm import fields, run_slurm
from modularforge.errors import ConfigError

# Above the ports that services have by custom and below those that Linux gives to outgoing connections (32768…).
FIRST_PORT, PORTS = 20_000, 12_000
# Job ids of the local launcher begin with it, so that no one takes them for Slurm's.
LOCAL = "local-"


@dataclass(frozen=True)
class Allocation:
    """One job, or one task of an array, as it runs now; `job` is its own id, `name` the one to requeue it by."""

    job: str
    array_job: str
    array_index: int | None
    restarts: int
    nodes: int
    node_list: str
    cpus: int
    gpus: int
    processes: int | None

    @property
    def name(self) -> str:
        """`123`, or `123_4` for a task of an array."""
        return self.job if self.array_index is None else f"{self.array_job}_{self.array_index}"

    @property
    def is_local(self) -> bool:
        """Whether it is a process of the local launcher, without Slurm."""
        return self.job.startswith(LOCAL)

    def as_word(self) -> str:
        """The allocation as one word of a command line, which `from_word` reads."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_word(word: str) -> Allocation:
        """What the local launcher wrote."""
        return Allocation(**json.loads(word))

    @staticmethod
    def of_this_job(processes: int | None) -> Allocation:
        """The allocation this program runs in; raises ConfigError outside of a job."""
        values = os.environ
        if "SLURM_JOB_ID" not in values:
            raise ConfigError(
                "python -m launcher.node must run in a Slurm job, but SLURM_JOB_ID is not set; submit it with sbatch, "
                "or run the stage itself with `python -m modularforge`"
            )
        return Allocation(
            job=str(_number("SLURM_JOB_ID")),
            array_job=values.get("SLURM_ARRAY_JOB_ID", values["SLURM_JOB_ID"]),
            array_index=_number("SLURM_ARRAY_TASK_ID") if "SLURM_ARRAY_TASK_ID" in values else None,
            restarts=_number("SLURM_RESTART_COUNT"),
            nodes=_number("SLURM_JOB_NUM_NODES", default=1),
            node_list=values.get("SLURM_JOB_NODELIST", ""),
            cpus=_number("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", default=1),
            gpus=_number("SLURM_GPUS_ON_NODE"),
            processes=processes,
        )


def meeting_point(nodes: int, job: int, restarts: int) -> tuple[str, int]:
    """Address and free port for rank 0; call it on the first node of the job.

    Node names need not resolve in jobs, so the address is the one by which Slurm itself reaches the first node; the
    port follows from job and restart count, because a fixed one collides with other jobs and with one's own past.
    """
    return (own_address() if nodes > 1 else "127.0.0.1"), free_port(job, restarts)


def own_address() -> str:
    """An address of this node that the other nodes reach."""
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    known = fields(run_slurm("scontrol", "--oneliner", "show", "node", node))
    for name in (known.get("NodeAddr"), known.get("NodeHostName"), node):
        if name and (address := _resolved(name)):
            return address
    return _address_of_default_route()


def free_port(job: int, restarts: int) -> int:
    """The first free port of this machine from one that follows from the job."""
    start = (job * 101 + restarts * 7919) % PORTS
    for step in range(PORTS):
        port = FIRST_PORT + (start + step) % PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def _number(*names: str, default: int = 0) -> int:
    """The first of these variables that is set, as a number."""
    for name in names:
        if text := os.environ.get(name):
            if text.isdecimal():
                return int(text)
            raise ConfigError(f"{name} must be a number from Slurm, but is {text!r:.40}; unset it, or use sbatch")
    return default


def _resolved(name: str) -> str | None:
    """The address of a name; none where a machine resolves its own name to loopback, as Debian does."""
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return None
    return None if address.startswith("127.0.") else address


def _address_of_default_route() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: only chooses the interface
        return str(probe.getsockname()[0])
