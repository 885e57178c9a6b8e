"""Makes botocore's client for S3 from the AWS variables and profiles, and from fsspec's configuration for ``s3``."""

from __future__ import annotations

from typing import Any

# One attempt per request in botocore: retry.py repeats, so that every failure is counted and logged.
CONFIG = {
    "connect_timeout": 10,
    "read_timeout": 60,
    "max_pool_connections": 32,
    "retries": {"total_max_attempts": 1},
    "response_checksum_validation": "when_required",  # all that is read is compared with the manifest's sha256
}
CLIENT_NAMES = {
    "key": "aws_access_key_id",
    "secret": "aws_secret_access_key",
    "token": "aws_session_token",
    "endpoint_url": "endpoint_url",
    "use_ssl": "use_ssl",
}


def open_client(settings: dict[str, Any]) -> Any:
    """A client with s3fs's own words in `settings` (`profile`, `endpoint_url`, `key`, `anon`, `config_kwargs`, …).

    What only tunes s3fs's own reading, such as its caches, is passed over.
    """
    import botocore.session
    from botocore.config import Config

    config = {**CONFIG, **settings.get("config_kwargs", {})}
    if settings.get("anon"):
        config["signature_version"] = botocore.UNSIGNED
    named = {ours: settings[theirs] for theirs, ours in CLIENT_NAMES.items() if settings.get(theirs) is not None}
    session = botocore.session.Session(profile=settings.get("profile"))
    return session.create_client("s3", config=Config(**config), **{**named, **settings.get("client_kwargs", {})})
