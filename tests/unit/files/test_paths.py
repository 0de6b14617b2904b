from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiverd.contracts.errors import InvalidError
from hiverd.files.paths import clean, content_disposition, mount_of, names_below, path_from_url, query_value


@pytest.mark.parametrize(
    ("path", "cleaned"),
    [
        (b"", b"/"),
        (b"/", b"/"),
        (b"a/b", b"/a/b"),
        (b"//a//b/", b"/a/b"),
        (b"/a/./b/.", b"/a/b"),
        (b"/a/../b", b"/b"),
        (b"/../../etc/passwd", b"/etc/passwd"),
        (b"/a/b/../../..", b"/"),
        (b"/a/...", b"/a/..."),
        (b"/\xff\n", b"/\xff\n"),
    ],
)
def test_clean(path: bytes, cleaned: bytes) -> None:
    assert clean(path) == cleaned


@given(st.lists(st.sampled_from([b"..", b".", b"", b"a", b"\xff"])).map(b"/".join))
def test_cleaned_paths_never_climb(path: bytes) -> None:
    cleaned = clean(path)
    assert cleaned.startswith(b"/")
    assert not {b"..", b".", b""} & set(cleaned.split(b"/")[1:]) or cleaned == b"/"
    assert clean(cleaned) == cleaned


@pytest.mark.parametrize("path", [b"/a\0b", b"/" + b"a/" * 3000])
def test_impossible_paths_are_refused(path: bytes) -> None:
    with pytest.raises(InvalidError) as refused:
        clean(path)
    assert refused.value.field == "path"


BASE = "/sandbox/id/v1/key/file/"


@pytest.mark.parametrize(
    ("encoded", "decoded", "path"),
    [
        ("a/b", "a/b", b"a/b"),
        ("100%25/x%3Fy%23z", "100%/x?y#z", b"100%/x?y#z"),
        ("a%2525", "a%25", b"a%25"),
        ("a%2Fb", "a/b", b"a/b"),
        ("%E4%BD%A0", "你", "你".encode()),
        ("%FF", "�", b"\xff"),
        ("a+b", "a+b", b"a+b"),
        ("", "", b""),
        ("file/file", "file/file", b"file/file"),
    ],
)
def test_path_from_url(encoded: str, decoded: str, path: bytes) -> None:
    assert path_from_url((BASE + encoded).encode(), BASE + decoded, "file", 5) == path


def test_path_from_url_follows_the_rewritten_path() -> None:
    """Where something rewrote `path` and not `raw_path`, the route that Litestar chose counts."""
    assert path_from_url(b"/sandbox/key/v1/file/secret", BASE + "a%b", "file", 5) == b"a%b"


def test_path_from_url_without_path() -> None:
    assert path_from_url(BASE.rstrip("/").encode(), BASE.rstrip("/"), "file", 5) == b""


@pytest.mark.parametrize(
    ("query", "value"),
    [
        (b"path=/a%20b", b"/a b"),
        (b"path=/a+b", b"/a b"),
        (b"path=/a%2Bb", b"/a+b"),
        (b"path=%FF", b"\xff"),
        (b"path=", b""),
        (b"x=1&path=/first&path=/second", b"/first"),
        (b"paths=/a", None),
        (b"", None),
    ],
)
def test_query_value(query: bytes, value: bytes | None) -> None:
    assert query_value(query, "path") == value


@pytest.mark.parametrize(
    ("path", "header"),
    [
        (b"/a/b.txt", 'attachment; filename="b.txt"'),
        (b'/a"b\\c', 'attachment; filename="a\\"b\\\\c"'),
        (b"/a\r\nX: y", "attachment; filename=\"a__X: y\"; filename*=UTF-8''a%0D%0AX%3A%20y"),
        ("/é".encode(), "attachment; filename=\"_\"; filename*=UTF-8''%C3%A9"),
        (b"/\xff", "attachment; filename=\"_\"; filename*=UTF-8''%EF%BF%BD"),
    ],
)
def test_content_disposition(path: bytes, header: str) -> None:
    assert content_disposition(path) == header


@given(st.binary(max_size=40))
def test_content_disposition_is_always_one_header(name: bytes) -> None:
    header = content_disposition(b"/" + name)
    assert header.isascii()
    assert header.isprintable()


MOUNTS = (("/workspace", "local"), ("/workspace/data", "gcs"), ("/other/", "s3"))


@pytest.mark.parametrize(
    ("path", "mount"),
    [
        (b"/workspace", ("/workspace", "local")),
        (b"/workspace/x", ("/workspace", "local")),
        (b"/workspace/data/x", ("/workspace/data", "gcs")),
        (b"/workspaces", None),
        (b"/other/x", ("/other/", "s3")),
        (b"/", None),
    ],
)
def test_mount_of(path: bytes, mount: tuple[str, str] | None) -> None:
    assert mount_of(path, MOUNTS) == mount


def test_a_mount_at_the_root_holds_everything() -> None:
    assert mount_of(b"/etc/passwd", (("/", "local"),)) == ("/", "local")


@pytest.mark.parametrize(
    ("path", "names"),
    [(b"/", (b"workspace", b"other")), (b"/workspace", (b"data",)), (b"/workspace/data", ()), (b"/work", ())],
)
def test_names_below(path: bytes, names: tuple[bytes, ...]) -> None:
    assert names_below(path, MOUNTS) == names
