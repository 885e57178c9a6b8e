"""Bring a pretrained model here whole: from the Hub, a folder or an object store, as an artifact of the store.

Nothing half-downloaded looks finished, because the manifest is written last. A copy that is there already is used;
a broken one is made again. Large files of the Hub are linked from Hugging Face's cache, not copied, where that works.

What a pretrained model is called in a fingerprint is a hash of its files' bytes, wherever they lie. A file is hashed
once; the result is kept in our cache with the file's size, time and inode, and in the manifest of a model that was
fetched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpoints import (
    Artifact,
    ArtifactExistsError,
    ArtifactWriter,
    CorruptArtifactError,
    find_artifact,
    open_artifact,
    paths,
    write_artifact,
)
from checkpoints.options import cache_folder
from checkpoints.redact import redact
from checkpoints.safetensors import WEIGHTS_NAME
from checkpoints.screen import shown_command
from checkpoints.streams import stream_span
from modularforge.errors import DataError, MismatchError, StoreError
from modularforge.facts import fact
from modularforge.log import logger
from modularforge.model.hub_config import read_config
from modularforge.pretrained import hub
from modularforge.pretrained.sources import (
    HubName,
    check_weights,
    folder_files,
    hub_name,
    is_folder,
    is_gguf,
    model_files,
    require_no_file,
)

KIND = "pretrained"
GGUF_FACT = "gguf_sha256"  # of the file that a folder was made of
CACHE_FACT = "from_cache"  # copied without a network, so that the Hub's hashes were not asked for
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CHUNK_BYTES = 1 << 20


def fetch(model: str, output: str | None = None, verify: bool = False) -> Artifact:
    """The model as an artifact at `output` (default: in our cache), fetched only when it is not there whole.

    With `verify`, every byte is compared with the recorded hashes and all headers are read; a damaged copy is fetched
    again. Raises DataError, MismatchError or StoreError.
    """
    url = output or cached_url(model)
    artifact = _whole_copy(url, model, verify)
    if artifact is not None:
        logger.info("%s is here already: %s", model, url)
    else:
        artifact = _fetch(model, url)
        if verify:
            artifact.verify()
    tensors = check_weights(artifact.local_folder(verify=False))
    if verify:
        _say_what_was_verified(artifact, len(tensors))
    return artifact


def _say_what_was_verified(artifact: Artifact, tensors: int) -> None:
    """What was compared with what, and what nobody here can know."""
    manifest = artifact.manifest
    size = sum(entry.size for entry in manifest.files.values())
    logger.info(
        "verified %d files, %d bytes: every byte has the hash that %s/manifest.json says, and the weight files have "
        "the %d tensors that config.json asks for",
        len(manifest.files),
        size,
        artifact.url,
        tensors,
    )
    origin, commit = manifest.settings.get("model"), manifest.facts.get("commit")
    if commit is None or manifest.facts.get(CACHE_FACT):
        place = f"Hugging Face's cache (commit {commit})" if commit else redact(str(origin))
        logger.info(
            "these hashes were taken when it was copied from %s; whether that was what its maker published cannot be "
            "verified from here",
            place,
        )
    else:
        logger.info(
            "these hashes were taken when %s came from the Hub at commit %s, where each file was compared with the "
            "size and the hash that the Hub gives",
            origin,
            commit,
        )


def cached_url(model: str) -> str:
    """Where a model is kept that was fetched without `--output`."""
    if is_gguf(model) and paths.is_local(model):  # another file by that name is another model
        model = f"{model} {_hash_gguf(model)}"
    readable = "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in redact(model))[-60:]
    return str(cache_folder() / "models" / f"{readable}-{hashlib.sha256(model.encode()).hexdigest()[:8]}")


def _whole_copy(url: str, model: str, verify: bool) -> Artifact | None:
    """The copy at a URL; None when there is none, or when it was broken and has been taken away.

    Raises CorruptArtifactError for a broken one that cannot be taken away without other people's files.
    """
    artifact = None
    try:
        artifact = find_artifact(url)
        if artifact is None:
            return None
        held = artifact.manifest.settings.get("model")
        if held != redact(model):
            raise MismatchError(
                f"{url} must be free or hold {redact(model)}, but holds {held!s:.200}; choose another --output"
            )
        artifact.local_folder(verify=False)
        if verify:
            artifact.verify()
        return artifact
    except CorruptArtifactError as error:
        if not _holds_nothing_else(url, model, artifact):
            raise
        logger.warning("the copy of %s at %s is broken and is fetched again: %s", model, url, error)
        paths.remove(url)
        return None


def _holds_nothing_else(url: str, model: str, artifact: Artifact | None) -> bool:
    """Whether a folder is a fetched copy and no more; without a readable manifest, only our cache is known to be."""
    return url == cached_url(model) if artifact is None else not artifact.extra_files()


def _fetch(model: str, url: str) -> Artifact:
    if is_gguf(model):
        return _convert(model, url)
    if is_folder(model):
        return _copy_folder(model, url)
    name = hub_name(model)
    try:
        listing = hub.list_files(name)
    except ConnectionError as error:
        logger.warning("the Hub does not answer (%s); %s is looked for in the cache", error, model)
        cached = _cached_folder(model, name, error)
        return _copy_folder(str(cached), url, model, commit=cached.name)
    return _from_hub(model, name, listing, url)


def _cached_folder(model: str, name: HubName, reason: ConnectionError) -> Path:
    """The whole model in Hugging Face's cache; raises StoreError when it is not there, or not whole."""
    folder = hub.cached_folder(name)
    state = "is not cached"
    if folder is not None:
        try:
            folder_files(folder, model)
            check_weights(folder)
            return folder
        except DataError as error:
            state = f"is not whole in the cache ({error})"
    raise StoreError(
        f"{model} must be in Hugging Face's cache or be reachable on the Hub, but {state} and the Hub does not answer "
        f"({reason}); run `{shown_command('modularforge', 'fetch', model)}` where there is a network, or name a folder"
    ) from reason


