"""An environment with transformers 4.57.6 beside the one of the tests: `python -m tests.pretrained.transformers4`.

It has its own transformers, tokenizers and huggingface_hub, and takes torch from the environment that runs this, so
that torch is not installed twice.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-transformers4"
VERSION = "4.57.6"


def environment_python() -> Path:
    """The python of the environment, which is made when it is not there whole."""
    python, stamp = ENVIRONMENT / "bin" / "python", ENVIRONMENT / f"installed-{VERSION}"
    if not stamp.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, f"transformers=={VERSION}"], check=True)
        (own,) = ENVIRONMENT.glob("lib/python*/site-packages")
        (own / "torch_from_the_tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        stamp.touch()
    return python


if __name__ == "__main__":
    print(environment_python())
