"""Slurm's programs for the tests: `python -m tests.cluster.packages` installs them where they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def missing_programs() -> list[str]:
    """Programs that the cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if not shutil.which(name, path=SEARCHED)]


def install() -> None:
    """Install from Debian's or Ubuntu's packages, without starting their services."""
    if not missing_programs():
        return
    if not shutil.which("apt-get") or os.getuid():
        sys.exit(f"install Slurm and munge yourself ({', '.join(missing_programs())}), or run this as root on Debian")
    policy = Path("/usr/sbin/policy-rc.d")  # asked by packages whether they may start their services
    is_ours = not policy.exists()
    if is_ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            subprocess.run(["apt-get", "-q", *command], check=True, env=environment)
    finally:
        if is_ours:
            policy.unlink()


if __name__ == "__main__":
    install()
