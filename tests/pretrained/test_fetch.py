"""`modularforge fetch` as a user runs it, against a small Hub on this machine, with cut and damaged downloads."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from checkpoints import open_artifact
from tests.conftest import run_command, tiny_values
from tests.pretrained import models
from tests.pretrained.hub_server import COMMIT, SmallHub

NAME = "tiny/llama"
Fetch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = models.llama(tmp_path_factory.mktemp("hub") / "llama", shard_size="60KB")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights as pickles, which nobody needs")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


@pytest.fixture
def hub(source: Path) -> Iterator[SmallHub]:
    with SmallHub({NAME: source}) as server:
        yield server


@pytest.fixture
def fetch(hub: SmallHub, tmp_path: Path) -> Fetch:
    """Run the command with caches of its own."""

    def run(*arguments: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "MODULARFORGE_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **variables,
        }
        return run_command("modularforge", "fetch", *arguments, check=check, env=environment)

    return run


def same_files(folder: Path, source: Path) -> bool:
    names = [path.name for path in source.iterdir() if path.suffix != ".bin" and path.name != "manifest.json"]
    return all((folder / name).read_bytes() == (source / name).read_bytes() for name in names)


def test_a_model_is_fetched_whole_with_its_tokenizer_and_verified(fetch: Fetch, source: Path, tmp_path: Path) -> None:
    done = fetch(NAME, "--output", str(tmp_path / "out"), "--verify")
    assert str(tmp_path / "out") in done.stdout
    assert (
        f"came from the Hub at commit {COMMIT}, where each file was compared with the size and the hash" in done.stderr
    )
    assert same_files(tmp_path / "out", source)
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    manifest = open_artifact(str(tmp_path / "out")).manifest
    assert manifest.facts == {"commit": COMMIT}
    assert manifest.settings == {"model": NAME}


def test_a_second_fetch_downloads_nothing(fetch: Fetch, hub: SmallHub, tmp_path: Path) -> None:
    fetch(NAME, "--output", str(tmp_path / "out"))
    before = dict(hub.requests)
    done = fetch(NAME, "--output", str(tmp_path / "out"), "--verify")
    assert "is here already" in done.stdout + done.stderr
    assert dict(hub.requests) == before


def test_without_output_the_cache_is_used_and_works_offline(fetch: Fetch, source: Path) -> None:
    first = fetch(NAME).stdout.splitlines()[-1]
    assert same_files(Path(first), source)
    assert fetch(NAME, HF_HUB_OFFLINE="1").stdout.splitlines()[-1] == first


def test_offline_the_cache_of_hugging_face_is_enough(fetch: Fetch, source: Path, tmp_path: Path) -> None:
    fetch(NAME)
    done = fetch(NAME, "--output", str(tmp_path / "out"), "--verify", HF_ENDPOINT="http://127.0.0.1:9")
    assert f"copied from Hugging Face's cache (commit {COMMIT}); whether" in done.stderr
    assert "taken from the cache" in done.stdout + done.stderr or "looked for in the cache" in done.stdout + done.stderr
    assert same_files(tmp_path / "out", source)


def test_offline_and_not_cached_is_said_in_one_sentence(fetch: Fetch, tmp_path: Path) -> None:
    done = fetch(NAME, "--output", str(tmp_path / "out"), check=False, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "is not cached and the Hub does not answer" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_cache_that_lacks_a_shard_is_not_taken_for_a_model(fetch: Fetch, tmp_path: Path) -> None:
    fetch(NAME)
    (shard, *_) = (tmp_path / "hf").rglob("model-00002-*.safetensors")
    shard.unlink()
    done = fetch(NAME, "--output", str(tmp_path / "out"), check=False, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "must be in Hugging Face's cache or be reachable on the Hub" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_download_that_always_breaks_off_leaves_nothing(
    fetch: Fetch, hub: SmallHub, source: Path, tmp_path: Path
) -> None:
    hub.cut["model-00002-of-00003.safetensors"] = 1000
    done = fetch(NAME, "--output", str(tmp_path / "out"), check=False)
    assert done.returncode == 2, done.stderr
    assert "broke off" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    hub.cut.clear()
    fetch(NAME, "--output", str(tmp_path / "out"), "--verify")
    assert same_files(tmp_path / "out", source)


def test_damaged_bytes_are_downloaded_again_and_never_committed(
    fetch: Fetch, hub: SmallHub, source: Path, tmp_path: Path
) -> None:
    hub.damaged["model-00001-of-00003.safetensors"] = 1
    done = fetch(NAME, "--output", str(tmp_path / "once"))
    assert "damaged in the cache; it is downloaded again" in done.stdout + done.stderr
    assert same_files(tmp_path / "once", source)


def test_bytes_that_stay_damaged_are_refused(fetch: Fetch, hub: SmallHub, tmp_path: Path) -> None:
    hub.damaged["tokenizer.json"] = 1000
    done = fetch(NAME, "--output", str(tmp_path / "out"), check=False)
    assert done.returncode == 2
    assert "tokenizer.json of tiny/llama must have the size and hash that the Hub says" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_a_broken_copy_is_fetched_again(damage: str, fetch: Fetch, source: Path, tmp_path: Path) -> None:
    """Truncated and missing files are found by any fetch; a flipped bit needs --verify."""
    out = tmp_path / "out"
    fetch(NAME, "--output", str(out))
    victim = out / "model-00001-of-00003.safetensors"
    content = victim.read_bytes()
    victim.unlink()  # the copy in Hugging Face's cache is the same file
    if damage != "missing":
        victim.write_bytes(content[:-5] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    done = fetch(NAME, "--output", str(out), *(["--verify"] if damage == "flipped" else []))
    assert "is broken and is fetched again" in done.stdout + done.stderr
    assert same_files(out, source)


@pytest.mark.parametrize("case", ["another tool's manifest", "a file of one's own"])
def test_files_of_other_people_are_never_taken_away(case: str, fetch: Fetch, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if case == "a file of one's own":
        fetch(NAME, "--output", str(out))
    else:
        out.mkdir()
        (out / "manifest.json").write_text('{"name": "my app"}')
    (out / "thesis.txt").write_text("precious")
    done = fetch(NAME, "--output", str(out), "--verify", check=False)
    assert done.returncode == 2
    assert (out / "thesis.txt").read_text() == "precious"
    assert ("thesis.txt must not be there" if case == "a file of one's own" else "undamaged manifest") in done.stderr


def test_a_damaged_manifest_in_our_cache_is_fetched_again(fetch: Fetch, source: Path) -> None:
    place = Path(fetch(NAME).stdout.strip())
    (place / "manifest.json").write_text("{")
    assert "is broken and is fetched again" in fetch(NAME).stderr
    assert same_files(place, source)


def test_a_name_that_nobody_has_is_refused(fetch: Fetch, tmp_path: Path) -> None:
    for name, message in (
        ("tiny/other", "must be a model on the Hub or a folder here, but is neither"),
        (str(tmp_path / "nowhere"), "there is no such folder"),
    ):
        done = fetch(name, check=False)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_another_model_at_the_same_place_is_refused(fetch: Fetch, source: Path, tmp_path: Path) -> None:
    fetch(NAME, "--output", str(tmp_path / "out"))
    done = fetch(str(source), "--output", str(tmp_path / "out"), check=False)
    assert done.returncode == 2
    assert f"must be free or hold {source}, but holds {NAME}" in done.stderr


def test_a_folder_is_a_source_too(fetch: Fetch, source: Path, tmp_path: Path) -> None:
    fetch(str(source), "--output", str(tmp_path / "copy"), "--verify")
    assert same_files(tmp_path / "copy", source)


def test_a_source_that_does_not_fit_its_config_is_named_and_not_the_hidden_folder_of_its_copy(
    fetch: Fetch, source: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    fetch(str(source), "--output", str(odd))
    (odd / "manifest.json").unlink()
    values = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**values, "intermediate_size": 8}))
    done = fetch(str(odd), "--output", str(tmp_path / "out"), check=False)
    assert f" in {odd} must have shape" in done.stderr
    assert "attempt" not in done.stderr


def test_a_truncated_source_is_refused(fetch: Fetch, source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    fetch(str(source), "--output", str(broken))
    (broken / "manifest.json").unlink()
    victim = broken / "model-00003-of-00003.safetensors"
    victim.write_bytes(victim.read_bytes()[:-8])
    done = fetch(str(broken), "--output", str(tmp_path / "out"), check=False)
    assert done.returncode == 2
    assert "must be a whole weight file" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_names_its_backbone_as_the_hub_does_and_needs_the_network_once(
    hub: SmallHub, source: Path, tmp_path: Path
) -> None:
    values = tiny_values(tmp_path / "run", backbone={"steps": 0})
    values["model"] = {"pretrained": NAME, "context_length": models.CONTEXT}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    caches = {"HF_HOME": str(tmp_path / "hf"), "MODULARFORGE_CACHE": str(tmp_path / "cache")}

    def run(*arguments: str, **variables: str) -> str:
        command = ["modularforge", *arguments, "--config", str(tmp_path / "config.yaml")]
        return run_command(*command, env={**caches, **variables}).stdout

    shown = run("info", HF_ENDPOINT=hub.url)
    assert "width 32, 2 layers, 4 heads, FFN 56" in shown
    assert not any(name.startswith("model-") for name in hub.requests)  # sizes are told without the weights
    run("prepare-data", HF_ENDPOINT=hub.url)
    for stage in (["train"], ["assemble", "--no-calibrate"]):
        run(*stage, HF_HUB_OFFLINE="1")
    facts = open_artifact(str(tmp_path / "run" / "backbone")).manifest.facts
    assert facts["pretrained"]["hub"] == NAME
    assert f"base_model: {NAME}" in (tmp_path / "run" / "assembled" / "README.md").read_text()


def test_the_index_names_every_shard(source: Path) -> None:
    named = set(json.loads((source / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert named == {path.name for path in source.glob("model-*.safetensors")}
