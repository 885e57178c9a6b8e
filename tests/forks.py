"""Commands of ours in processes that are forked from one which has imported what they import, and that takes a second.

They are processes like others: with arguments, environment, folder and streams of their own, and an end of their own.
What Python and libraries read from the environment when they are loaded is that of the process they are forked from.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from checkpoints import garbage

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = (  # not the programs themselves, of which runpy would warn
    "modularforge.cli", "launcher.runs", "launcher.status", "modularforge.stages.backbone",
    "modularforge.stages.expert", "modularforge.stages.assemble", "modularforge.stages.evaluate",
    "modularforge.evaluation.conversation", "sklearn.decomposition",
)  # fmt: skip


def run_forked(
    words: Sequence[str], folder: Path, environment: Mapping[str, str], said: str
) -> subprocess.CompletedProcess[str]:
    """`python -m WORDS` in a folder, with `said` on its standard input, to its end."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        given.write(said.encode())
        given.seek(0)
        asked = json.dumps([list(words), str(folder), dict(environment)]).encode()
        code = _server().run(asked, [file.fileno() for file in (given, output, errors)])
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(list(words), code, *texts)


class Server:
    """The process that forks, which ends with this one, and the connection to it."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tests.forks", str(theirs.fileno())]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        theirs.close()
        atexit.register(self._close)

    def run(self, asked: bytes, files: list[int]) -> int:
        """The exit code of a command; negative where a signal ended it."""
        socket.send_fds(self._connection, [len(asked).to_bytes(8, "little")], files)
        self._connection.sendall(asked)
        answer = self._connection.recv(64)
        assert answer, "the process that forks has ended"
        return int(answer)

    def _close(self) -> None:
        self._connection.close()
        self._process.wait()


@cache
def _server() -> Server:
    return Server()


def serve(connection: socket.socket) -> None:
    """Fork for each command and wait for its end, until the other side is gone."""
    while True:
        length, files, _, _ = socket.recv_fds(connection, 8, 3)
        if not length:
            return
        asked = b""
        while len(asked) < int.from_bytes(length, "little"):
            asked += connection.recv(1 << 16)
        child = os.fork()
        if not child:
            connection.close()
            _become(files, *json.loads(asked))
        for file in files:
            os.close(file)
        _, status = os.waitpid(child, 0)
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def _become(files: list[int], words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Be the process of a command; does not return."""
    code = 1
    try:
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.path[0], sys.argv = folder, list(words)
        garbage.STARTED = time.time()  # what is younger may be its own
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        # As Python ends, but for taking all modules apart, which would copy the memory of the other process.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if not stream.closed:  # absl closes standard error at the end
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))
