"""Which URLs a remote store takes, and what it says of others."""

import importlib.util
from typing import Any

import pytest

from hiver_snapshots.remote import RemoteStore
from hiver_snapshots.urls import location
from hiverd.contracts.errors import InvalidError, UnsupportedError
from support.snapshot_stores import options_for


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        ("gs://bucket", "gs"),
        ("gs://bucket/a/b/", "gs"),
        ("s3://bucket/prefix", "s3"),
        ("file:///srv/snapshots", "file"),
        ("file://localhost/srv", "file"),
    ],
)
def test_what_is_taken(url: str, scheme: str) -> None:
    found = location(url)
    assert (found.url, found.scheme) == (url.rstrip("/"), scheme)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "is missing"),
        ("bucket/prefix", "not a URL"),
        ("gs:bucket", "not a URL"),
        ("gs://", "names no place"),
        ("file:///", "names no place"),
        ("s3://bucket/../other", "names no place"),
        ("file://host/srv", "file:///absolute/path"),
        ("s3://[bucket/x", "not a URL"),
        ("simplecache::s3://bucket/x", "not a URL"),
        ("memory://x", "forgets everything"),
        ("nonsense://x/y", 'unknown scheme "nonsense"'),
    ],
)
def test_what_is_refused(url: str, said: str) -> None:
    with pytest.raises(InvalidError, match=said) as failed:
        location(url)
    assert failed.value.field == "snapshots.url"


@pytest.mark.parametrize(
    "url", ["s3://who:s3cret@bucket/x", "s3://s3cret@b/x", "gs://b/x?token=s3cret", "gs://b/x#s3cret"]
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidError, match="environment") as failed:
        RemoteStore(options_for(url=url))
    assert "s3cret" not in str(failed.value)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def absent(name: str, *rest: Any) -> Any:
        return None if name in {"gcsfs", "s3fs"} else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", absent)


@pytest.mark.parametrize(("url", "extra"), [("gs://b/x", "gcs"), ("gcs://b/x", "gcs"), ("s3://b/x", "s3")])
def test_a_missing_library_is_named_with_its_command(nothing_installed: None, url: str, extra: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"pip install 'hiver\[{extra}\]'"):
        location(url)


def test_without_fsspec_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(UnsupportedError, match="pip install fsspec"):
        location("file:///srv")


def test_a_scheme_whose_library_is_missing() -> None:
    if importlib.util.find_spec("paramiko") is not None:
        pytest.skip("it is there")
    with pytest.raises(UnsupportedError, match="paramiko"):
        location("sftp://host/x")
