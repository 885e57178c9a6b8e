"""Stands in for the training in tests about Slurm: the same interface, seconds cheaper; as `cluster.container`.

`stub.py MODE FOLDER python3 -u …/run.py modularforge train --only expert --index K --config C` does for expert K what
FOLDER/K holds, or else MODE: `finish` commits an expert, `crash` fails, `hold` waits for a stop signal and leaves a
checkpoint, `kill` ends without a word. Anything but an expert is run as it is.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def main() -> None:
    """Do as the arguments say."""
    mode, folder, command = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    if "expert" not in command:
        os.execvp(sys.executable, [sys.executable, *command[1:]])
    index, config_file = int(command[command.index("--index") + 1]), command[command.index("--config") + 1]
    own = folder / str(index)
    mode = own.read_text() if own.is_file() else mode
    print(f"the stand-in of expert {index} starts", flush=True)
    (folder / f"started-{index}-{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', 0)}").touch()
    if mode == "crash":
        sys.exit(1)
    if mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGTERM])
    sys.path.insert(0, str(Path(command[2]).parent))
    if mode == "hold":
        signal.sigwait([signal.SIGUSR2, signal.SIGTERM])
        sys.exit(130)
    finish(config_file, index)


def finish(config_file: str, index: int) -> None:
    """Commit an expert without weights."""
    from modularforge.config_files import load_config
    from modularforge.provenance import commit, making
    from modularforge.run import Run

    config = load_config(config_file)
    plan = Run(config).plan("expert", index)
    with making(plan) as writer:
        writer.write_json("expert.json", {"index": index})
        commit(writer, plan, Run(config), {})


if __name__ == "__main__":
    main()
