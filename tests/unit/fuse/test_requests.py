"""The protocol without a kernel: what no well-behaved kernel sends, and what one could not show."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiverd.fuse import abi
from unit.fuse.conftest import SERVER, Kernel, MakeKernel


@contextmanager
def temporary_kernel() -> Iterator[Kernel]:
    with TemporaryDirectory() as folder:
        (Path(folder) / "f").write_text("x")
        (Path(folder) / "d").mkdir()
        kernel = Kernel(Path(folder), [("/**", "rw"), ("/d/no", "deny")])
        try:
            yield kernel
        finally:
            kernel.close()


_operations = st.one_of(st.integers(0, 60), st.integers(0, 2**32 - 1))
_bodies = st.one_of(
    st.binary(max_size=120),
    st.lists(
        st.sampled_from([b"f\0", b"d\0", b"..\0", b"a/b\0", b"\0", bytes(8), b"\x01" + bytes(7)]), max_size=20
    ).map(b"".join),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(_operations, st.integers(0, 5), _bodies), max_size=20))
def test_any_request_has_one_answer_and_the_mount_goes_on(requests: list[tuple[int, int, bytes]]) -> None:
    logging.disable(logging.ERROR)
    try:
        with temporary_kernel() as kernel:
            for operation, node, body in requests:
                head = abi.IN_HEADER.pack(40 + len(body), operation, 7, node, os.getuid(), os.getgid(), 1, 0, 0)
                answer = kernel.send(head + body)
                assert (answer is None) == (operation in {abi.FORGET, abi.BATCH_FORGET})
                if answer is not None:
                    assert -512 < answer[0] <= 0
            if not kernel.tree.root.children.get(b"f"):
                kernel.tree.all_nodes()
            kernel.ask(abi.GETATTR, body=abi.GETATTR_IN.pack(0, 0, 0))
    finally:
        logging.disable(logging.NOTSET)


@given(st.binary(max_size=39))
def test_what_is_no_request_is_not_answered(request: bytes) -> None:
    with temporary_kernel() as kernel:
        assert kernel.send(request) is None


def test_a_request_that_is_cut_short_is_an_error(kernel: MakeKernel) -> None:
    head = abi.IN_HEADER.pack(80, abi.GETATTR, 9, 1, 0, 0, 1, 0, 0)
    assert kernel().send(head) == (-5, b"")


def test_defects_are_logged_once(kernel: MakeKernel, caplog: pytest.LogCaptureFixture) -> None:
    one = kernel()
    for _ in range(3):
        assert one.error(abi.READ, body=b"short") == "EIO"
    assert len(caplog.records) == 1
    assert one.error(abi.READ, body=abi.READ_IN.pack(999999, 0, 1, 0, 0, 0, 0)) == "EBADF"


@pytest.mark.parametrize("name", [b"..", b".", b"", b"a/b", b"/", b"a\0b"])
def test_a_name_is_one_step(kernel: MakeKernel, name: bytes, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    assert kernel().error(abi.LOOKUP, body=name + b"\0") == "EINVAL"


def test_links_of_the_folder_are_not_followed(kernel: MakeKernel, tmp_path: Path) -> None:
    one = kernel()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "f").write_text("secret")
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "folder" / "file").symlink_to(tmp_path / "outside" / "f")
    link, file = one.walk("link"), one.walk("file")
    assert one.error(abi.LOOKUP, link, b"f\0") == "ENOTDIR"
    assert one.error(abi.OPEN, file, abi.OPEN_IN.pack(os.O_RDONLY, 0)) == "ELOOP"
    assert one.error(abi.OPENDIR, link, abi.OPEN_IN.pack(0, 0)) == "ENOTDIR"


def test_a_directory_that_became_a_link_is_not_followed(kernel: MakeKernel, tmp_path: Path) -> None:
    one = kernel(bound=1)
    folder = tmp_path / "folder"
    for name in ("d", "e"):
        (folder / name).mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "f").write_text("secret")
    directory = one.walk("d")
    (folder / "d").rmdir()
    (folder / "d").symlink_to(tmp_path / "outside")
    assert one.error(abi.LOOKUP, directory, b"f\0") == "ENOTDIR"
    assert (tmp_path / "outside" / "f").exists()


def test_a_directory_that_became_another_is_not_taken_for_it(kernel: MakeKernel, tmp_path: Path) -> None:
    one = kernel()
    folder = tmp_path / "folder"
    (folder / "d").mkdir()
    directory = one.walk("d")
    (folder / "d").rename(folder / "moved")
    (folder / "d").mkdir()
    (folder / "d" / "f").write_text("another directory")
    assert one.error(abi.LOOKUP, directory, b"f\0") == "ESTALE"


def test_what_is_below_a_renamed_directory_has_its_new_path(kernel: MakeKernel, tmp_path: Path) -> None:
    one = kernel([("/**", "rw"), ("/x", "deny")])
    (tmp_path / "folder" / "a" / "b").mkdir(parents=True)
    directory = one.walk("a/b")
    _node, handle = one.create(directory, "f")
    one.rename(abi.ROOT_ID, "a", abi.ROOT_ID, "z")
    one.write(handle, b"x")
    one.ask(abi.MKDIR, directory, abi.MKDIR_IN.pack(0o755, 0) + b"d\0")
    assert [(event.path, event.operation) for event in one.events[-2:]] == [("/z/b/f", "write"), ("/z/b/d", "write")]


def test_versions(kernel: MakeKernel) -> None:
    one = kernel()
    assert one.error(abi.INIT, 0, abi.INIT_IN.pack(7, 30, 0, 0)) == "EPROTO"
    newer = abi.INIT_OUT.unpack(one.ask(abi.INIT, 0, abi.INIT_IN.pack(8, 0, 0, 0)))
    assert newer[0] == 7
    offered = (1 << 32) - 1
    agreed = abi.INIT_OUT.unpack(
        one.ask(abi.INIT, 0, struct.pack("=IIIII", 7, 45, 131072, offered, abi.HAS_EXPIRE_ONLY))
    )
    assert (agreed[1], agreed[6], agreed[8]) == (38, 1 << 20, 256)
    forbidden = 1 << 1 | 1 << 4 | 1 << 10 | 1 << 16  # POSIX_LOCKS, EXPORT_SUPPORT, FLOCK_LOCKS, WRITEBACK_CACHE
    assert not agreed[3] & forbidden
    assert one.dispatcher.expires_entries
    old = abi.INIT_OUT.unpack(one.ask(abi.INIT, 0, abi.INIT_IN.pack(7, 31, 131072, abi.ASYNC_READ)))
    assert (old[1], old[3]) == (31, abi.ASYNC_READ)
    assert not one.dispatcher.expires_entries


def test_the_kernel_stops_asking_for_what_we_do_not_do(kernel: MakeKernel) -> None:
    one = kernel()
    for operation in (25, 21, 22, 23, 24, 31, 34, 36, 40):  # FLUSH, *XATTR, GETLK, ACCESS, INTERRUPT, POLL
        assert one.error(operation, body=bytes(64)) == "ENOSYS"


def test_nodes_are_counted_and_forgotten(kernel: MakeKernel, tmp_path: Path) -> None:
    one = kernel()
    (tmp_path / "folder" / "d").mkdir()
    (tmp_path / "folder" / "d" / "f").write_text("x")
    file = one.walk("d/f")
    directory = one.walk("d")
    assert one.walk("d/f") == file
    one.ask(abi.FORGET, directory, abi.FORGET_IN.pack(3))
    assert one.error(abi.LOOKUP, directory, b"f\0") == "ESTALE"
    assert one.walk("d") == directory, "what is below it keeps its place"
    one.ask(
        abi.BATCH_FORGET,
        0,
        abi.BATCH_FORGET_IN.pack(2, 0) + abi.FORGET_ONE.pack(file, 2) + abi.FORGET_ONE.pack(directory, 1),
    )
    assert len(one.tree) == 1
    assert one.tree.root.children == {}


def test_another_object_under_a_name_is_another_node(kernel: MakeKernel, tmp_path: Path) -> None:
    one = kernel()
    path = tmp_path / "folder" / "f"
    path.write_text("x")
    first = one.walk("f")
    path.rename(tmp_path / "folder" / "g")
    path.write_text("y")
    assert one.walk("f") != first
    assert one.error(abi.OPEN, first, abi.OPEN_IN.pack(os.O_RDONLY, 0)) == "ENOENT"


def test_pages_of_a_mapping_are_judged_whoever_opened_the_file(kernel: MakeKernel, tmp_path: Path) -> None:
    """The kernel takes any handle for them, also one of the server."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "f").write_text("fixed")
    one = kernel([("/**", "ro")])
    refused: list[object] = []
    one.core.pages_refused = refused.append
    handle = one.open(one.walk("f"), os.O_RDWR, pid=SERVER)
    with pytest.raises(OSError, match="Read-only"):
        one.write(handle, b"X", write_flags=abi.WRITE_CACHE)
    assert len(refused) == 1
    assert one.write(handle, b"X") == 1
    assert (tmp_path / "folder" / "f").read_text() == "Xixed"


