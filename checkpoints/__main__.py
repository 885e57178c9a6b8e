"""The command line of the store: list, verify, copy and clean up, on folders and object stores alike."""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer
from rich.filesize import decimal

from checkpoints import paths
from checkpoints.artifact import Artifact, examine, find_artifacts
from checkpoints.commands import HELP_NAMES, Commands, version_option
from checkpoints.errors import StoreError, UserError
from checkpoints.garbage import delete_garbage, find_garbage
from checkpoints.parallel import in_order
from checkpoints.screen import bug, log_to_screen, logger, progress, safe_streams, say, show, table
from checkpoints.transfer import Outcome, Selection, select, transfer

app = typer.Typer(
    cls=Commands, help=__doc__, context_settings=HELP_NAMES, no_args_is_help=True, pretty_exceptions_enable=False
)
app.callback()(version_option)
FILES_AT_ONCE = 4

Url = Annotated[str, typer.Argument(help="A folder, or a URL such as s3://bucket/run.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for scripts.")]
Newest = Annotated[bool, typer.Option("--newest", help="Only the newest training checkpoint of every job.")]


def main() -> None:
    """Run the command; an error that a user can repair is one message and exit code 2."""
    with safe_streams():
        log_to_screen(logger)
        try:
            app()
        except UserError as error:
            _complain(str(error))
        except OSError as error:  # of a path that is no folder, say
            if error.filename is None:
                bug()
            _complain(f"{error.filename!s:.300} cannot be used: {error.strerror}; check the path and its rights")
        except Exception:
            bug()


@app.command("ls")
def list_command(url: Url, as_json: Json = False) -> None:
    """List artifacts and training checkpoints with step, age and size."""
    rows = [_row(artifact, url) for artifact in find_artifacts(url)]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    cells = [
        [
            row["name"], row["kind"], "" if row["step"] is None else str(row["step"]), decimal(row["size"]),
            _age(row["age_seconds"]), str(row["files"]),
        ]
        for row in rows
    ]  # fmt: skip
    show(table(["artifact", "kind", "step", "size", "age", "files"], cells))


@app.command()
def verify(url: Url, as_json: Json = False) -> None:
    """Read every byte of every artifact and compare it with the manifests; exit code 1 when something is wrong."""
    artifacts, damaged = examine(url)
    problems: dict[str, list[str]] = {artifact.url: artifact.extra_files() for artifact in artifacts}
    files = [(artifact, name) for artifact in artifacts for name in artifact.manifest.files]
    with progress("verify", _size(artifacts), "bytes") as bar:
        for (artifact, name), text in zip(files, in_order(_check, files, FILES_AT_ONCE), strict=True):
            problems[artifact.url] += [text] if text else []
            bar.advance(artifact.manifest.files[name].size)
    found = [*damaged.values(), *(text for texts in problems.values() for text in texts)]
    if as_json:
        print(json.dumps({"artifacts": len(artifacts), "files": len(files), "problems": found}, indent=1))
    else:
        say("\n".join([*found, f"{len(artifacts)} artifacts, {len(files)} files, {len(found)} problems"]))
    raise typer.Exit(1 if found else 0)


@app.command()
def pull(url: Url, target: Annotated[str, typer.Argument(help="Folder to copy to.")], newest: Newest = False,
         as_json: Json = False) -> None:  # fmt: skip
    """Copy a run, one artifact, or only the newest checkpoints to a folder; run it again to go on after a stop.

    What is damaged is passed over and listed at the end, with exit code 1.
    """
    _copy("pull", url, target, newest, as_json)


@app.command()
def push(folder: Annotated[str, typer.Argument(help="A run or an artifact in a folder.")], target: Url,
         newest: Newest = False, as_json: Json = False) -> None:  # fmt: skip
    """Copy a run, one artifact, or only the newest checkpoints to an object store; run it again to go on.

    What is damaged is passed over and listed at the end, with exit code 1.
    """
    _copy("push", folder, target, newest, as_json)


@app.command()
def gc(
    url: Url,
    grace_hours: Annotated[float, typer.Option(help="Leave what was written to in these last hours.")] = 24.0,
    delete: Annotated[bool, typer.Option("--delete", help="Delete; otherwise only list.")] = False,
    as_json: Json = False,
) -> None:
    """List, or with --delete remove, what unfinished writes left behind and no manifest names."""
    garbage = find_garbage(url, grace_hours * 3600)
    if delete:
        delete_garbage(garbage)
    if as_json:
        rows = [{"url": item.url, "reason": item.reason, "size": item.size} for item in garbage]
        print(json.dumps({"deleted": delete, "garbage": rows}, indent=1))
        return
    for item in garbage:
        say(f"{item.url}  {item.reason}  {decimal(item.size)}  {_age(time.time() - item.modified)}")
    say(f"{len(garbage)} {'deleted' if delete else 'found; delete with --delete'}")


def _complain(text: str) -> NoReturn:
    say(f"error: {text}", error=True)
    sys.exit(2)


def _copy(verb: str, source: str, target: str, newest: bool, as_json: bool) -> None:
    chosen = select(source, newest)
    with progress(verb, chosen.size, "bytes") as bar:
        done = transfer(chosen, target, bar.advance)
    if done.deleted and newest:
        raise StoreError(f"{', '.join(done.deleted)} must stay to be copied, but newer ones took its place; try again")
    if as_json:
        counts = {"artifacts": len(chosen.artifacts), "files": len(chosen.loose)}
        print(json.dumps({**counts, **dataclasses.asdict(done)}, indent=1))
    else:
        say("\n".join(_told(chosen, done)))
    if done.problems:
        raise typer.Exit(1)


def _told(chosen: Selection, done: Outcome) -> Iterator[str]:
    there = len(chosen.artifacts) + len(chosen.problems) - len(done.copied) - len(done.deleted) - len(done.problems)
    yield f"{len(done.copied)} copied, {there} were there already"
    if done.deleted:
        yield f"{len(done.deleted)} passed over, because their run deleted them meanwhile"
    if chosen.loose:
        yield f"{len(done.copied_files)} of {len(chosen.loose)} settings, metrics and logs copied"
    yield from (f"passed over: {text}" for text in done.passed_over)
    if done.problems:
        yield from ("", *done.problems, f"{len(done.problems)} not copied, all others are; fix them and run it again")


def _check(file: tuple[Artifact, str]) -> str:
    artifact, name = file
    text = artifact.problem_of(name)
    return "" if text and artifact.is_deleted() else text


def _row(artifact: Artifact, root: str) -> dict[str, Any]:
    manifest = artifact.manifest
    created = datetime.datetime.fromisoformat(manifest.created).timestamp()
    return {
        "name": paths.relative(artifact.url, root) or artifact.url.rstrip("/").rsplit("/", 1)[-1],
        "url": artifact.url,
        "kind": manifest.kind,
        "step": manifest.step,
        "size": manifest.size,
        "age_seconds": max(0, round(time.time() - created)),  # clocks differ
        "created": manifest.created,
        "files": len(manifest.files),
        "fingerprint": manifest.fingerprint,
    }


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _size(artifacts: list[Artifact]) -> int:
    return sum(artifact.manifest.size for artifact in artifacts)


if __name__ == "__main__":
    main()
