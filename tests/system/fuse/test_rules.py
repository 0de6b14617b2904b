"""Rules hold whatever road is taken, also for root and also when they change under those who have things open."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.fuse_mount import FuseFixture
from system.fuse.conftest import RULES, MakeMount
from system.fuse.scenarios import opened, tried

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    def state() -> dict[str, str]:
        return {str(path): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}

    before = state()
    yield
    assert state() == before


def test_what_is_denied_does_not_exist(governed: FuseFixture) -> None:
    at = governed.path
    assert sorted(os.listdir(at)) == ["docs", "src"]
    assert sorted(os.listdir(at / "src")) == ["a", "app"]
    assert os.listdir(at / "src/app") == []
    for name in ("secret", "secret/c", "secret/deep/d", ".env", "src/app/.env"):
        path = at / name
        ways: list[Callable[[], object]] = [
            lambda path=path: os.stat(path),  # type: ignore[misc]
            lambda path=path: os.open(path, os.O_RDONLY),  # type: ignore[misc]
            lambda path=path: os.open(path, os.O_PATH),  # type: ignore[misc]
            lambda path=path: os.open(path, os.O_WRONLY),  # type: ignore[misc]
            lambda path=path: os.listdir(path),  # type: ignore[misc]
            lambda path=path: os.readlink(path),  # type: ignore[misc]
            lambda path=path: os.chmod(path, 0o777),  # type: ignore[misc]
            lambda path=path: os.truncate(path, 0),  # type: ignore[misc]
            lambda path=path: os.unlink(path),  # type: ignore[misc]
            lambda path=path: os.rename(path, at / "mine"),  # type: ignore[misc]
            lambda path=path: os.link(path, at / "mine"),  # type: ignore[misc]
        ]
        with unchanged(governed.folder):
            assert [tried(way) for way in ways] == ["ENOENT"] * len(ways), name


def test_nothing_can_be_put_where_it_is_denied(governed: FuseFixture) -> None:
    at = governed.path
    for name in ("secret", ".env", "src/.env"):
        with unchanged(governed.folder):
            assert tried(os.open, at / name, os.O_CREAT | os.O_WRONLY) == "EROFS"
            assert tried(os.mkdir, at / name) == "EROFS"
            assert tried(os.symlink, "x", at / name) == "EROFS"
            assert tried(os.mkfifo, at / name) == "EROFS"
            assert tried(os.rename, at / "src/a", at / name) == "EROFS"
            assert tried(os.link, at / "src/a", at / name) in {"EPERM", "EROFS"}
    assert tried(os.mkdir, at / "secret/new") == "ENOENT"


def test_read_only_reads_and_nothing_else(governed: FuseFixture) -> None:
    at = governed.path
    with unchanged(governed.folder):
        assert (at / "docs/b").read_text() == "content of docs/b"
        assert os.listdir(at / "docs") == ["b"]
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
            assert tried(os.open, at / "docs/b", flags) == "EROFS"
        for way in (
            lambda: os.open(at / "docs/new", os.O_CREAT | os.O_WRONLY),
            lambda: os.mkdir(at / "docs/new"),
            lambda: os.symlink("x", at / "docs/new"),
            lambda: os.unlink(at / "docs/b"),
            lambda: os.rmdir(at / "docs"),
            lambda: os.truncate(at / "docs/b", 0),
            lambda: os.chmod(at / "docs/b", 0o777),
            lambda: os.chown(at / "docs/b", 1, 1),
            lambda: os.utime(at / "docs/b"),
            lambda: os.rename(at / "docs/b", at / "src/b"),
            lambda: os.rename(at / "src/a", at / "docs/b"),
            lambda: os.rename(at / "src/a", at / "docs/new"),
            lambda: os.rename(at / "docs", at / "mine"),
        ):
            assert tried(way) == "EROFS"


def test_symbolic_links_do_not_lead_round_a_rule(governed: FuseFixture) -> None:
    at = governed.path
    (at / "link").symlink_to("secret/c")
    (at / "absolute").symlink_to(at / "secret")
    (at / "write").symlink_to("docs/b")
    assert tried(os.open, at / "link", os.O_RDONLY) == "ENOENT"
    assert tried(os.listdir, at / "absolute") == "ENOENT"
    assert tried(os.open, at / "write", os.O_WRONLY) == "EROFS"
    os.symlink("/etc", governed.folder / "src" / "host")
    assert tried(os.mkdir, at / "src" / "host", 0o700) == "EEXIST"
    assert os.readlink(at / "src" / "host") == "/etc"


def test_directories_held_open_do_not_lead_round_a_rule(mount: MakeMount, folder: Path) -> None:
    governed = mount([("/**", "rw")], folder=folder)
    with opened(governed.path / "secret", os.O_RDONLY) as held, opened(governed.path / "secret", os.O_PATH) as path:
        assert sorted(os.listdir(held)) == ["c", "deep"]
        governed.set_rules(*RULES)
        for fd in (held, path):
            assert tried(os.open, "c", os.O_RDONLY, dir_fd=fd) == "ENOENT"
            assert tried(os.stat, "deep/d", dir_fd=fd) == "ENOENT"
            assert tried(os.listdir, f"/proc/self/fd/{fd}") == "ENOENT"
            assert tried(os.open, "new", os.O_CREAT | os.O_WRONLY, dir_fd=fd) in {"ENOENT", "EROFS"}
            assert tried(os.rename, "c", governed.path / "mine", src_dir_fd=fd) == "ENOENT"
        os.lseek(held, 0, os.SEEK_SET)
        assert tried(os.listdir, held) == "ENOENT"


def test_bind_mounts_from_before_do_not_lead_round_a_rule(mount: MakeMount, folder: Path, tmp_path: Path) -> None:
    governed = mount([("/**", "rw")], folder=folder)
    other = tmp_path / "bound"
    other.mkdir()
    subprocess.run(["mount", "--bind", governed.path / "secret", other], check=True)
    try:
        assert (other / "c").read_text() == "content of secret/c"
        governed.set_rules(*RULES)
        assert tried(os.open, other / "c", os.O_RDONLY) == "ENOENT"
        assert tried(os.listdir, other) == "ENOENT"
    finally:
        subprocess.run(["umount", other], check=True)


def test_open_files_are_judged_again(mount: MakeMount, folder: Path) -> None:
    governed = mount([("/**", "rw")], folder=folder)
    secret, document = governed.path / "secret/c", governed.path / "docs/b"
    with opened(secret, os.O_RDWR) as hidden, opened(document, os.O_RDWR) as fixed:
        assert os.pread(hidden, 99, 0) == b"content of secret/c"
        assert os.pread(fixed, 99, 0) == b"content of docs/b"
        governed.set_rules(*RULES)
        with unchanged(folder):
            assert tried(os.pread, hidden, 99, 0) == "ENOENT"
            assert tried(os.pwrite, hidden, b"x", 0) == "EROFS"
            assert tried(os.fstat, hidden) == "ENOENT"
            assert tried(os.open, f"/proc/self/fd/{hidden}", os.O_RDONLY) == "ENOENT"
            assert tried(os.pread, fixed, 99, 0) == b"content of docs/b".hex()
            assert tried(os.pwrite, fixed, b"x", 0) == "EROFS"
            assert tried(os.ftruncate, fixed, 0) == "EROFS"
            assert tried(os.open, f"/proc/self/fd/{fixed}", os.O_WRONLY) == "EROFS"
        governed.set_rules(("/**", "rw"))
        assert tried(os.pread, hidden, 99, 0) == b"content of secret/c".hex()
        assert tried(os.pwrite, fixed, b"X", 0) == 1
    assert document.read_text() == "Xontent of docs/b"


_FAULT = """
import mmap, os, sys
with open(sys.argv[1], "rb") as file:
    pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print(pages[0:7].decode(), flush=True)
