"""Checks AWS Signature Version 4 as a server does, independently of botocore."""

from __future__ import annotations

import hashlib
import hmac
import re

from tests.storage.proxy import Fault, Request

AUTHORIZATION = re.compile(r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\S+?), ?SignedHeaders=(\S+?), ?Signature=(\w+)")


def wrong_signature(request: Request, key: str, secret: str) -> Fault | None:
    """The refusal of a server when the request is not signed with this key and secret, else None."""
    headers = {name.lower(): value for name, value in request.headers.items()}
    found = AUTHORIZATION.match(headers.get("authorization", ""))
    if not found:
        return Fault("answer", 403, "AccessDenied")
    used_key, scope, names, signature = found.groups()
    if used_key != key:
        return Fault("answer", 403, "InvalidAccessKeyId")
    if signature != _signature(request, headers, scope, names, secret):
        return Fault("answer", 403, "SignatureDoesNotMatch")
    return None


def _signature(request: Request, headers: dict[str, str], scope: str, names: str, secret: str) -> str:
    path, _, query = request.path.partition("?")
    pairs = sorted(pair if "=" in pair else pair + "=" for pair in query.split("&") if pair)
    signed = [f"{name}:{headers[name]}" for name in names.split(";")]
    parts = [request.method, path, "&".join(pairs), *signed, "", names, headers["x-amz-content-sha256"]]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    text = "\n".join(["AWS4-HMAC-SHA256", headers["x-amz-date"], scope, digest])
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
