"""The store on S3: single requests through botocore's client, each retried and explained by us.

s3fs is not used here: its `ls`, `isfile`, `rm` and `put_file` cache, take a missing bucket or a 403 for "not there",
pass over failed deletes, or hold a whole file in memory (all seen in s3fs 2026.9), and an upload through its event loop
took 1.4 times the processor time of the same requests from threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import chain
from typing import Any

from checkpoints import retry
from checkpoints.errors import CorruptArtifactError, StoreError
from checkpoints.options import max_attempts
from checkpoints.pace import writing_to
from checkpoints.parallel import as_done, in_order
from checkpoints.parts import Parts
from checkpoints.retry import call
from checkpoints.urls import FileInfo, join

REQUESTS_IN_FLIGHT = 8
PART_BYTES = 16 << 20
LARGEST_COPY = 5 << 30  # of one CopyObject request
COPY_PART = 1 << 30
PIECE_BYTES = 1 << 20  # malloc uses blocks of this size again; fresh larger ones cost page faults
RECEIVED_BYTES = 256 << 10  # still in the processor's cache when urllib3 copies it on
OBJECT_MARKERS = {"ContinuationToken": "NextContinuationToken"}
UPLOAD_MARKERS = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
KEYS_OF_A_DELETE = 1_000  # of one DeleteObjects request
NOT_OFFERED = {"NotImplemented", "MethodNotAllowed"}  # DeleteObjects, by some stores that speak S3
ABSENT = {"NoSuchKey", "NoSuchBucket", "NoSuchUpload", "404", "NotFound"}
# One attempt per request in botocore: retry.py repeats, so that every failure is counted and logged.
CONFIG = {
    "connect_timeout": 10,
    "read_timeout": 60,
    "max_pool_connections": 100,  # three files at once, each with as many requests as there may be
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


class S3Store:
    """Objects in buckets; all methods take ``s3://bucket/key`` URLs."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def read(self, url: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end) of an object; raises FileNotFoundError when the bucket is there and the key is not."""
        return b"".join(self.read_pieces(url, start, end))

    def read_pieces(self, url: str, start: int = 0, end: int | None = None) -> list[bytes]:
        """The same bytes as `read`, in pieces of 1 MiB."""
        if end is not None and end <= start:
            return []
        options = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
        return call("read", url, lambda: self._get(url, options))

    def read_into(self, url: str, start: int, view: memoryview) -> int:
        """Fill a buffer with the bytes behind `start`; returns how many there are, fewer at the object's end."""
        options = {"Range": f"bytes={start}-{start + len(view) - 1}"}
        return call("read", url, lambda: self._get_into(url, options, view))

    def read_through(self, url: str, start: int, end: int, take: Callable[[memoryview], bool]) -> None:
        """Hand bytes [start, end) over as they come, in pieces that are there until `take` returns.

        Ends early where `take` says False, and at the object's end. After a fault it goes on behind what has come.
        """
        buffer, at = memoryview(bytearray(RECEIVED_BYTES)), start

        def go_on() -> None:
            nonlocal at
            bucket, key = _split(url)
            answer = self._call("get_object", bucket, Key=key, Range=f"bytes={at}-{end - 1}")
            with closing(answer["Body"]) as body:
                while at < end and (size := body.readinto(buffer)):
                    at += size
                    if not take(buffer[:size]):
                        return

        call("read", url, go_on)

    def size(self, url: str) -> int:
        """Size of an object; raises FileNotFoundError."""
        try:
            return int(self._request("look at", url, "head_object")["ContentLength"])
        except FileNotFoundError:
            self._check_bucket(url)  # a HEAD has no body that could tell a missing bucket from a missing key
            raise

    def create(self, url: str, content: bytes) -> str:
        """Write an object that must not exist yet; raises FileExistsError. `content` must be unique to its writer.

        Returns its ETag, which is not known (empty) where the answer was lost.
        After an unclear answer (lost, 409, 412) the object is read back: a lost answer may hide our own success, and
        the HTTP client below may have sent the request twice.
        """
        for attempt in range(1, max_attempts() + 1):
            try:
                return self._put(url, content, IfNoneMatch="*")
            except Exception as error:
                if not (retry.is_conflict(error) or retry.is_transient(error)):
                    raise retry.explain(error, "create", url) from error
                if self._holds(url, content):
                    return ""
                if attempt == max_attempts():
                    raise retry.explain(error, "create", url, attempt) from error
                retry.wait("create", url, error, attempt, max_attempts())
        return ""  # never, as the last attempt returns or raises

    def replace(self, url: str, content: bytes) -> None:
        """Write an object, in place of an older one if there is one."""
        call("write", url, lambda: self._put(url, content))

    def upload(
        self, url: str, chunks: Iterable[bytes | memoryview], part_bytes: int = PART_BYTES, resumes: bool = False
    ) -> None:
        """Write an object in parts of a size of at least 5 MiB, a few of them at a time in memory.

        Where it `resumes`, parts that an interrupted upload of the same object left are not sent again, and its own are
        left for the next one, unless the bytes turn out to be damaged.
        """
        parts = Parts(chunks, part_bytes)
        rest = iter(parts)
        first, second = next(rest, bytearray()), next(rest, None)
        if second is None:
            self.replace(url, bytes(first))
        else:
            self._upload_parts(url, parts, chain([first, second], rest), resumes)

    def copy_inside(self, source: str, target: str, size: int | None = None) -> bool:
        """Let the server copy an object, in parts of 1 GiB where it is larger than one request may copy."""
        origin = dict(zip(("Bucket", "Key"), _split(source), strict=True))
        size = self.size(source) if size is None else size
        if size <= LARGEST_COPY:
            self._request("copy", target, "copy_object", CopySource=origin)
            return True
        upload_id = self._request("start the copy to", target, "create_multipart_upload")["UploadId"]

        def copy(numbered: tuple[int, int]) -> dict[str, Any]:
            number, start = numbered
            span = f"bytes={start}-{min(start + COPY_PART, size) - 1}"
            answer = self._request(
                "copy", target, "upload_part_copy",
                UploadId=upload_id, PartNumber=number, CopySource=origin, CopySourceRange=span,
            )  # fmt: skip
            return {"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]}

        try:
            done = list(in_order(copy, enumerate(range(0, size, COPY_PART), 1), REQUESTS_IN_FLIGHT))
            self._complete(target, upload_id, done, size)
        except BaseException:
            self._abort_quietly(target, upload_id)
            raise
        return True

    def list_names(self, url: str) -> list[str]:
        """Names directly below a prefix, sorted; empty when there are none, an error when there is no bucket."""
        prefix = _prefix(url)
        names: set[str] = set()
        for page in self._pages(url, "list_objects_v2", OBJECT_MARKERS, Delimiter="/"):
            names.update(entry["Prefix"].removeprefix(prefix).strip("/") for entry in page.get("CommonPrefixes", ()))
            names.update(entry["Key"].removeprefix(prefix) for entry in page.get("Contents", ()))
        return sorted(names - {""})

    def walk(self, url: str) -> list[FileInfo]:
        """All objects below a prefix, by URLs that begin as the one asked for does (`s3a://`, a slash too many)."""
        root, prefix = url.rstrip("/"), _prefix(url)
        return [
            FileInfo(
                f"{root}/{entry['Key'].removeprefix(prefix)}".rstrip("/"),
                int(entry["Size"]),
                entry["LastModified"].timestamp(),
                _tag(entry),
            )
            for page in self._pages(url, "list_objects_v2", OBJECT_MARKERS)
            for entry in page.get("Contents", ())
        ]

    def delete(self, urls: Iterable[str]) -> None:
        """Delete objects, a thousand with one request; those that are gone already are skipped."""
        batches = (
            bucket[start : start + KEYS_OF_A_DELETE]
            for bucket in _by_bucket(urls)
            for start in range(0, len(bucket), KEYS_OF_A_DELETE)
        )
        for _ in in_order(self._delete_batch, batches, REQUESTS_IN_FLIGHT):
            pass

    def _delete_batch(self, urls: list[str]) -> None:
        """Objects of one bucket; single requests where there is one, or where a store knows no others."""
        left = [] if len(urls) == 1 else list(urls)
        if left:
            try:
                call("delete", left[0], lambda: self._delete_many(left))
            except StoreError as error:
                if retry.answer_code(error) not in NOT_OFFERED and retry.answer_status(error) not in (405, 501):
                    raise
            else:
                return
        for url in urls:
            self._request("delete", url, "delete_object")

    def _delete_many(self, left: list[str]) -> None:
        """One request; `left` keeps those that a retry has to name again. Raises the first refusal as botocore does."""
        keys = {_split(url)[1]: url for url in left}
        objects = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        refused = self._call("delete_objects", _split(left[0])[0], Delete=objects).get("Errors", [])
        refused = [entry for entry in refused if entry.get("Code") not in ABSENT]
        if refused:
            from botocore.exceptions import ClientError

            left[:] = [keys[entry["Key"]] for entry in refused if entry.get("Key") in keys] or left
            raise ClientError({"Error": refused[0]}, "DeleteObjects")

    def unfinished_uploads(self, url: str) -> list[tuple[FileInfo, str]]:
        """Multipart uploads below a prefix that were neither completed nor aborted, with their upload ids."""
        bucket = f"s3://{_split(url)[0]}"
        return [
            (FileInfo(join(bucket, entry["Key"]), 0, entry["Initiated"].timestamp()), entry["UploadId"])
            for page in self._pages(url, "list_multipart_uploads", UPLOAD_MARKERS)
            for entry in page.get("Uploads", ())
        ]

    def abort_upload(self, url: str, upload_id: str) -> None:
        """Throw away the parts of an unfinished upload."""
        try:
            self._request("abort the upload of", url, "abort_multipart_upload", UploadId=upload_id)
        except FileNotFoundError:
            retry.logger.debug("the upload of %s has ended already", url)

    def _upload_parts(self, url: str, parts: Parts, filled: Iterator[bytearray], resumes: bool) -> None:
        upload_id, there = self._begun(url) if resumes else ("", {})
        upload_id = upload_id or self._request("start the upload of", url, "create_multipart_upload")["UploadId"]
        sizes: list[int] = []
        pace = writing_to(f"s3://{_split(url)[0]}")

        def send(numbered: tuple[int, bytearray]) -> dict[str, Any]:
            number, part = numbered
            size = len(part)
            sizes.append(size)
            if number in there and there[number] == (size, hashlib.md5(part, usedforsecurity=False).hexdigest()):
                tag = f'"{there[number][1]}"'
            else:
                with pace.request():
                    tag = self._request("upload", url, "upload_part", UploadId=upload_id, PartNumber=number, Body=part)[
                        "ETag"
                    ]
                    pace.passed(size)
            parts.give_back(part)
            return {"PartNumber": number, "ETag": tag}

        try:
            done = list(as_done(send, enumerate(filled, 1), lambda: pace.width))
            self._complete(url, upload_id, sorted(done, key=lambda part: part["PartNumber"]), sum(sizes))
        except BaseException as error:
            if not resumes or isinstance(error, CorruptArtifactError):
                self._abort_quietly(url, upload_id)
            elif isinstance(error, FileNotFoundError):
                raise StoreError(
                    f"the upload of {url} must go on, but another process has ended it; run the same command again"
                ) from error
            raise

    def _begun(self, url: str) -> tuple[str, dict[int, tuple[int, str]]]:
        """The newest unfinished upload of an object, and size and ETag of its parts; an empty id where there is none.

        The ETag of a part is its MD5 but where the store encrypts with keys of the user's, and is no match there.
        """
        bucket, key = _split(url)
        answer = call("list", url, lambda: self._call("list_multipart_uploads", bucket, Prefix=key))
        found = [entry for entry in answer.get("Uploads", ()) if entry["Key"] == key]
        if not found:
            return "", {}
        upload_id = max(found, key=lambda entry: entry["Initiated"])["UploadId"]
        parts: dict[int, tuple[int, str]] = {}
        more: dict[str, Any] = {}
        while True:
            page = self._request("list the parts of", url, "list_parts", UploadId=upload_id, **more)
            parts |= {entry["PartNumber"]: (int(entry["Size"]), _tag(entry)) for entry in page.get("Parts", ())}
            if not page.get("IsTruncated"):
                return upload_id, parts
            more = {"PartNumberMarker": page["NextPartNumberMarker"]}

    def _complete(self, url: str, upload_id: str, parts: list[dict[str, Any]], size: int) -> None:
        try:
            self._request(
                "complete the upload of", url, "complete_multipart_upload",
                UploadId=upload_id, MultipartUpload={"Parts": parts},
            )  # fmt: skip
        except FileNotFoundError:
            # The upload is unknown: either aborted by somebody, or completed by a request whose answer was lost.
            if self.size(url) != size:
                raise

    def _abort_quietly(self, url: str, upload_id: str) -> None:
        try:
            self.abort_upload(url, upload_id)
        except Exception as error:  # the first error is the one to report; gc finds the parts
            retry.logger.warning("could not abort the upload of %s: %s", url, error)

    def _holds(self, url: str, content: bytes) -> bool:
        """Whether the object is there with this content; raises FileExistsError when it has another."""
        try:
            found = self.read(url)
        except FileNotFoundError:
            return False
        if found != content:
            raise FileExistsError(url)
        return True

    def _check_bucket(self, url: str) -> None:
        try:
            call("look at", url, lambda: self._call("head_bucket", _split(url)[0]))
        except FileNotFoundError as error:
            raise retry.missing_bucket("look at", url) from error

    def _pages(self, url: str, method: str, markers: dict[str, str], **options: Any) -> Iterator[dict[str, Any]]:
        """The pages of a listing; `markers` says which values of one answer go into the next request, and as what."""
        more: dict[str, Any] = {}
        while True:
            request = {"Prefix": _prefix(url), **options, **more}
            page = call("list", url, lambda request=request: self._call(method, _split(url)[0], **request))  # type: ignore[misc]
            yield page
            if not page.get("IsTruncated"):
                return
            more = {name: page[marker] for name, marker in markers.items() if page.get(marker)}

    def _get(self, url: str, options: dict[str, Any]) -> list[bytes]:
        bucket, key = _split(url)
        body = self._call("get_object", bucket, Key=key, **options)["Body"]
        with closing(body):
            return list(iter(lambda: body.read(PIECE_BYTES), b""))

    def _get_into(self, url: str, options: dict[str, Any], view: memoryview) -> int:
        bucket, key = _split(url)
        done = 0
        with closing(self._call("get_object", bucket, Key=key, **options)["Body"]) as body:
            while more := body.readinto(view[done : done + RECEIVED_BYTES]):
                done += more
        return done

    def _put(self, url: str, content: bytes, **options: Any) -> str:
        bucket, key = _split(url)
        return _tag(self._call("put_object", bucket, Key=key, Body=content, **options))

    def _request(self, action: str, url: str, method: str, **options: Any) -> dict[str, Any]:
        bucket, key = _split(url)
        return call(action, url, lambda: self._call(method, bucket, Key=key, **options))

    def _call(self, method: str, bucket: str, **options: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = getattr(self._client, method)(Bucket=bucket, **options)
        except Exception as error:
            if retry.answer_code(error) in ABSENT:
                raise FileNotFoundError(f"{bucket}/{options.get('Key', '')}") from error
            raise
        return answer


def _by_bucket(urls: Iterable[str]) -> Iterable[list[str]]:
    """URLs by their bucket, each once."""
    found: dict[str, list[str]] = {}
    for url in dict.fromkeys(urls):
        found.setdefault(_split(url)[0], []).append(url)
    return found.values()


def _tag(answer: dict[str, Any]) -> str:
    """The ETag in an answer, without its quotes."""
    return str(answer.get("ETag", "")).strip('"')


def _split(url: str) -> tuple[str, str]:
    bucket, _, key = url.split("://", 1)[1].partition("/")
    return bucket, key.strip("/")


def _prefix(url: str) -> str:
    key = _split(url)[1]
    return f"{key}/" if key else ""


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
    client = session.create_client("s3", config=Config(**config), **{**named, **settings.get("client_kwargs", {})})
    if client.meta.endpoint_url.startswith("http://") and "request_checksum_calculation" not in config:
        # What is sent is signed there, by its sha256, which a CRC of all bytes adds nothing to. Over https it is the
        # other way round, as in all of AWS's own programs: a CRC, and no signature of the content.
        client.meta.config.request_checksum_calculation = "when_required"
    return client
