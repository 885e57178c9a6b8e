"""What leaves the program without secrets, and what must stay as it is."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from urllib.parse import quote

import fsspec
import pytest

from checkpoints import paths, retry
from checkpoints.errors import StoreError
from checkpoints.redact import has_secret, is_redacted, redact, redact_urls, redact_values
from modularforge.errors import one_line
from modularforge.observe.discover import short_names

SIGNED = "https://bucket.s3.amazonaws.com/a.jsonl?X-Amz-Date={date}&X-Amz-Expires=60&X-Amz-Signature={sign}&part=2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pa55:w@host/x", "http://***@host/x"),
        ("cannot read http://user:pw@host:80/x?y=1, http://b@c", "cannot read http://***@host:80/x?y=1, http://***@c"),
        ("https://h/a?X-Amz-Signature=abc&part=1", "https://h/a?X-Amz-Signature=***&part=1"),
        ("https://h/a?sv=2020&sig=a%2Bb&name=c", "https://h/a?sv=***&sig=***&name=c"),
        ("https://h/a?AWSAccessKeyId=AK&Signature=s%3D&Expires=17", "https://h/a?AWSAccessKeyId=***&Signature=***&Expires=***"),
        ("url='https://h/a?access_token=t' failed", "url='https://h/a?access_token=***' failed"),
        ("/a?api_key=abc#top", "/a?api_key=***#top"),
        ("Protocol=https;AccountName=x;AccountKey=ab+c==;", "Protocol=https;AccountName=x;AccountKey=***"),
        ("http://a${B}:pw@host/x, http://u:${A}b@c", "http://***@host/x, http://***@c"),
        ("s3::http://me:pw@host/x", "s3::http://***@host/x"),
    ],
)  # fmt: skip
def test_secrets_in_urls_are_taken_out(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown, "what is redacted stays as it is"
    assert has_secret(text)
    assert not has_secret(shown)
    assert is_redacted(shown)


@pytest.mark.parametrize(
    "text",
    [
        "", "backbone.steps must be at least 1, but is 0; raise it", "s3://bucket/runs/a@b/manifest.json",
        "s3://bucket/key with = and ?", "https://h/a.jsonl?tokenizer=x&se=1&expires=5&page=2", "tokenizer=bpe",
        "data/token=3/part-0.parquet", "/home/me/secrets/api_key.txt", "runs/testing/minioadmin", "me@example.org",
        "a: http://h/x; b@c", "AKIAABCDEFGH", "https://h/data?download=true&revision=main", "http://[::1]:9000/bucket",
        "100000 tokens", "https://${USER}:${PASSWORD}@h/a", "ftp://me:${PW}@h/a", "https://h/a?token=${TOKEN}&x=1",
    ],
)  # fmt: skip
def test_ordinary_text_stays_as_it_is(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = {"AWS_ACCESS_KEY_ID": "AKIAABCDEFGH", "AWS_SECRET_ACCESS_KEY": "minioadmin", "MY_PASSWORD": "testing"}
    harmless |= {"TOKENIZERS_PARALLELISM": "manifest.json", "API_KEY_FILE": "api_key.txt", "HF_TOKEN": "a@b"}
    harmless["MAX_OUTPUT_TOKENS"] = "100000"
    for name, value in harmless.items():
        monkeypatch.setenv(name, value)
    assert redact(text) == text
    assert not has_secret(text)
    assert not is_redacted(text)


def test_a_url_that_is_signed_anew_leaves_the_same_text() -> None:
    one, two = SIGNED.format(date="20260101", sign="aaa"), SIGNED.format(date="20270202", sign="bbb")
    assert redact_urls(one) == redact_urls(two)
    assert redact_urls(one) != redact_urls(one.replace("part=2", "part=3"))


@pytest.mark.parametrize("name", ["AWS_SESSION_TOKEN", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MY_PASSWORD", "X_API_KEY"])
def test_secrets_of_the_environment_are_taken_out_in_every_quoting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "Pl4nted\nh'alf/\u00e9"
    monkeypatch.setenv(name, secret)
    for text in (secret, repr(secret), f"{secret.encode()!r}"[:10], json.dumps(secret), quote(secret, safe="")):
        assert "Pl4nted" not in redact(text)
        assert "alf" not in redact(text)
    assert redact("only h'alf/\u00e9 of it") == "only *** of it"


def test_passwords_of_an_endpoint_and_of_fsspec_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:Pl4nted@host")
    monkeypatch.setitem(
        fsspec.config.conf, "s3", {"secret": "s3cretOfS3", "client_kwargs": {"aws_session_token": "t0kenOfS3"}}
    )
    assert redact("Pl4nted s3cretOfS3 t0kenOfS3") == "*** *** ***"
    monkeypatch.setitem(fsspec.config.conf, "https", {"client_kwargs": {"headers": {"Authorization": "Bearer b3arer"}}})
    monkeypatch.setenv("AZURE_STORAGE_KEY", "k3yOfAzure")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountName=x;AccessSecret oth3rKey")
    assert redact("b3arer k3yOfAzure oth3rKey") == "*** *** ***"


def test_nested_values_and_every_error_for_users_are_redacted() -> None:
    values = {"http://a:b@c": ["http://a:b@c", 1, None, ("x", 0.5)]}
    assert redact_values(values) == {"http://***@c": ["http://***@c", 1, None, ["x", 0.5]]}
    error = StoreError("cannot read http://a:b@c")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "cannot read http://***@c"
    assert repr(error) == "StoreError('cannot read http://***@c')"


def test_a_secret_that_is_cut_is_taken_out_before() -> None:
    assert one_line(f"{'x' * 180} http://user:{'Pl4nted' * 5}@host/a") == f"{'x' * 180} http://***@host/a"


def test_errors_that_take_a_url_apart_show_no_part_of_its_secret() -> None:
    url = "sftp://user:Pl4nted@host/run"
    for error in (PermissionError("no"), OSError("odd"), ConnectionError("gone")):
        assert "Pl4nted" not in str(retry.explain(error, "read", url))
    assert "Pl4nted" not in retry.place(url) + str(retry.missing_bucket("read", url))
    assert short_names([url, "sftp://user:Pl4nted@other/run"]) == {
        url: "***@host/run", "sftp://user:Pl4nted@other/run": "***@other/run",
    }  # fmt: skip


@pytest.mark.parametrize("act", [paths.exists, paths.list_folder, paths.filesystem])
def test_keys_before_a_bucket_are_refused_and_not_quoted(act: Callable[[str], object]) -> None:
    with pytest.raises(
        StoreError, match=r"^s3://\*\*\*@bucket/run must begin with the name of a bucket, but has a user"
    ):
        act("s3://user:Pl4nted@bucket/run")


@pytest.mark.parametrize("act", [paths.exists, paths.list_folder, paths.filesystem])
def test_a_saved_url_without_its_secret_is_refused_when_it_must_be_read(act: Callable[[str], object]) -> None:
    with pytest.raises(StoreError, match=r"\*\*\*@host/run must be a whole URL, but its secret was not saved.*again"):
        act("sftp://***@host/run")
