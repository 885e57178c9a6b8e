"""An environment with transformers 4.57.6 beside the one of the tests: `python -m tests.pretrained.transformers4`.

It has its own transformers, tokenizers and huggingface_hub, and takes torch from the environment that runs this, so
that torch is not installed twice.
"""

from __future__ import annotations

from pathlib import Path

from tests import environments

ROOT = environments.ROOT
VERSION = "4.57.6"


def environment_python() -> Path:
    """The python of the environment, which is made when it is not there whole."""
    return environments.environment_python("transformers4", VERSION, f"transformers=={VERSION}")


if __name__ == "__main__":
    print(environment_python())
