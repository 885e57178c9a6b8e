"""The one gate through which every storage call goes: bounded retries with backoff and a log line, then a clear error.

The libraries below are told not to retry by themselves, so the number of requests is known and each failure is logged.
What they raise becomes one sentence with bucket, key and action: exceptions are told apart by the answer they carry and
by their class's name, so no network library is imported here. Messages name access rights and endpoints, never keys,
tokens or passwords.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from checkpoints.environment import endpoint, max_attempts
from checkpoints.errors import AccessError, MissingBucketError, StoreError, StoreFullError, UnreachableError
from checkpoints.redact import redact

Result = TypeVar("Result")
logger = logging.getLogger("checkpoints")

FIRST_DELAY_SECONDS = 0.25
LONGEST_DELAY_SECONDS = 15.0
EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
CREDENTIAL_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidSecurity", "AuthFailure"}
TRANSIENT_CODES = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "RequestLimitExceeded",
    "RequestTimeout",
    "InternalError",
    "ServiceUnavailable",
    "OperationAborted",
    "ConditionalRequestConflict",
    "XAmzContentSHA256Mismatch",
    "IncompleteBody",
    "BadDigest",
}
TRANSIENT_MODULES = ("botocore", "aiobotocore", "aiohttp", "urllib3")
FULL_CODES = {"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "507"}
NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}
UNSENDABLE = {"ParamValidationError", "LocationParseError", "InvalidURL"}
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def call(action: str, url: str, operation: Callable[[], Result]) -> Result:
    """Run one storage operation, again after passing trouble.

    FileNotFoundError (the key, not the bucket, is missing) and FileExistsError pass; all else becomes StoreError.
    """
    attempts = max_attempts()
    for attempt in range(1, attempts + 1):
        try:
            return operation()
        except Exception as error:
            if _is_answer(error):
                raise
            if attempt == attempts or not is_transient(error):
                raise explain(error, action, url, attempt) from error
            wait(action, url, error, attempt, attempts)
    raise AssertionError("the last attempt returns or raises")


def wait(action: str, url: str, error: Exception, attempt: int, attempts: int) -> None:
    """Log a failed attempt and sleep before the next, twice as long each time and with a random part."""
    delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** (attempt - 1)) * random.uniform(0.7, 1.3)
    reason = answer_code(error) or redact(" ".join(f"{type(error).__name__}: {error}".split()))
    logger.warning(
        "could not %s %s (%s); attempt %d of %d follows in %.1f s",
        action, redact(url), reason[:200], attempt + 1, attempts, delay,
    )  # fmt: skip
    time.sleep(delay)


def _is_answer(error: Exception) -> bool:
    if isinstance(error, FileNotFoundError):
        return not is_missing_bucket(error)
    return isinstance(error, FileExistsError | NotADirectoryError | StoreError)


def answer_code(error: BaseException) -> str:
    """The S3 error code or HTTP status that an exception carries, or an empty string."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def answer_status(error: BaseException) -> int:
    """The HTTP status that an exception carries, or 0."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return 0


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, StoreError):
        return False
    if is_full(error):
        return False
    if answer_code(error) in TRANSIENT_CODES or answer_status(error) >= 500 or answer_status(error) == 429:
        return answer_status(error) != 501
    if answer_code(error) or any(type(link).__name__ in NO_CREDENTIALS for link in _chain(error)):
        return False
    if _is_unsendable(error):
        return False
    return any(_is_connection_trouble(link) for link in _chain(error))


def is_full(error: BaseException) -> bool:
    """Whether a disk or a quota is used up."""
    is_local = isinstance(error, OSError) and error.errno in FULL_DISK
    return is_local or answer_code(error) in FULL_CODES or answer_status(error) == 507


def is_conflict(error: BaseException) -> bool:
    """Whether a create-if-absent was refused because something is there (servers say it in different words)."""
    return isinstance(error, FileExistsError) or answer_code(error) in ("PreconditionFailed", "412")


def is_missing_bucket(error: BaseException) -> bool:
    """Whether storage said that the bucket, not only the key, does not exist."""
    return answer_code(error) == "NoSuchBucket"


def explain(error: BaseException, action: str, url: str, attempts: int = 1) -> StoreError:
    """The error of this package that says what failed, on which URL, and what to do."""
    url = redact(url)  # before it is taken apart
    code, task = answer_code(error), f"cannot {action} {url}"
    if is_missing_bucket(error):
        return missing_bucket(action, url)
    if code in EXPIRED_CODES or "token has expired" in str(error).lower():
        return AccessError(f"{task}: the session token has expired; get new credentials and start again")
    if code in CREDENTIAL_CODES:
        return AccessError(
            f"{task}: the store does not accept these credentials ({code}); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and AWS_PROFILE"
        )
    if any(type(link).__name__ in NO_CREDENTIALS for link in _chain(error)):
        return AccessError(
            f"{task}: no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if _is_unsendable(error):
        return AccessError(
            f"{task}: no request can be made with these settings ({_reason(error)}); credentials and endpoint must be "
            "one line of plain characters each: check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and "
            "AWS_ENDPOINT_URL"
        )
    if answer_status(error) in (401, 403) or code in ("403", "AccessDenied") or isinstance(error, PermissionError):
        return AccessError(f"{task}: access is denied ({_reason(error)}); ask for this permission on {place(url)}")
    if is_full(error):
        return StoreFullError(f"{task}: the disk or the quota is full; free some space and start again")
    if is_transient(error):
        return UnreachableError(
            f"{task}: {endpoint()} failed {attempts} times, the last time with {_reason(error)}; "
            "check AWS_ENDPOINT_URL and the network, then start again"
        )
    return StoreError(f"{task}: {_reason(error)}; check {place(url)} and start again")


def missing_bucket(action: str, url: str) -> MissingBucketError:
    """The error for a bucket that is not there."""
    url = redact(url)
    bucket = url.split("://", 1)[-1].split("/", 1)[0]
    return MissingBucketError(
        f"cannot {action} {url}: the bucket {bucket} does not exist at {endpoint()}; "
        "create it, or fix the URL or AWS_ENDPOINT_URL"
    )


def unusable_settings(error: BaseException, url: str) -> StoreError:
    """The error for settings with which no client can be made: an unknown profile, a wrong endpoint."""
    return StoreError(
        f"cannot open {url}: {_reason(error)}; fix AWS_ENDPOINT_URL, AWS_PROFILE or fsspec's configuration for s3"
    )


def place(url: str) -> str:
    """The bucket and key, or the path, in words."""
    url = redact(url)
    if "://" not in url or url.startswith("file://"):
        return f"the path {url.removeprefix('file://')}"
    bucket, _, key = url.split("://", 1)[1].partition("/")
    return f"bucket {bucket}, key {key or '(all)'}"


def _is_unsendable(error: BaseException) -> bool:
    """Whether the request never left, because a header or a parameter has characters that none may have."""
    found = list(_chain(error))
    return any(type(link).__name__ in UNSENDABLE for link in found) or any(
        isinstance(link, ValueError) and "header" in str(link).lower() for link in found
    )


def _is_connection_trouble(error: BaseException) -> bool:
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    name, module = type(error).__name__, type(error).__module__
    if name in ("FSTimeoutError", "IncompleteRead", "TimeoutError"):
        return True
    return module.startswith(TRANSIENT_MODULES) and not name.startswith(("ParamValidation", "ClientError"))


def _reason(error: BaseException) -> str:
    text = redact(" ".join(str(error).split())) or type(error).__name__
    code = answer_code(error)
    return f"{code}: {text[:200]}" if code and code not in text else text[:200]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and what it was raised from, or while handling."""
    for _ in range(8):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__
