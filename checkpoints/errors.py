"""The store's own errors; the root of all errors that a user can repair lives here, the lowest room."""

from checkpoints.redact import redact


class UserError(Exception):
    """Somebody can act on this: the message is one sentence that says what is wrong and what to do, without secrets."""

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))


class DataError(UserError):
    """An input is missing, empty, truncated, or not what its format says."""


class StoreError(UserError):
    """Storage cannot be reached, refuses, is full, or holds something damaged."""


class MissingBucketError(StoreError):
    """The bucket itself is not there, which is not the same as an empty one."""


class AccessError(StoreError):
    """Storage answers, but refuses: wrong or expired credentials, or a missing permission. Never retried."""


class UnreachableError(StoreError):
    """Storage does not answer, or kept failing for all retries."""


class StoreFullError(StoreError):
    """The disk or the quota is used up."""


class MissingArtifactError(StoreError):
    """No committed artifact at this URL: its stage has not run, or has not finished."""


class ArtifactExistsError(StoreError):
    """Another writer committed this artifact first; what exists is whole and immutable."""


class CorruptArtifactError(StoreError):
    """A file of a committed artifact is missing, truncated, or differs from the hash in its manifest."""
