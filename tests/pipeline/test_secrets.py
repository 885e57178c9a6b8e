"""Secrets are planted everywhere, and every byte that a run leaves or prints is searched for them."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml

from checkpoints import open_artifact
from modularforge.config_files import load_config, make_config, to_yaml
from modularforge.data.files import find_files, real_location
from modularforge.errors import ConfigError, DataError
from modularforge.run import Run
from tests.conftest import run_command, tiny_config, tiny_values

MARK = "Planted"
USER, PASSWORD = "user", f"{MARK}-1-password"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}-2-secret/key+",
    "AWS_SESSION_TOKEN": f"{MARK}-3\nsession-{MARK}-4",
    "HF_TOKEN": f"hf_{MARK}5",
    "MY_PASSWORD": f"{MARK}-6",
    "FSSPEC_GS_TOKEN": f"{MARK}-7-fsspec",
    "AWS_ENDPOINT_URL": f"http://user:{MARK}-8-endpoint@127.0.0.1:9",
    "AWS_MAX_ATTEMPTS": "2",
    "AWS_EC2_METADATA_DISABLED": "true",
}
DOCUMENTS = [f"Cat {n} sat on mat {n * n}, and all {n + 7} of them saw it. " * 4 for n in range(200)]


class Handler(BaseHTTPRequestHandler):
    """A corpus behind a password; anything but that file is missing."""

    def do_GET(self) -> None:
        allowed = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        is_known = self.path.startswith("/corpus.jsonl") and self.headers.get("Authorization") == allowed
        body = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode() if is_known else b""
        self.send_response(200 if is_known else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def settings_file(folder: Path, location: str, **changes: object) -> str:
    """Settings whose only source lies at a URL, written where no run lies."""
    source = {"name": "web", "format": "jsonl", **dict.fromkeys(("train", "validation", "test"), location)}
    values = tiny_values(
        folder / "run", data={"sources": [source], "max_documents_per_source": 400}, experts={"count": 2}, **changes
    )
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def planted(folder: Path, *outputs: str) -> list[str]:
    """Where a planted secret is found: files below a folder, and what was printed."""
    contents = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    contents |= {f"output {place}": text.encode() for place, text in enumerate(outputs)}
    return [f"{name}: {line!r}" for name, content in contents.items() for line in content.splitlines()
            if MARK.encode() in line]  # fmt: skip


def test_a_run_leaves_and_prints_no_secret_and_goes_on_from_its_saved_settings(tmp_path: Path, port: int) -> None:
    url = f"http://{USER}:{PASSWORD}@127.0.0.1:{port}/corpus.jsonl"
    settings, run = settings_file(tmp_path, url, name="sweep [/final] :smile:"), tmp_path / "run"
    done = run_command("modularforge", "run-all", "--config", settings, env=SECRETS)
    again = run_command("modularforge", "report", str(run), env=SECRETS)
    assert planted(run, done.stdout, done.stderr, again.stdout, again.stderr) == []
    assert len(list(run.rglob("*.safetensors"))) > 5
    assert "sweep [/final] :smile:: test perplexity" in done.stdout, "and its name is no markup"
    assert "backbone done: 20 steps, loss " in done.stderr

    saved = str(run / "config.yaml")
    assert yaml.safe_load(Path(saved).read_text())["data"]["sources"][0]["train"].startswith("http://***@127.0.0.1")
    assert "finished" in run_command("modularforge", "run-all", "--config", saved).stderr
    refused = run_command("modularforge", "prepare-data", "--config", saved, "--data-dir", str(run / "x"), check=False)
    assert refused.returncode == 2
    assert "data.sources must say how to open http://***@" in refused.stderr
    assert "--set" in refused.stderr


def test_what_fails_prints_no_secret(tmp_path: Path, port: int) -> None:
    signed = f"http://127.0.0.1:{port}/absent.jsonl?X-Amz-Credential={MARK}9&X-Amz-Signature={MARK}10"
    other = f"http://{USER}:{MARK}-11@127.0.0.1:{port}/corpus.jsonl"
    commands = [
        ("modularforge", "prepare-data", "--config", settings_file(tmp_path, signed)),
        ("modularforge", "prepare-data", "--config", settings_file(tmp_path, signed), "--debug"),
        ("modularforge", "sanity", "--test", "m1", "--config", settings_file(tmp_path, other)),
        ("modularforge", "train", "--config", settings_file(tmp_path, other), "-o", "s3://bucket/run"),
        ("modularforge", "prepare-data", "--config", settings_file(tmp_path, other), "--set", f"data.soorces={other}"),
        ("modularforge", "report", f"http://{USER}:{PASSWORD}@127.0.0.1:{port}/run"),
        ("checkpoints", "ls", "s3://bucket/run"),
        ("checkpoints", "pull", f"http://{USER}:{PASSWORD}@127.0.0.1:{port}/run", str(tmp_path / "pulled")),
        ("launcher", "--config", settings_file(tmp_path, other)),
    ]
    for command in commands:
        done = run_command(*command, check=False, env=SECRETS)
        assert done.returncode in (1, 2), command
        assert planted(tmp_path / "run", done.stdout, done.stderr) == [], command
    assert "launcher" in commands[-1]
    assert "data.sources must name secrets as environment variables for jobs" in done.stderr


def test_an_endpoints_password_and_a_token_in_two_lines_are_told_at_once_and_without_them() -> None:
    for changes in ({}, {"AWS_SESSION_TOKEN": ""}):
        done = run_command("checkpoints", "ls", "s3://bucket/run", check=False, env={**SECRETS, **changes})
        assert done.returncode == 2
        assert MARK not in done.stderr
        assert done.stderr.count("attempt") == (1 if changes else 0), "a request that cannot be made is not tried again"


@pytest.mark.slow
def test_jobs_of_the_launcher_get_a_password_by_name(tmp_path: Path, port: int) -> None:
    settings = settings_file(tmp_path, f"http://{USER}:${{MY_PASSWORD}}@127.0.0.1:{port}/corpus.jsonl")
    done = run_command("launcher", "--config", settings, env={**SECRETS, "MY_PASSWORD": PASSWORD})
    assert planted(tmp_path / "run", done.stdout, done.stderr) == []
    assert (tmp_path / "run" / "evaluation" / "manifest.json").is_file()


def test_variables_in_locations_are_read_when_a_file_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORPUS_PASSWORD", "pw")
    assert find_files("http://user:${CORPUS_PASSWORD}@host/a.jsonl") == ["http://user:pw@host/a.jsonl"]
    assert real_location("plain/$HOME/{x}.jsonl") == "plain/$HOME/{x}.jsonl"
    with pytest.raises(DataError, match=r"data.sources must name .* set, but \$\{NOT_THERE\} is not; set it"):
        find_files("${NOT_THERE}/a.jsonl")


def test_a_url_that_is_signed_anew_is_the_same_data_and_an_ordinary_one_keeps_its_fingerprint(tmp_path: Path) -> None:
    def fingerprint(query: str) -> str:
        source = {"name": "web", "train": f"https://host/a.jsonl{query}"}
        return Run(tiny_config(tmp_path, data={"sources": [source]})).plan("prepare-data").fingerprint

    assert fingerprint("?X-Amz-Date=1&X-Amz-Signature=a") == fingerprint("?X-Amz-Date=2&X-Amz-Signature=b")
    assert fingerprint("?page=1") != fingerprint("?page=2")
    assert fingerprint("") == "47bea177bf2f80efd983713a1de7700b"


def test_saved_settings_hold_no_secret_and_are_read_again(tmp_path: Path) -> None:
    sources = [{"name": "web", "train": ["http://u:p@h/a", "b"], "test": "http://h/a?sig=x"}]
    config = tiny_config(tmp_path, data={"sources": sources}, experts={"count": 1})
    assert config.data.sources[0].train == ["http://u:p@h/a", "b"]
    text = to_yaml(config)
    assert yaml.safe_load(text)["data"]["sources"][0]["train"] == ["http://***@h/a", "b"]
    assert to_yaml(make_config(yaml.safe_load(text), "saved")) == text
    with pytest.raises(ConfigError):
        load_config(str(tmp_path / quote(f"{MARK}.yaml")))


def test_a_manifest_and_a_json_file_of_an_artifact_hold_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from checkpoints import write_artifact

    monkeypatch.setenv("HF_TOKEN", f"hf_{MARK}")
    secret = {"place": "http://a:b@c/d", "token": [f"hf_{MARK}"]}
    with write_artifact(str(tmp_path / "a"), "test", "f" * 32, secret) as writer:
        writer.write_json("facts.json", secret)
        writer.commit(secret)
    found = open_artifact(str(tmp_path / "a"))
    hidden = {"place": "http://***@c/d", "token": ["***"]}
    assert found.manifest.facts == found.manifest.settings == found.read_json("facts.json") == hidden
    assert planted(tmp_path) == []
    assert os.environ["HF_TOKEN"] == f"hf_{MARK}"
