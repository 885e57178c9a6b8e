"""Test sets beside a run's own domains: recordings with texts at a path, or sets that are known by name on the Hub.

What a set's recordings are is not recorded by the run; an evaluation knows them by names, sizes and times of files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from checkpoints import Artifact, paths
from modularforge.config import Config, SourceConfig, SpeechTestConfig
from modularforge.data.files import real_location
from modularforge.data.inputs import Match, file_states, list_matches
from modularforge.errors import ConfigError, DataError
from modularforge.log import logger
from modularforge.speech.feature_files import STATISTICS_NAME, SpeechFile, open_speech_file
from modularforge.speech.prepare import Writer
from modularforge.speech.records import is_folder

HUB_SETS: Mapping[str, Mapping[str, str]] = {
    "librispeech-test-clean": {"hub": "openslr/librispeech_asr", "hub_config": "clean"},
    "librispeech-test-other": {"hub": "openslr/librispeech_asr", "hub_config": "other"},
    "aishell-1": {"hub": "AudioLLMs/aishell_1_zh_test", "audio_field": "context", "text_field": "answer"},
}
"""Sets by name, all of their split `test`; columns are `audio` and `text` where nothing else is said."""
BY_AGREEMENT = {"aishell-2": "its makers give it out by agreement alone (aishelltech.com)"}


def known(test: SpeechTestConfig) -> SpeechTestConfig:
    """A test set with what its name stands for; raises ConfigError where neither name nor settings say where it is."""
    if test.path is not None or test.hub is not None:
        return test
    if test.name not in HUB_SETS:
        why = BY_AGREEMENT.get(test.name, f"is none of the known ones ({', '.join(HUB_SETS)})")
        raise ConfigError(
            f"speech.decoding.tests must say where test set {test.name} is: {why}; give it a path, or hub and split"
        )
    return test.model_copy(update=dict(HUB_SETS[test.name]))


def set_at(place: str) -> SpeechTestConfig:
    """The test set that somebody names on a command line: a known name, else a path, called by its last part."""
    if place in HUB_SETS or place in BY_AGREEMENT:
        return SpeechTestConfig(name=place)
    last = place.rstrip("/").rpartition("/")[2].partition("?")[0]
    name = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_.-") else "-" for letter in last)
    return SpeechTestConfig(name=name or "test", path=place)


def write_test_set(
    config: Config, corpus: Artifact, tokenizer: Tokenizer, end_token: int, test: SpeechTestConfig, folder: Path
) -> SpeechFile:
    """Compute the features of a test set into a folder, as those of the run; raises DataError for one without any."""
    own = _settings(config, known(test))
    writer = Writer(own, tokenizer, end_token, folder)
    writer.write("test", config.speech.decoding.max_utterances)
    for reasons in writer.dropped.values():
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        logger.warning("test set %s: left out %s", test.name, listed)
    if STATISTICS_NAME in corpus.manifest.files:  # those of training, as the model knows them
        shutil.copyfile(corpus.local_file(STATISTICS_NAME), folder / STATISTICS_NAME)
    file = open_speech_file(folder, "test", own.speech.data)
    if not file.count:
        raise DataError(
            f"test set {test.name} must have recordings that can be used, but none can; see above what was left out, "
            "and check its columns"
        )
    return file


def _settings(config: Config, test: SpeechTestConfig) -> Config:
    """The run's settings with the test set for its only source."""
    place: Any = test.split if test.hub else test.path
    source = SourceConfig(
        name=test.name, hub=test.hub, hub_config=test.hub_config, train=place, test=place, text_field=test.text_field
    )
    data = {
        "audio_field": test.audio_field,
        "prompt_field": test.prompt_field,
        "split_field": None,
        "keeps": "features",
    }
    speech = config.speech.model_copy(update={"data": config.speech.data.model_copy(update=data)})
    return config.model_copy(update={"data": config.data.model_copy(update={"sources": [source]}), "speech": speech})


def identity_of_sets(config: Config) -> dict[str, str]:
    """What identifies the files of the test sets, for an evaluation's fingerprint; nothing where there are none."""
    tests = [known(test) for test in config.speech.decoding.tests or ()]
    states = {test.name: _states(_settings(config, test)) for test in tests if test.path is not None}
    content = json.dumps([[test.model_dump(mode="json") for test in tests], states], sort_keys=True)
    return {"tests": hashlib.sha256(content.encode()).hexdigest()[:32]} if tests else {}


def _states(config: Config) -> dict[str, list[Any]]:
    """Size and time of each file, also below folders."""
    matches = [match for match in list_matches(config) if match.split == "test"]
    found = [
        Match(match.source, match.split, str(path), is_sample=False)
        for match in matches
        if is_folder(real_location(match.url))
        for path in sorted(paths.local_path(match.url).rglob("*"))
        if path.is_file()
    ]
    return file_states([*found, *(match for match in matches if not is_folder(match.url))])
