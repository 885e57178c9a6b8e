"""A real S3 server over a real connection: ministack on a free port of the loopback interface.

The versions of ministack that can be installed beside aiobotocore accept every signature; where wrong credentials are
the point, the proxy checks signatures (see signatures.py).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

REGION = "us-east-1"
KEY, SECRET = "key-of-the-tests", "secret-of-the-tests"
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass
class Server:
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, port: int = 0) -> dict[str, str]:
        """The AWS variables of a client, optionally through a proxy at another port."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


def start_server(folder: Path, port: int = 0) -> Server:
    """Start ministack and wait until it answers."""
    port = port or free_port()
    settings = {
        "BIND_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "SERVICES": "s3",
        "MINISTACK_REGION": REGION,
        "LOG_LEVEL": "WARNING",
        "S3_PERSIST": "1",
        "S3_DATA_DIR": str(folder / "s3"),
        "IOT_MTLS_PORT": "0",
        "USE_SSL": "0",
    }
    command = [sys.executable, "-c", "from ministack.app import main; main()"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env={**os.environ, **settings})
    server = Server(port, process)
    _wait_until_it_answers(server, folder / "log")
    return server


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_until_it_answers(server: Server, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            OPENER.open(server.url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.02)
    raise RuntimeError(f"the S3 server did not start: {log.read_text()[-2000:]}")
