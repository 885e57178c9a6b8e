"""Environments beside the one of the tests, for packages that it must not have or has in other versions."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment_python(name: str, stamp: str, *wanted: str) -> Path:
    """The python of `.venv-NAME`, which is made when it is not there whole, with these packages (pip's words).

    All else is taken from the environment that runs this, so that torch is not installed twice. A new `stamp` makes it
    anew.
    """
    environment = ROOT / f".venv-{name}"
    python, whole = environment / "bin" / "python", environment / f"installed-{stamp}"
    if not whole.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted], check=True
        )
        (own,) = environment.glob("lib/python*/site-packages")
        # Through site, so that packages which that environment borrows in turn are found as well.
        shared = sysconfig.get_paths()["purelib"]
        (own / "torch_from_the_tests.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
        whole.touch()
    return python
