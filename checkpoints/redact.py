"""Takes secrets out of text: what is said, logged, recorded or saved goes through here where it leaves.

Three kinds: user names and passwords in URLs, signatures and tokens in their queries, and the values of secrets that
this process knows (environment variables and fsspec's configuration).
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

import fsspec

MASK = "***"
SHORTEST_SECRET = 6  # shorter values ("on", "1234") stand in ordinary text by chance
# So do plain words ("testing", "minioadmin") and numbers (MAX_TOKENS=100000): a run in runs/testing must not be renamed
# by the password of a test server.
WORD = re.compile(r"[a-z]{1,15}|\d{1,11}")
# `${NAME}` stands for an environment variable in locations of sources: it says where the secret is, not what it is.
VARIABLE = r"\$\{[A-Za-z_]\w*\}"
USER_INFO = re.compile(rf"(?<=://)(?![^/?#\s'\"<>:@]*:?{VARIABLE}@)[^/?#\s'\"<>]*@")
# What stands before the @ alone, without a colon: a container or a user of these, but a token of a web server.
CONTAINER = re.compile(r"(?i)(?<![a-z])(abfss?|wasbs?|hdfs|sftp|ssh|smb)://[^/?#\s'\"<>:@]*@")
# Queries of signed URLs: S3 (X-Amz-…, AWSAccessKeyId), Azure (sig), Google (X-Goog-…), and what plain servers use;
# Azure's connection strings (AccountKey) are written alike.
SECRET_QUERY = re.compile(
    r"(?i)([?&;](?:[\w.-]*(?:signature|credential|token(?!iz)|secret|passw(?:or)?d|(?:api|account|shared)_?key|access_?key(?:_?id)?)[\w.-]*"
    rf"|sig|key)=)(?!{VARIABLE}(?:[&#\s'\"<>]|$))[^&#\s'\"<>]+"
)
# What is signed anew with each URL and is no secret: dates, lengths of life, versions of the protocol.
SIGNED_QUERY = re.compile(
    r"(?i)([?&;](?:x-(?:amz|goog)-[\w-]+|expires|googleaccessid|key-pair-id|policy|s[vetpr]|spr|sip|skoid|sktid|sk[tesv])=)"
    r"[^&#\s'\"<>]+"
)
QUERY = re.compile(r"(?<=\?)[^#\s'\"<>]+")
SECRET_NAME = re.compile(
    r"(?i)(secret|token(?!iz)|jwt|passw(or)?d|passphrase|credential|authorization|cookie|connection_?string"
    r"|(?<!pass_)(api|access|account|storage|private)_?key)"
)
# Names that look like secrets and hold none; an access key's id tells who asks, not how to ask.
HARMLESS = re.compile(r"(?i)(_file|_path|_dir|_ur[li]|key_id)$")
MASKED = re.compile(r"://\*\*\*@|[?&;][\w.-]+=\*\*\*")


def redact(text: str) -> str:
    """The text with `***` in place of every secret."""
    return redactor()(text)


def redactor() -> Callable[[str], str]:
    """`redact` with the secrets known now, for many texts: to look for them takes longer than to replace them."""
    secrets = _known_secrets()

    def clean(text: str) -> str:
        text = redact_urls(text)
        for secret in secrets:
            text = text.replace(secret, MASK)
        return text

    return clean


def redact_urls(text: str) -> str:
    """The text without the secrets that stand in URLs, whatever this process knows: the same on every machine.

    Of a signed URL all that changes with the next signature is taken out, so that both leave the same text.
    """
    if "://" not in text and "=" not in text:
        return text
    text = QUERY.sub(_without_signature, _without_user_info(text))
    return SECRET_QUERY.sub(rf"\g<1>{MASK}", text)


def redact_values(value: Any, clean: Callable[[str], str] | None = None) -> Any:
    """The same for all texts in nested lists and dictionaries, names of entries included."""
    clean = clean or redactor()
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {redact_values(name, clean): redact_values(item, clean) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(item, clean) for item in value]
    return value


def has_secret(text: str) -> bool:
    """Whether a URL holds what must not be saved."""
    return redact_urls(text) != text


def is_redacted(text: str) -> bool:
    """Whether a secret was taken out of a URL, so that nothing can be read from it."""
    return bool(MASKED.search(text))


def _without_user_info(text: str) -> str:
    kept = {match.end() for match in CONTAINER.finditer(text)}
    return USER_INFO.sub(lambda match: match[0] if match.end() in kept else f"{MASK}@", text)


def _without_signature(query: re.Match[str]) -> str:
    text = f"?{query[0]}"
    if SECRET_QUERY.search(text):
        text = SIGNED_QUERY.sub(rf"\g<1>{MASK}", text)
    return text[1:]


def _known_secrets() -> list[str]:
    configured = tuple(secret for options in fsspec.config.conf.values() for secret in _secrets_in(options))
    return _forms(tuple(os.environ.items()), configured)


@functools.lru_cache(maxsize=4)  # a report asks for each of its cells
def _forms(variables: tuple[tuple[str, str], ...], configured: tuple[str, ...]) -> list[str]:
    """All forms of the secrets in environment variables and in fsspec's configuration.

    The longest first, because one may hold another.
    """
    raw = (*configured, *(secret for name, value in variables for secret in _secrets_of(name, value)))
    found = {secret for secret in raw if len(secret) >= SHORTEST_SECRET and not WORD.fullmatch(secret)}
    # As they stand in URLs and in Python's and JSON's quoting as well.
    forms = {
        form
        for secret in found
        for form in (secret, quote(secret, safe=""), repr(secret)[1:-1], json.dumps(secret)[1:-1])
    }
    return sorted(forms, key=len, reverse=True)


def _secrets_of(name: str, value: str) -> Iterator[str]:
    if SECRET_NAME.search(name) and not HARMLESS.search(name):
        yield from (value, *value.split())  # a token with a line break is quoted in part as well
    if "://" in value and (match := USER_INFO.search(value)):
        yield match[0].removesuffix("@").partition(":")[2]


def _secrets_in(options: Any) -> Iterator[str]:
    """Secrets in fsspec's configuration, such as ``{s3: {secret: …, client_kwargs: {…}}}``."""
    if not isinstance(options, Mapping):
        return
    for name, value in options.items():
        if isinstance(value, str) and (SECRET_NAME.search(str(name)) or name in ("key", "password")):
            yield from (value, *value.split())
        yield from _secrets_in(value)
