"""What the backends of buckets decide without a service."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import sys
from collections.abc import AsyncIterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from hiver_storage.azure import AzureFileSystem
from hiver_storage.content import Parts, whole
from hiver_storage.failures import TRANSIENT, Patience, of_connection, of_status, persist
from hiver_storage.gcs import GcsFileSystem
from hiver_storage.keys import Keys, decode_target, encode_target
from hiver_storage.names import Names
from hiver_storage.object_store import Body
from hiver_storage.ordering import Once
from hiver_storage.s3 import S3FileSystem
from hiverd import plugins
from hiverd.contracts.errors import InvalidError, UnsupportedError
from hiverd.contracts.filesystem import FileSystem, VersionConflictError

S3 = {"s3_bucket": "b", "s3_access_key_id": "id", "s3_secret_access_key": "secret"}
AZURE = {"azure_container": "box", "azure_account": "account", "azure_account_key": "c2VjcmV0"}
GCS = {"gcs_bucket": "b"}
SECRET = "the-secret"


def key_file(**changes: str) -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    document = {
        "type": "service_account",
        "private_key": pem,
        "client_email": "a@example",
        "token_uri": "http://127.0.0.1/",
    }
    return json.dumps(document | changes)


OTHER_KIND = key_file(type="external_account")
"""Such a file can name programs to run and files to read."""


@pytest.mark.parametrize(
    ("backend", "config"),
    [
        (S3FileSystem, S3),
        (S3FileSystem, {**S3, "s3_prefix": "/a/b/", "s3_region": "eu-north-1", "s3_use_path_style": True}),
        (S3FileSystem, {**S3, "s3_session_token": "t", "s3_endpoint": "http://127.0.0.1:9000/"}),
        (AzureFileSystem, AZURE),
        (AzureFileSystem, {"azure_container": "box", "azure_account": "account", "azure_sas_token": "?sv=1&sig=x"}),
        (
            AzureFileSystem,
            {"azure_container": "box", "azure_sas_token": "sig=x", "azure_endpoint": "https://a.example"},
        ),
        (AzureFileSystem, {"azure_container": "box", "azure_connection_string": "AccountName=a1b;AccountKey=c2U="}),
        (GcsFileSystem, GCS),
        (GcsFileSystem, {**GCS, "gcs_service_account_json": key_file()}),
    ],
)
async def test_configurations_that_are_taken(backend: type[FileSystem], config: dict[str, Any]) -> None:
    files = backend({"mount": "/data", **config})
    assert (await files.stat("/")).is_dir
    await files.close()


@pytest.mark.parametrize(
    ("backend", "config", "field"),
    [
        (S3FileSystem, {**S3, "s3_bucket": ""}, "s3_bucket"),
        (S3FileSystem, {**S3, "s3_access_key_id": None}, "s3_access_key_id"),
        (S3FileSystem, {**S3, "s3_secret_access_key": 7}, "s3_secret_access_key"),
        (S3FileSystem, {**S3, "s3_secret_access_key": f"{SECRET}\r\nX: y"}, "s3_secret_access_key"),
        (S3FileSystem, {**S3, "s3_prefix": "a/../b"}, "s3_prefix"),
        (S3FileSystem, {**S3, "s3_prefix": "a//b"}, "s3_prefix"),
        (S3FileSystem, {**S3, "s3_endpoint": f"https://user:{SECRET}@host"}, "s3_endpoint"),
        (S3FileSystem, {**S3, "s3_endpoint": "file:///etc"}, "s3_endpoint"),
        (S3FileSystem, {**S3, "s3_endpoint": "http://[bad"}, "s3_endpoint"),
        (S3FileSystem, {**S3, "s3_use_path_style": "yes"}, "s3_use_path_style"),
        (AzureFileSystem, {**AZURE, "azure_container": None}, "azure_container"),
        (AzureFileSystem, {**AZURE, "azure_account": None}, "azure_account"),
        (AzureFileSystem, {**AZURE, "azure_account": "evil.example/"}, "azure_account"),
        (AzureFileSystem, {**AZURE, "azure_account_key": f"{SECRET}!"}, "azure_account_key"),
        (AzureFileSystem, {**AZURE, "azure_account_key": None}, "azure_account_key"),
        (AzureFileSystem, {**AZURE, "azure_account_key": None, "azure_sas_token": SECRET}, "azure_sas_token"),
        (AzureFileSystem, {**AZURE, "azure_connection_string": SECRET}, "azure_connection_string"),
        (AzureFileSystem, {**AZURE, "azure_connection_string": f"AccountKey={SECRET}"}, "azure_connection_string"),
        (GcsFileSystem, {}, "gcs_bucket"),
        (GcsFileSystem, {**GCS, "gcs_prefix": ".."}, "gcs_prefix"),
        (GcsFileSystem, {**GCS, "gcs_service_account_json": SECRET}, "gcs_service_account_json"),
        (GcsFileSystem, {**GCS, "gcs_service_account_json": "[]"}, "gcs_service_account_json"),
        (GcsFileSystem, {**GCS, "gcs_service_account_json": key_file(private_key=SECRET)}, "gcs_service_account_json"),
        (GcsFileSystem, {**GCS, "gcs_service_account_json": OTHER_KIND}, "gcs_service_account_json"),
    ],
)
def test_configurations_that_are_refused(backend: type[FileSystem], config: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidError) as caught:
        backend({"mount": "/data", **config})
    assert caught.value.field == field
    assert field in caught.value.message
    assert SECRET not in caught.value.message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(("name", "library"), [("s3", "s3fs"), ("gcs", "gcsfs"), ("azure", "azure.storage.blob")])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, name: str, library: str) -> None:
    point: EntryPoint = plugins._found("hiver.filesystems")[name]
    ours = {point.module, f"{point.module}_store"}
    for module in [m for m in sys.modules if m in ours or f"{m}.".startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UnsupportedError, match=rf"pip install 'hiver\[{name}\]'"):
        plugins.file_system_class(name)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("/a", "team/a"),
        ("/a/b c", "team/a/b c"),
        ("/../other/x", "team/other/x"),
        ("/a/../../x", "team/x"),
        ("/./a//b/", "team/a/b"),
        ("/..\\other", "team/..\uf05cother"),
    ],
)
def test_no_path_leads_out_of_the_prefix(path: str, key: str) -> None:
    keys = Keys("team", Names("\\"))
    assert keys.file(path) == key
    assert keys.directory(path) == f"{key}/"


def test_the_root_is_no_file_and_long_keys_are_refused() -> None:
    keys = Keys("team", Names(""))
    assert keys.directory("/") == "team/"
    assert Keys("", Names("")).directory("/..") == ""
    for path, number in (("/", errno.EISDIR), ("/..", errno.EISDIR), ("/" + "é" * 512, errno.ENAMETOOLONG)):
        with pytest.raises(OSError, match=os.strerror(number)):
            keys.file(path)


def test_names_of_foreign_keys_that_are_no_files_are_not_shown() -> None:
    keys = Keys("", Names("\\", last="."))
    assert [keys.shown(name) for name in ("", ".", "..", ".\uf02e", "a\0", "a.", "a\uf02e")] == [
        *[None] * 5,
        "a.",
        "a.",
    ]


@pytest.mark.parametrize("target", ["a", "/a b", "%41", "ü", "\udcff", "a\nb", ""])
def test_targets_become_ascii_and_come_back(target: str) -> None:
    assert encode_target(target).isascii()
    assert decode_target(encode_target(target)) == target


def test_each_name_once_whatever_stands_for_it() -> None:
    once = Once()
    keys = [("a", "a"), ("a b", "a b"), ("a.symlink", "a"), ("a/", "a"), ("b.symlink", "b"), ("b/", "b"), ("c", "c")]
    assert [key for key, name in keys if once.admits(key, name)] == ["a", "a b", "b.symlink", "c"]


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


async def test_parts_have_one_size() -> None:
    assert [part async for part in Parts(pieces(b"ab", b"", b"cdefg", b"h"), 8, 3)] == [b"abc", b"def", b"gh"]
    assert [part async for part in Parts(pieces(b"abcdef"), 6, 3)] == [b"abc", b"def"]


@pytest.mark.parametrize("size", [5, 7])
async def test_of_content_of_another_size_the_last_part_is_never_told(size: int) -> None:
    parts = aiter(Parts(pieces(b"abc", b"def"), size, 3))
    if size > 5:
        assert await anext(parts) == b"abc"
    with pytest.raises(OSError, match=f"not {size} bytes"):
        await anext(parts)
    with pytest.raises(OSError, match=f"not {size} bytes"):
        await whole(pieces(b"abc", b"def"), size)


QUICK = Patience(attempts=3, first_seconds=0.001)


def itself(error: Exception) -> OSError | None:
    return error if isinstance(error, OSError) else None


@pytest.mark.parametrize(
    ("status", "code", "kind", "number"),
    [
        (404, "NoSuchKey", FileNotFoundError, errno.ENOENT),
        (401, "", PermissionError, errno.EACCES),
        (403, "AccessDenied", PermissionError, errno.EACCES),
        (412, "", VersionConflictError, errno.EEXIST),
        (429, "", OSError, errno.EAGAIN),
        (500, "", OSError, errno.EIO),
        (503, "SlowDown", OSError, errno.EAGAIN),
        (400, "", OSError, errno.EINVAL),
    ],
)
def test_statuses(status: int, code: str, kind: type[OSError], number: int) -> None:
    error = of_status(status, code)
    assert isinstance(error, kind)
    assert error.errno == number
    assert code in str(error)


def test_texts_of_libraries_are_not_repeated() -> None:
    assert SECRET not in str(of_connection(ConnectionError(f"https://host/?sig={SECRET}")))
    assert "sig=" not in str(of_status(403, f"x?sig={SECRET}&a"))


async def test_what_may_pass_is_repeated_a_few_times(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "hiver_storage")
    tries = 0

    async def call() -> str:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise ConnectionResetError(f"https://host/?sig={SECRET}")
        return "done"

    def translate(error: Exception) -> OSError | None:
        return of_connection(error) if isinstance(error, OSError) else None

    assert await persist(QUICK, translate, call) == "done"
    assert tries == 3
    assert "attempt 2" in caplog.text
    assert SECRET not in caplog.text
    tries = -10
    with pytest.raises(ConnectionResetError) as caught:
        await persist(QUICK, translate, call)
    assert (tries, caught.value.errno in TRANSIENT) == (-7, True)
    assert caught.value.__context__ is None


async def test_what_will_not_pass_is_not_repeated() -> None:
    tries = 0

    async def call() -> None:
        nonlocal tries
        tries += 1
        raise of_status(403) if tries == 1 else KeyError

    with pytest.raises(PermissionError):
        await persist(QUICK, itself, call)
    with pytest.raises(KeyError):
        await persist(QUICK, itself, call)
    assert tries == 2


async def test_an_attempt_has_an_end() -> None:
    async def call() -> None:
        await asyncio.Event().wait()

    patience = Patience(attempts=2, first_seconds=0.001, request_seconds=0.01)
    with pytest.raises(TimeoutError) as caught:
        await persist(patience, of_connection, call)
    assert caught.value.errno == errno.ETIMEDOUT


async def test_nothing_is_begun_again_after_the_deadline() -> None:
    tries = 0

    async def call() -> None:
        nonlocal tries
        tries += 1
        raise of_status(503)

    with pytest.raises(OSError, match="503"):
        await persist(Patience(first_seconds=1, deadline_seconds=0.1), itself, call)
    assert tries == 1


class ShortBody(Body):
    """Ends two bytes early, as of a library that does not notice a cut connection."""

    version = "1"
    size = 10

    async def pieces(self) -> AsyncIterator[bytes]:
        yield b"12345678"

    async def close(self) -> None:
        pass


async def test_an_answer_that_is_short_is_never_taken_for_the_whole() -> None:
    files = S3FileSystem({"mount": "/data", **S3})
    files.patience = QUICK
    asked = []

    async def fetch(key: str, offset: int, size: int | None, version: str | None) -> Body:
        asked.append((offset, size, version))
        return ShortBody()

    files.store.fetch = fetch  # type: ignore[method-assign]
    reading = files.read("/file", 3, None)
    assert [await anext(reading), await anext(reading)] == [b"12345678"] * 2
    assert asked == [(3, None, None), (11, None, "1")]