def _from_hub(model: str, name: HubName, listing: hub.HubListing, url: str) -> Artifact:
    chosen = model_files(listing.files, model, lambda file: hub.download(name, listing, file).read_bytes())
    with write_artifact(url, KIND, _fingerprint(model, listing.commit), {"model": redact(model)}) as writer:
        for number, file in enumerate(chosen, start=1):
            logger.info("%s: %s (%d of %d), %d bytes", model, file, number, len(chosen), listing.files[file].size)
            _link_or_copy(hub.download(name, listing, file), writer.folder / file)
        _check_copy(writer.folder, model)
        return _commit(writer, url, {"commit": listing.commit})


def _copy_folder(source: str, url: str, model: str | None = None, commit: str | None = None) -> Artifact:
    """Copy a model folder of any store, checked against its manifest where it has one."""
    artifact = find_artifact(source)
    names = list(artifact.manifest.files) if artifact else paths.list_folder(source)
    model = model or source
    chosen = model_files(names, model, artifact.read_bytes if artifact else lambda name: _read(source, name))
    with write_artifact(url, KIND, _fingerprint(model, commit or source), {"model": redact(model)}) as writer:
        for name in chosen:
            writer.write_chunks(name, artifact.stream(name) if artifact else _chunks(paths.join(source, name)))
        if paths.is_local(url):
            _check_copy(writer.folder, model)
        return _commit(writer, url, {"commit": commit, CACHE_FACT: True} if commit else {})


def _convert(model: str, url: str) -> Artifact:
    """Make a folder of a GGUF file: its values in float32, its tokenizer, and its settings."""
    from modularforge.pretrained.gguf_file import GgufFile

    with _local_file(model) as path:
        file, digest = GgufFile(path, model), _hash_once(path)
        logger.info("%s: its values in float32, its tokenizer and its settings are written to %s", redact(model), url)
        with write_artifact(url, KIND, _fingerprint(model, digest), {"model": redact(model)}) as writer:
            file.write(writer.folder)
            writer.write_chunks(WEIGHTS_NAME, file.weights())
            if paths.is_local(url):
                _check_copy(writer.folder, model)
            return _commit(writer, url, {GGUF_FACT: digest})


@contextmanager
def _local_file(model: str) -> Iterator[Path]:
    """A file of this machine: itself, or a copy for as long as the block takes."""
    if paths.is_local(model):
        yield paths.local_path(model)
        return
    with tempfile.TemporaryDirectory(prefix="modularforge-gguf-", ignore_cleanup_errors=True) as scratch:
        path = Path(scratch) / "model.gguf"
        with open(path, "wb") as copy:
            copy.writelines(_chunks(model))
        yield path


