"""A real Slurm of several nodes on one machine: munged, slurmctld, and one slurmd per node, all in one folder.

There is no accounting, so `sacct` fails as it does at many sites, and the nodes' names resolve nowhere. CPUs and GPUs
are only counted. A requeued job starts again after about six seconds instead of two minutes.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.packages import SEARCHED

CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={dir}/munged/socket,cred_expire=5
StateSaveLocation={dir}/slurmctld
SlurmctldPidFile={dir}/slurmctld/pid
SlurmctldLogFile={dir}/slurmctld/log
SlurmdSpoolDir={dir}/%n
SlurmdPidFile={dir}/%n/pid
SlurmdLogFile={dir}/%n/log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MaxArraySize={max_array_size}
MaxJobCount={max_job_count}
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=1
Epilog=/bin/true
SlurmdTimeout=6
KillWait=15
ReturnToService=2
MailProg=/bin/true
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{more}
NodeName=node[1-{nodes}] NodeAddr=127.1.0.[1-{nodes}] Port=[{first}-{last}] CPUs={cpus} RealMemory=100000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF MaxTime=1-00:00:00
PartitionName=preemptible Nodes=ALL PriorityTier=1 GraceTime=60
PartitionName=graceless Nodes=ALL PriorityTier=1 GraceTime=0
"""


def wait_for(condition: Callable[[], object], what: str, seconds: float = 180.0) -> None:
    """Look again and again until the condition holds; an AssertionError says what did not happen in time.

    The limit is thrice the grace that a preempted job has: on a full machine a restart has taken more than 60 s.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.05)


class Cluster:
    """Starts and stops the daemons; `crash` ends a node as a power cut does."""

    def __init__(
        self,
        folder: Path,
        nodes: int = 4,
        cpus: int = 2,
        max_array_size: int = 6,
        more: str = "",
        most_jobs: int = 5000,
    ) -> None:
        self.folder, self.nodes, self.conf = folder, nodes, folder / "slurm.conf"
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.environ |= {"SLURM_CONF": str(self.conf), "PATH": SEARCHED}
        port = _free_ports(nodes + 1)
        self.port = port
        folder.mkdir(parents=True)
        for number in range(2):  # Slurm wants a device per GPU; any character device will do
            (folder / f"gpu{number}").symlink_to("/dev/null")
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        self.conf.write_text(
            CONF.format(
                host=socket.gethostname().partition(".")[0], dir=folder, port=port, first=port + 1, last=port + nodes,
                nodes=nodes, cpus=cpus, max_array_size=max_array_size, max_job_count=most_jobs, more=more,
            )
        )  # fmt: skip

    def start(self) -> None:
        """Start all daemons and wait until every node answers."""
        key = self.folder / "munged" / "key"
        key.parent.mkdir()
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        munged = ["munged", "--foreground", "--force", f"--socket={key.parent}/socket", f"--key-file={key}"]
        self._launch("munged", [*munged, f"--pid-file={key.parent}/pid", f"--seed-file={key.parent}/seed"])
        wait_for((key.parent / "socket").exists, "munged")
        self._launch("slurmctld", ["slurmctld", "-D"])
        wait_for(lambda: _is_listening(self.port), "slurmctld")
        for number in range(1, self.nodes + 1):
            self.start_node(f"node{number}")
        wait_for(self._is_ready, f"all nodes are idle (see {self.folder}/node*/log)")

    def start_node(self, name: str) -> None:
        """Start one node's slurmd, for the first time or after a crash."""
        self._launch(name, ["slurmd", "-D", "-N", name])

    def crash(self, name: str) -> None:
        """End a node's slurmd and all its job processes at once."""
        self._kill(lambda: {pid for pid, owner in self.processes().items() if owner == name})

    def stop(self) -> None:
        """End every daemon and every job."""
        self._kill(lambda: set(self.processes()))

    def run(self, *command: str) -> str:
        """The output of a Slurm command."""
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def states(self, job: str) -> list[str]:
        """States of a job or of all tasks of an array."""
        return self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T").split()

    def warn(self, job: str) -> None:
        """Send the warning signal to a running job or array task `123_4`, as Slurm does near the time limit.

        A task goes by that name: the id of an array's last task is that of the whole array.
        """
        # It is not waited for: while the job goes back to the queue, scancel tries for a minute and a half.
        subprocess.Popen(["scancel", "--signal=USR2", job], env=self.environ, stderr=subprocess.DEVNULL)

    def preempt(self) -> None:
        """Take all nodes for a moment with a job of a higher partition."""
        options = ("--partition=main", "--exclusive", f"--nodes={self.nodes}", "--output=/dev/null")
        self.run("sbatch", "--wait", *options, "--wrap=true")

    def state_of(self, node: str) -> str:
        """State of a node, such as `idle`."""
        return self.run("sinfo", "-h", "-n", node, "-p", "main", "-o", "%T").strip()

    def jobs(self) -> list[str]:
        """Ids of jobs that have not ended."""
        return self.run("squeue", "-h", "-r", "-o", "%i").split()

    def job_processes(self) -> dict[int, str]:
        """Command lines of the processes of jobs, by pid; daemons are left out."""
        found = {pid: _command(pid) for pid in self.processes()}
        return {
            pid: line for pid, line in found.items() if line and not line.lstrip(": ").startswith(("slurm", "munged"))
        }

    def processes(self) -> dict[int, str]:
        """The node or daemon of every process of this cluster: by environment, folder, or parent."""
        found: dict[int, str] = {}
        parents: dict[int, int] = {}
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            try:
                parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                lines = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                folder = Path(os.readlink(f"/proc/{pid}/cwd"))
            except OSError:  # it has ended meanwhile
                continue
            values = dict(line.partition("=")[::2] for line in lines)
            if values.get("SLURM_CONF") == str(self.conf) and "SLURMD_NODENAME" in values:
                found[pid] = values["SLURMD_NODENAME"]
            elif folder.parent == self.folder and _command(pid).startswith("slurmstepd"):
                found[pid] = folder.name
        for pid in parents:
            ancestor = pid
            while ancestor in parents and ancestor not in found:
                ancestor = parents[ancestor]
            if ancestor in found:
                found[pid] = found[ancestor]
        return found

    def pids_of(self, daemon: str) -> list[int]:
        """Processes of one of the daemons, such as `slurmctld`."""
        return [pid for pid in self.processes() if _command(pid).split(" ")[0].rpartition("/")[2] == daemon]

    def _launch(self, name: str, command: list[str]) -> None:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        with open(folder / "stderr", "ab") as output:
            subprocess.Popen(
                command, cwd=folder, env={**self.environ, "SLURMD_NODENAME": name}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def _is_ready(self) -> bool:
        return self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() == ["idle"] * self.nodes

    @staticmethod
    def _kill(victims: Callable[[], set[int]]) -> None:
        def cut() -> bool:
            pids = victims() - {os.getpid()}
            for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: none may report another's end
                for pid in pids:
                    try:
                        os.kill(pid, number)
                    except ProcessLookupError:
                        continue
            return not pids

        wait_for(cut, "processes end")


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> int:
    """The first of `count` free ports in a row, above those of jobs' rendezvous."""
    while True:
        first = random.randrange(10_000, 19_000)
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, item in enumerate(sockets):
                item.bind(("", first + number))
            return first
        except OSError:
            continue
        finally:
            for item in sockets:
                item.close()


def remove(folder: Path) -> None:
    """Delete a stopped cluster's files."""
    shutil.rmtree(folder, ignore_errors=True)
