"""Takes secrets out of text: what is said, logged, recorded or saved goes through `redact` where it leaves.

Three kinds: user names and passwords in URLs, signatures and tokens in their queries, and the values of secrets that
this process knows (environment variables and fsspec's configuration).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

import fsspec

MASK = "***"
SHORTEST_SECRET = 6  # shorter values ("on", "1234") stand in ordinary text by chance
USER_INFO = re.compile(r"(?<=://)[^/?#\s]*@")
# Queries of signed URLs: S3 (X-Amz-…, AWSAccessKeyId), Azure (sig), Google (X-Goog-…), and what plain servers use.
SECRET_QUERY = re.compile(
    r"(?i)([?&;](?:[\w.-]*(?:signature|credential|token|secret|passw(?:or)?d|api_?key|access_?key(?:_?id)?)[\w.-]*|sig|key)=)"
    r"[^&#\s'\"]+"
)
SECRET_NAME = re.compile(
    r"(?i)(secret|token|jwt|passw(or)?d|passphrase|credential|(?<!pass_)(api|access|account|private)_?key)"
)
# Names that look like secrets and hold none.
HARMLESS = re.compile(r"(?i)(_file|_path|_dir|_url|_uri)$|tokenizers_parallelism")


def redact(text: str) -> str:
    """The text with `***` in place of every secret."""
    text = SECRET_QUERY.sub(rf"\g<1>{MASK}", USER_INFO.sub(f"{MASK}@", text))
    for secret in sorted(_known_secrets(), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return text


def redact_values(value: Any) -> Any:
    """The same for all texts in nested lists and dictionaries, names of entries included."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact_values(name): redact_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(item) for item in value]
    return value


def has_secret(text: str) -> bool:
    """Whether `redact` would change the text."""
    return redact(text) != text


def _known_secrets() -> set[str]:
    found = {secret for secret in _raw_secrets() if len(secret) >= SHORTEST_SECRET}
    # As they stand in URLs and in Python's and JSON's quoting as well.
    return {form for secret in found for form in (secret, quote(secret, safe=""), repr(secret)[1:-1])}


def _raw_secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and not HARMLESS.search(name):
            yield from (value, *value.split())  # a token with a line break is quoted in part as well
        if "://" in value and (match := USER_INFO.search(value)):
            yield match[0].removesuffix("@").partition(":")[2]
    for options in fsspec.config.conf.values():
        yield from _secrets_in(options)


def _secrets_in(options: Any) -> Iterator[str]:
    """Secrets in fsspec's configuration, such as ``{s3: {secret: …, client_kwargs: {…}}}``."""
    if not isinstance(options, Mapping):
        return
    for name, value in options.items():
        if isinstance(value, str) and (SECRET_NAME.search(str(name)) or name in ("key", "secret", "token", "password")):
            yield value
        yield from _secrets_in(value)
