"""Where the processes of a multi-node job meet: an address that all nodes reach and a port nobody else uses.

Node names need not resolve in jobs, so the address is the one by which Slurm itself reaches the first node; the port
follows from the job id and the restart count, because a fixed one collides with other jobs and with one's own past.
"""

from __future__ import annotations

import os
import socket

from launcher.slurm import fields, run_slurm

FIRST_PORT, PORTS = 20_000, 12_000


def meeting_point(nodes: int, job: int, restarts: int) -> tuple[str, int]:
    """Address and free port for rank 0; call it on the first node of the job."""
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
