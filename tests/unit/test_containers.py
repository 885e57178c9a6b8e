"""The Dockerfile and the Apptainer definition install what pyproject.toml says, from files that are there, alike.

Neither program runs where tests run. The slow test builds an image by the Dockerfile's own lines in a root of its own
(an overlay, which is gone afterwards), and runs the quickstart's smoke test there as the image's user.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from launcher import command
from tests.conftest import ROOT, tiny_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BASE = "python:3.11-slim"
EXTRAS = re.compile(r"\$EXTRAS|\{\{ EXTRAS \}\}")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of the Dockerfile's lines."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    lines = [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, rest in lines]


def of(wanted: str) -> list[str]:
    return [rest for word, rest in instructions() if word == wanted]


def sections() -> dict[str, list[str]]:
    """Lines of the definition by section; its head is ''."""
    found: dict[str, list[str]] = {"": []}
    for line in (ROOT / "modularforge.def").read_text().splitlines():
        if line.startswith("%"):
            found[line[1:]] = []
        elif line.strip() and not line.startswith("#"):
            found[[*found][-1]].append(line.strip())
    return found


def copies() -> list[str]:
    """Files and folders that the Dockerfile copies, all below one folder and by their own names."""
    found = []
    for words in (shlex.split(rest) for rest in of("COPY")):
        folder = words[-1] if words[-1].endswith("/") else words[-1].removesuffix(words[0])
        assert folder == "/opt/modularforge/"
        found += words[:-1]
    return found


def commands(lines: list[str]) -> list[str]:
    return [EXTRAS.sub("EXTRAS", line) for line in lines]


def test_both_are_made_from_the_same_base_and_lines() -> None:
    head = sections()[""]
    assert (of("FROM"), head) == ([BASE], ["Bootstrap: docker", f"From: {BASE}"])
    assert of("ARG") == sections()["arguments"]
    assert [f"export {line}" for line in of("ENV")] == sections()["environment"]
    assert [line.split() for line in sections()["files"]] == [[name, "/opt/modularforge/"] for name in copies()]
    assert commands([line for line in of("RUN") if "useradd" not in line]) == commands(sections()["post"])


def test_they_install_the_project_with_its_versions_and_extras_that_it_has() -> None:
    (install,) = [shlex.split(line) for line in of("RUN") if "pip" in line]
    assert install[:4] == ["python3", "-m", "pip", "install"]
    assert install[-3:] == ["--constraint", "/opt/modularforge/constraints.txt", "/opt/modularforge[$EXTRAS]"]
    (extras,) = of("ARG")
    assert {*extras.removeprefix("EXTRAS=").split(",")} <= {*PROJECT["optional-dependencies"]}
    assert {"constraints.txt", "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} <= {*copies()}
    lowest = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    assert tuple(map(int, re.findall(r"\d+", BASE))) >= max(lowest, (3, 11)), "constraints.txt wants 3.11"


def test_what_is_copied_is_there_and_docker_may_see_it_and_nothing_else() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert {*packages, "configs"} <= {*copies()}, "modularforge/configs is a link to it"
    assert [name for name in copies() if not (ROOT / name).exists()] == []
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored == ["*", *sorted(f"!{name}" for name in copies()), "**/__pycache__"]


def test_they_run_our_program_and_not_as_root() -> None:
    assert of("ENTRYPOINT") == ['["modularforge"]']
    assert sections()["runscript"] == ['exec modularforge "$@"']
    assert "modularforge" in PROJECT["scripts"]
    words = [word for word, _ in instructions()]
    (user,) = of("USER")
    assert [line for line in of("RUN") if line.endswith(f" {user}")] == of("RUN")[-1:]
    assert words.index("USER") > max(index for index, word in enumerate(words) if word == "RUN")


def test_a_cluster_trains_with_the_containers_python(tmp_path: Path) -> None:
    (line,) = [line for line in sections()["help"] if "container:" in line]
    example = yaml.safe_load(line.split(": ", 1)[1])["container"]
    assert example in (ROOT / "configs/cluster.yaml").read_text()
    config = tiny_config(tmp_path, cluster={"container": example})
    assert command._python(config) == [*example.split(), "python3", "-u"]


def steps() -> str:
    """A shell script that does in the root what `docker build` would, but for the base image and packages of Debian."""
    lines = ["set -e", "mkdir -p /opt/modularforge"]
    for word, rest in instructions():
        lines += [f"export {shlex.join([rest])}"] if word in ("ARG", "ENV") else []
        lines += [rest] if word == "RUN" and "apt-get" not in rest else []
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_image_is_built_by_its_own_lines_and_runs_the_quickstart(tmp_path: Path) -> None:
    """The base image is this machine with its own python at /usr/local, without packages, and without our folders."""
    overlay = tmp_path / "overlay"
    for name in ("upper", "work", "root"):
        (overlay / name).mkdir(parents=True)
    place = overlay / "upper" / "opt" / "modularforge"
    for name in copies():
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, _parent(place / name))
    home = Path(sys.base_prefix)
    packages = shutil.ignore_patterns("site-packages", "__pycache__", "test")
    for name in ("bin", "lib", "include"):
        shutil.copytree(home / name, overlay / "upper/usr/local" / name, ignore=packages, symlinks=True)
    for name, line in (("passwd", "root:x:0:0::/root:/bin/sh"), ("group", "root:x:0:"), ("shadow", "root:*:::::::")):
        _parent(overlay / "upper/etc" / name).write_text(f"{line}\n")
    script = textwrap.dedent(f"""
        set -e
        mount -t overlay overlay -o lowerdir=/,upperdir={overlay}/upper,workdir={overlay}/work {overlay}/root
        mount --bind /dev {overlay}/root/dev
        mount -t proc proc {overlay}/root/proc
        mount -t tmpfs tmpfs {overlay}/root/tmp
        places=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin
        exec chroot {overlay}/root /usr/bin/env -i PATH=$places HOME=/root sh -c "$1"
    """)
    work, user = of("WORKDIR")[0], of("USER")[0]
    start = " ".join([*yaml.safe_load(of("ENTRYPOINT")[0]), "run-all", "--config", "configs/quickstart.yaml"])
    look = "python3 -c 'import modularforge; print(modularforge.__file__)'"
    run = f"cd {work} && {start} --smoke-test -o run && whoami && {look}"
    base = "ldconfig && python3 -m ensurepip --upgrade >/dev/null"  # its python finds its own library for all users
    built = f"{base}\n{steps()}\nOMP_NUM_THREADS=1 su {user} -c {shlex.quote(run)}"
    if os.getuid() or not shutil.which("unshare") or _cannot_mount(tmp_path):
        pytest.skip("a root of its own needs root and overlays")
    done = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", built], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    *_, who, where = done.stdout.splitlines()
    assert (who, where) == (user, "/usr/local/lib/python3.11/site-packages/modularforge/__init__.py")
    assert (overlay / f"upper/{work}/run/evaluation/results.json").is_file()


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _cannot_mount(folder: Path) -> bool:
    return bool(
        subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode
    )