def test_pages_of_a_mapping_are_not_appended(kernel: MakeKernel, tmp_path: Path) -> None:
    one = kernel()
    _node, handle = one.create(abi.ROOT_ID, "f", os.O_RDWR | os.O_APPEND)
    one.write(handle, b"0123456789", flags=os.O_APPEND)
    one.write(handle, b"X", 3, flags=os.O_APPEND, write_flags=abi.WRITE_CACHE)
    one.write(handle, b"end", 0, flags=os.O_APPEND)
    assert (tmp_path / "folder" / "f").read_bytes() == b"012X456789end"


def test_what_the_server_sees_of_denied_things_is_not_cached(kernel: MakeKernel, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("open", "no"):
        (tmp_path / "folder" / name).write_text("x")
    one = kernel([("/**", "rw"), ("/no", "deny")])
    validity = {}
    for name in ("open", "no"):
        entry = abi.ENTRY_OUT.unpack(one.ask(abi.LOOKUP, body=name.encode() + b"\0", pid=SERVER))
        attributes = abi.ATTR_OUT.unpack(one.ask(abi.GETATTR, entry[0], abi.GETATTR_IN.pack(0, 0, 0), pid=SERVER))
        validity[name] = (entry[2], entry[3], attributes[0])
    assert validity == {"open": (3600, 3600, 3600), "no": (0, 0, 0)}
    opened = abi.OPEN_OUT.unpack(one.ask(abi.OPEN, one.walk("no", pid=SERVER), abi.OPEN_IN.pack(0, 0), pid=SERVER))
    assert opened[1] == abi.FOPEN_DIRECT_IO
    assert one.events == []


def test_descriptors_of_directories_are_bounded_and_right(kernel: MakeKernel, tmp_path: Path) -> None:
    one = kernel(bound=3)
    for number in range(40):
        path = tmp_path / "folder" / f"a{number}" / "b" / "c"
        path.mkdir(parents=True)
        (path / "f").write_text(f"{number}")
    before = len(os.listdir("/proc/self/fd"))
    for number in (*range(40), *reversed(range(40))):
        handle = one.open(one.walk(f"a{number}/b/c/f"))
        assert one.read(handle) == f"{number}".encode()
        one.release(handle)
        assert len(os.listdir("/proc/self/fd")) < before + 12
