"""What the system refuses is one sentence and exit code 2, whichever library passes it on; bugs show a traceback."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from modularforge.exits import run_app


def end_of(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and what is said when a command raises this."""

    def failing() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        run_app(failing)
    return int(str(end.value.code)), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk or the quota is full; free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a/b"), "a/b cannot be used, because the disk or the quota"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be used: Read-only file system; check the path"),
        (RuntimeError("Error while serializing: I/O error: (os error 28)"), "the disk or the quota is full"),
        (ValueError("IOError: [Errno 30] Read-only file system"), "cannot be used: Read-only file system"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = end_of(error, capsys)
    assert code == 2
    assert said in text
    assert len(text.splitlines()) == 1


def test_an_error_of_a_library_in_another_language_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="os error") as caught:
        save_file({"x": np.zeros(2)}, tmp_path / "missing" / "x.safetensors")
    code, text = end_of(caught.value, capsys)
    assert (code, len(text.splitlines())) == (2, 1)


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = end_of(ValueError("7 is not 8"), capsys)
    assert code == 1
    assert "Traceback" in text
    assert "7 is not 8" in text