def _check_copy(folder: Path, model: str) -> None:
    """Raise DataError for weights that do not fit, with the model's name: the hidden folder of a copy says nothing."""
    try:
        check_weights(folder)
    except DataError as error:
        raise DataError(str(error).replace(str(folder), redact(model))) from error


def _read(folder: str, name: str) -> bytes:
    return paths.read_bytes(paths.join(folder, name))


def _chunks(url: str) -> Iterator[bytes]:
    return stream_span(url, 0, paths.file_size(url))


def _commit(writer: ArtifactWriter, url: str, facts: dict[str, Any]) -> Artifact:
    try:
        return writer.commit(facts)
    except ArtifactExistsError:
        logger.info("another process fetched the same model first: %s", url)
        return open_artifact(url)


def _fingerprint(model: str, version: str) -> str:
    return hashlib.sha256(json.dumps([KIND, model, version]).encode()).hexdigest()[:32]


def _link_or_copy(source: Path, target: Path) -> None:
    """A hard link to what the cache's own link points at, or a copy where the two folders share no disk."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def local_model(model: str) -> Path:
    """A pretrained model as a whole local folder: in place, or fetched into the cache; raises DataError, StoreError."""
    if "://" in model and not is_gguf(model) and find_artifact(model) is not None:
        return open_artifact(model).local_folder()
    if paths.is_local(model) and is_folder(model):
        folder = paths.local_path(model)
        folder_files(folder, model)
        return folder
    if not is_gguf(model):
        require_no_file(model, "model.pretrained")
    return fetch(model).local_folder(verify=False)


def model_identity(model: str) -> str:
    """Identity of all files of a model that we read, 32 hexadecimal digits; of a GGUF file, that of its bytes."""
    if is_gguf(model):
        return _digest({"gguf": gguf_hash(model)})
    folder = local_model(model)
    return _digest(_hashes(folder, folder_files(folder, model)))


def tokenizer_identity(model: str) -> str:
    """Identity of a model's tokenizer and of what its config.json says about the end of a text."""
    if is_gguf(model):
        return _digest({"gguf tokenizer": gguf_hash(model)})
    folder = local_model(model)
    present = [name for name in TOKENIZER_NAMES if (folder / name).is_file()]
    return _digest({**_hashes(folder, present), "eos_token_id": read_config(folder).get("eos_token_id")})


def files_identity(folder: Path, names: list[str]) -> str:
    """Identity of some files of a folder, 32 hexadecimal digits."""
    return _digest(_hashes(folder, names))


def template_identity(model: str) -> str:
    """Identity of the chat template in a file of its own; one in the tokenizer's settings is the tokenizer's."""
    folder, name = local_model(model), "chat_template.jinja"
    return _digest(_hashes(folder, [name] if (folder / name).is_file() else []))


def gguf_hash(model: str) -> str:
    """sha256 of a GGUF file, whatever is made of it here: another version of a library may spell a tokenizer anew."""
    return _hash_gguf(model) if paths.is_local(model) else str(fact(fetch(model), GGUF_FACT))


def _hash_gguf(model: str) -> str:
    path = paths.local_path(model)
    if not path.is_file():
        raise DataError(f"{redact(model)} must be a GGUF file, but there is none; fix the path")
    return _hash_once(path)


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    artifact = find_artifact(str(folder))
    known = artifact.manifest.files if artifact else {}
    return {name: known[name].digest if name in known else _hash_once(folder / name) for name in names}


def _hash_once(path: Path) -> str:
    """sha256 of a file, from the cache unless the file changed since."""
    path = path.resolve()
    status = path.stat()
    stamp = [str(path), status.st_size, status.st_mtime_ns, status.st_ino]
    record = cache_folder() / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    try:
        found = json.loads(record.read_text())
        if found["stamp"] == stamp:
            return str(found["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not hashed yet, or by another version
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    content = json.dumps({"stamp": stamp, "sha256": digest.hexdigest()}).encode()
    paths.replace_bytes(str(record), content)
    return digest.hexdigest()