sys.stdin.readline()
print(pages[0:7].decode(), flush=True)
"""


def test_pages_of_mappings_are_dropped(mount: MakeMount, folder: Path) -> None:
    governed = mount([("/**", "rw")], folder=folder)
    with subprocess.Popen(
        ["/usr/bin/python3", "-c", _FAULT, governed.path / "secret/c"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "content\n"
        governed.set_rules(*RULES)
        rest, _ = reader.communicate("\n")
    assert (rest, reader.returncode) == ("", -7), "SIGBUS"


def test_mappings_cannot_write_what_became_read_only(mount: MakeMount, folder: Path) -> None:
    governed = mount([("/**", "rw")], folder=folder)
    with opened(governed.path / "docs/b", os.O_RDWR) as fd, mmap.mmap(fd, 0) as pages:
        assert pages[0:1] == b"c"
        governed.set_rules(*RULES)
        with unchanged(folder):
            pages[0:1] = b"X"
            assert tried(os.fsync, fd) != 0
    assert (folder / "docs/b").read_text() == "content of docs/b"


def test_rules_that_open_up_show_what_was_hidden(governed: FuseFixture) -> None:
    path = governed.path / "secret/c"
    assert tried(os.stat, path) == "ENOENT"
    governed.set_rules(("/**", "rw"))
    assert path.read_text() == "content of secret/c"
    assert "secret" in os.listdir(governed.path)


def test_working_directories_survive_a_change(mount: MakeMount, folder: Path) -> None:
    governed = mount([("/**", "rw")], folder=folder)
    with subprocess.Popen(
        ["/bin/sh", "-c", "echo in; read x; cat a; exec /usr/bin/python3 -c 'import os; print(os.getcwd())'"],
        cwd=governed.path / "src",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        governed.set_rules(("/**", "ro"))
        rest, _ = shell.communicate("\n")
    assert rest == f"content of src/a{governed.path}/src\n"


def test_directories_keep_their_rights_when_they_are_renamed(governed: FuseFixture) -> None:
    """Otherwise what is denied below one name could be read below another, or be put there."""
    at = governed.path
    governed.set_rules(("/**", "rw"), ("/src/app/**", "deny"), ("/plain/x", "ro"))
    with unchanged(governed.folder):
        assert tried(os.rename, at / "src", at / "elsewhere") == "EXDEV"
    (at / "new").mkdir()
    (at / "new" / "x").write_text("planted")
    assert tried(os.rename, at / "new", at / "plain") == "EXDEV"
    os.unlink(at / "new" / "x")
    assert tried(os.rename, at / "new", at / "plain") is None
    governed.set_rules(("/**", "rw"), ("**/.env", "deny"))
    assert tried(os.rename, at / "src", at / "elsewhere") is None
    assert tried(os.stat, at / "elsewhere/app/.env") == "ENOENT"


@pytest.mark.parametrize("name", ["SECRET", "Secret/c", "\u017fecret"])
def test_variants_of_a_name_where_the_store_takes_them_for_one(mount: MakeMount, folder: Path, name: str) -> None:
    governed = mount(RULES, folder=folder, case_sensitive=False)
    assert tried(os.stat, governed.path / name) == "ENOENT"
    assert tried(os.mkdir, governed.path / name) in {"EROFS", "ENOENT"}


def test_a_denied_mount_is_empty(mount: MakeMount, folder: Path) -> None:
    governed = mount([("/src/**", "rw")], folder=folder)
    assert tried(os.listdir, governed.path) == "ENOENT"
    assert tried(os.stat, governed.path / "src") == "ENOENT"
    assert tried(os.mkdir, governed.path / "x") in {"ENOENT", "EROFS"}
    assert os.stat(governed.path).st_mode & 0o170000 == 0o040000, "it could not be mounted otherwise"


def test_handles_by_number_do_not_lead_round_a_rule(mount: MakeMount, folder: Path) -> None:
    governed = mount([("/**", "rw")], folder=folder)
    handle, number = ctypes.create_string_buffer(136), ctypes.c_int()
    ctypes.memmove(handle, (128).to_bytes(4, "little"), 4)
    path = os.fsencode(governed.path / "secret/c")
    if _libc.name_to_handle_at(-100, path, handle, ctypes.byref(number), 0):
        assert ctypes.get_errno() == errno.EOPNOTSUPP
        return
    governed.set_rules(*RULES)
    with opened(governed.path, os.O_RDONLY) as at:
        fd = _libc.open_by_handle_at(at, handle, os.O_RDONLY)
    assert (fd, ctypes.get_errno() in {errno.ESTALE, errno.ENOENT}) == (-1, True)
