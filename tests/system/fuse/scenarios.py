"""What programs do with files, as functions of a folder. Each returns what happened, to be compared between folders."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Scenario = Callable[[Path], object]

SCENARIOS: list[Scenario] = []
NOBODY = 65534
_libc = ctypes.CDLL(None, use_errno=True)


def scenario(function: Scenario) -> Scenario:
    SCENARIOS.append(function)
    return function


def tried(function: Callable[..., Any], *arguments: Any, **options: Any) -> object:
    """What it returned, or the name of its error."""
    try:
        result = function(*arguments, **options)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return result.hex() if isinstance(result, bytes) else result


def seen(path: Path | int) -> tuple[int, ...] | str:
    """The attributes that must be alike everywhere."""
    try:
        status = os.fstat(path) if isinstance(path, int) else os.lstat(path)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    return status.st_mode, status.st_uid, status.st_gid, size, status.st_nlink


@contextmanager
def opened(path: Path, flags: int, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def as_user(folder: Path, code: str, uid: int = NOBODY, groups: tuple[int, ...] = ()) -> str:
    """What a Python program prints that another user runs in the folder; its errors by name."""
    program = (
        "import os, sys, errno\n"
        "def tried(function, *arguments, **options):\n"
        "    try: return function(*arguments, **options)\n"
        "    except OSError as error: return errno.errorcode[error.errno]\n" + code
    )
    return subprocess.run(
        ["/usr/bin/python3", "-c", program],
        cwd=folder,
        user=uid,
        group=uid,
        extra_groups=list(groups),
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@scenario
def make_and_remove_directories(folder: Path) -> object:
    a = folder / "a"
    with umask(0o022):
        found: list[object] = [tried(os.mkdir, a, 0o777), seen(a), tried(os.mkdir, a)]
    with umask(0):
        found += [tried(os.mkdir, a / "open", 0o1777), seen(a / "open")]
    found += [tried(os.rmdir, a), tried(os.rmdir, a / "open"), seen(a), tried(os.rmdir, a), seen(a)]
    found += [tried(os.mkdir, folder / "no" / "parent"), tried(os.mkdir, folder / ("n" * 256))]
    found += [tried(os.mkdir, folder / ("n" * 255)), tried(os.rmdir, folder / "missing")]
    (folder / "file").write_text("x")
    return [*found, tried(os.rmdir, folder / "file"), tried(os.mkdir, folder / "file" / "below")]


@scenario
def make_and_remove_files(folder: Path) -> object:
    path = folder / "f"
    found: list[object] = []
    with umask(0), opened(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666) as fd:
        found += [seen(fd), tried(os.write, fd, b"hello"), seen(fd), tried(os.read, fd, 1)]
    found += [tried(os.open, path, os.O_CREAT | os.O_EXCL | os.O_WRONLY), seen(path), path.read_bytes().hex()]
    found += [tried(os.open, folder / "missing", os.O_RDONLY), tried(os.open, folder, os.O_WRONLY)]
    found += [tried(os.open, path, os.O_DIRECTORY), tried(os.unlink, folder), tried(os.unlink, folder / "missing")]
    return [*found, tried(os.unlink, path), seen(path), sorted(os.listdir(folder))]


@scenario
def truncate_on_open_and_append(folder: Path) -> object:
    path = folder / "f"
    path.write_bytes(b"0123456789")
    with opened(path, os.O_WRONLY | os.O_TRUNC):
        found: list[object] = [seen(path)]
    with opened(path, os.O_WRONLY | os.O_APPEND) as one, opened(path, os.O_WRONLY | os.O_APPEND) as other:
        for fd, text in ((one, b"a"), (other, b"b"), (one, b"c")):
            os.write(fd, text)
        os.lseek(one, 0, os.SEEK_SET)
        os.write(one, b"d")
        found += [tried(os.pwrite, one, b"e", 0), path.read_bytes().hex()]
    with opened(path, os.O_RDONLY) as fd:
        found += [tried(os.write, fd, b"x"), tried(os.ftruncate, fd, 0)]
    return found


@scenario
def sizes(folder: Path) -> object:
    path = folder / "f"
    path.write_bytes(b"x" * 10000)
    found: list[object] = []
    for size in (5000, 0, 20000):
        found += [tried(os.truncate, path, size), seen(path), path.read_bytes().count(b"\0")]
    with opened(path, os.O_RDWR) as fd:
        found += [
            tried(os.ftruncate, fd, 3),
            seen(fd),
            tried(os.ftruncate, fd, -1),
            tried(os.pwrite, fd, b"z", 1 << 33),
        ]
        found += [seen(fd), tried(os.pread, fd, 4, (1 << 33) - 2), tried(os.pread, fd, 4, 1 << 34)]
        found += [tried(os.posix_fallocate, fd, 0, 1 << 20), tried(os.ftruncate, fd, 0)]
        found += [tried(os.posix_fallocate, fd, 0, 1 << 20), seen(fd), os.fstat(fd).st_blocks > 1000]
    return [*found, tried(os.truncate, folder, 1), tried(os.truncate, folder / "missing", 1)]


@scenario
def holes(folder: Path) -> object:
    with opened(folder / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"a" * 4096, 0)
        os.pwrite(fd, b"b" * 4096, 1 << 20)
        found = [tried(os.lseek, fd, at, how) for how in (os.SEEK_DATA, os.SEEK_HOLE) for at in (0, 5000, 1 << 20)]
        found += [tried(os.lseek, fd, 1 << 21, os.SEEK_DATA), os.fstat(fd).st_blocks < 1000]
        punched = _libc.fallocate(fd, 3, ctypes.c_int64(0), ctypes.c_int64(4096))
        return [*found, punched, tried(os.lseek, fd, 0, os.SEEK_DATA), tried(os.pread, fd, 8, 0)]


@scenario
def rename_matrix(folder: Path) -> object:
    def build(kind: str, path: Path) -> None:
        if kind == "file":
            path.write_text("x")
        elif kind == "link":
            path.symlink_to("nowhere")
        elif kind != "missing":
            path.mkdir()
            if kind == "full":
                (path / "in").write_text("y")

    found: list[object] = []
    for number, (source, target) in enumerate(
        (s, t)
        for s in ("file", "link", "empty", "full", "missing")
        for t in ("file", "link", "empty", "full", "missing")
    ):
        at = folder / str(number)
        at.mkdir()
        build(source, at / "s")
        build(target, at / "t")
        found += [(source, target), tried(os.rename, at / "s", at / "t"), seen(at / "s"), seen(at / "t")]
        found.append(sorted(os.listdir(at)))
    (folder / "d" / "e").mkdir(parents=True)
    found += [tried(os.rename, folder / "d", folder / "d" / "e" / "f"), tried(os.rename, folder / "d", folder / "d")]
    return [*found, tried(os.rename, folder / "0", folder / "d" / "moved"), sorted(os.listdir(folder / "d" / "moved"))]


@scenario
def rename_with_flags(folder: Path) -> object:
    def rename2(source: str, target: str, flags: int) -> object:
        def call() -> int:
            if _libc.renameat2(-100, os.fsencode(folder / source), -100, os.fsencode(folder / target), flags):
                raise OSError(ctypes.get_errno(), "renameat2")
            return 0

        return tried(call)

    (folder / "a").write_text("a")
    (folder / "b").mkdir()
    (folder / "b" / "in").write_text("b")
    found = [rename2("a", "b", 1), rename2("a", "c", 1), rename2("c", "b", 2), rename2("c", "missing", 2)]
    found += [rename2("b", "c", 8), rename2("b", "c", 3)]
    return [*found, (folder / "b").read_text(), (folder / "c" / "in").read_text()]


@scenario
def directories_that_move_keep_working(folder: Path) -> object:
    (folder / "a" / "b" / "c").mkdir(parents=True)
    (folder / "a" / "b" / "c" / "f").write_text("here")
    with opened(folder / "a" / "b" / "c", os.O_RDONLY) as fd, open(folder / "a" / "b" / "c" / "f", "a") as file:
        os.rename(folder / "a", folder / "z")
        found: list[object] = [tried(os.stat, "f", dir_fd=fd) is not None, sorted(os.listdir(fd))]
        file.write("!")
        file.flush()
        os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    return [*found, (folder / "z/b/c/f").read_text(), sorted(os.listdir(folder / "z/b/c")), seen(folder / "a")]


@scenario
def symbolic_links(folder: Path) -> object:
    found: list[object] = []
    for number, target in enumerate(("f", "/etc/hostname", "../..", "missing", "x" * 4000, "a//b/./")):
        link = folder / str(number)
        found += [tried(os.symlink, target, link), tried(os.readlink, link), seen(link), tried(os.symlink, "y", link)]
    (folder / "f").write_text("through")
    (folder / "loop").symlink_to("loop")
    found += [(folder / "0").read_text(), tried(os.stat, folder / "3"), tried(os.stat, folder / "loop")]
    found += [
        tried(os.open, folder / "0", os.O_NOFOLLOW),
        tried(os.readlink, folder / "f"),
        tried(os.symlink, "", folder / "e"),
    ]
    found += [tried(os.chown, folder / "0", 3, 4, follow_symlinks=False), seen(folder / "0"), seen(folder / "f")]
    found += [tried(os.utime, folder / "3", ns=(5, 7), follow_symlinks=False), os.lstat(folder / "3").st_mtime_ns]
    return [*found, tried(os.unlink, folder / "0"), seen(folder / "f")]


@scenario
def modes_and_owners(folder: Path) -> object:
    path, directory = folder / "f", folder / "d"
    path.write_text("x")
    directory.mkdir()
    found: list[object] = []
    for mode in (0o777, 0o000, 0o4755, 0o2755, 0o6711):
        found += [tried(os.chmod, path, mode), seen(path)]
    found += [tried(os.chown, path, 12, 34), seen(path), tried(os.chown, path, -1, 5), seen(path)]
    found += [tried(os.chmod, directory, 0o2775), tried(os.chown, directory, -1, 77)]
    (directory / "f").write_text("")
    (directory / "d").mkdir()
    found += [seen(directory / "f"), seen(directory / "d")]
    os.chmod(path, 0o6777)
    with opened(path, os.O_RDWR) as fd:
        found += [tried(os.fchmod, fd, 0o640), tried(os.fchown, fd, 1, 1), seen(fd)]
    return found


@scenario
def what_other_users_may(folder: Path) -> object:
    folder.chmod(0o777)
    (folder / "mine").write_text("x")
    (folder / "mine").chmod(0o600)
    (folder / "sticky").mkdir()
    (folder / "sticky").chmod(0o1777)
    (folder / "sticky" / "of-root").write_text("x")
    (folder / "closed").mkdir(mode=0o700)
    (folder / "suid").write_text("x")
    (folder / "suid").chmod(0o6777)
    (folder / "group").mkdir()
    os.chown(folder / "group", 0, 50)
    (folder / "group").chmod(0o2777)
    said = as_user(
        folder,
        "os.umask(0o027)\n"
        "print(tried(open, 'mine'), tried(os.listdir, 'closed'), tried(os.chmod, 'mine', 0o777))\n"
        "print(tried(os.unlink, 'sticky/of-root'), tried(os.rename, 'sticky/of-root', 'sticky/x'))\n"
        "open('theirs', 'w').write('y'); os.mkdir('their-folder'); os.symlink('a', 'their-link')\n"
        "open('group/f', 'w').close(); os.mkdir('group/d')\n"
        "print(tried(os.chown, 'theirs', 0, 0), tried(os.chmod, 'theirs', 0o6755), tried(os.utime, 'mine'))\n"
        "print(tried(os.access, 'mine', os.R_OK), tried(os.access, 'theirs', os.W_OK))\n"
        "f = os.open('suid', os.O_WRONLY); os.write(f, b'z')\n"
        "f = os.open('wo', os.O_CREAT | os.O_RDWR, 0); print(os.write(f, b'z'), tried(open, 'wo'))\n",
    )
    names = ("theirs", "their-folder", "their-link", "group/f", "group/d", "suid", "wo", "sticky/of-root")
    return said, [(name, seen(folder / name)) for name in names]


@scenario
def times(folder: Path) -> object:
    path = folder / "f"
    path.write_text("x")
    found: list[object] = []
    for target in (path, folder):
        for ns in ((1, 2), (-5_000_000_001, 1_700_000_000_123_456_789), (10**18, 0)):
            tried(os.utime, target, ns=ns)
            found += [os.stat(target).st_atime_ns, os.stat(target).st_mtime_ns]
    with opened(path, os.O_RDWR) as fd:
        os.utime(fd, ns=(3, 4))
        found += [os.fstat(fd).st_mtime_ns]
        os.write(fd, b"y")
        found += [os.fstat(fd).st_mtime_ns > 10**18]
    before = folder.stat().st_mtime_ns
    (folder / "g").write_text("")
    return [*found, folder.stat().st_mtime_ns > before]


@scenario
def open_files_without_a_name(folder: Path) -> object:
    path = folder / "f"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"still")
        os.unlink(path)
        found: list[object] = [seen(fd), seen(path), tried(os.pread, fd, 9, 0), tried(os.write, fd, b" here")]
        found += [tried(os.pread, fd, 20, 0), tried(os.ftruncate, fd, 3), tried(os.fchmod, fd, 0o600)]
        found += [tried(os.fchown, fd, 3, 3), tried(os.utime, fd, ns=(1, 1)), tried(os.fsync, fd), seen(fd)]
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        found += [tried(os.read, again, 9)]
        os.close(again)
        path.write_text("another")
        found += [tried(os.pread, fd, 9, 0), path.read_text()]
    with opened(path, os.O_RDONLY) as fd:
        (folder / "g").write_text("newer")
        os.rename(folder / "g", path)
        found += [tried(os.read, fd, 9), path.read_text(), os.fstat(fd).st_nlink]
    return found


@scenario
def removed_directories(folder: Path) -> object:
    (folder / "d").mkdir()
    with opened(folder / "d", os.O_RDONLY) as fd:
        os.rmdir(folder / "d")
        found: list[object] = [tried(os.listdir, fd), tried(os.open, "x", os.O_CREAT | os.O_WRONLY, dir_fd=fd)]
        return [*found, tried(os.mkdir, "x", dir_fd=fd), tried(os.stat, "x", dir_fd=fd)]


@scenario
def large_directories(folder: Path) -> object:
    for number in range(3000):
        (folder / f"{'long-name-' * 5}{number}").touch()
    first = sorted(os.listdir(folder))
    with os.scandir(folder) as entries:
        kinds = {entry.is_file(follow_symlinks=False) for entry in entries}
    with os.scandir(folder) as entries:
        for entry in entries:
            os.unlink(entry.path)
    return first, kinds, os.listdir(folder)


@scenario
def names_of_all_kinds(folder: Path) -> object:
    names = [b"\xff\xfe", "ä".encode(), "a\u0308".encode(), b"new\nline", b"-", b" ", b"...", b"A", b"a", b"%s\\"]
    paths = [folder / os.fsdecode(name) for name in names]
    for path, name in zip(paths, names, strict=True):
        path.write_bytes(name)
    return sorted(os.listdir(os.fsencode(folder))), [path.read_bytes() for path in paths]


@scenario
def pipes_and_sockets(folder: Path) -> object:
    os.mkfifo(folder / "pipe", 0o600)
    found: list[object] = [seen(folder / "pipe"), tried(os.open, folder / "pipe", os.O_WRONLY | os.O_NONBLOCK)]
    with opened(folder / "pipe", os.O_RDWR | os.O_NONBLOCK) as fd:
        found += [tried(os.write, fd, b"p"), tried(os.read, fd, 9)]
    os.mknod(folder / "plain", 0o100640)
    here = os.open(folder, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            server.bind(f"/proc/self/fd/{here}/s")
            server.listen()
            client.connect(f"/proc/self/fd/{here}/s")
    finally:
        os.close(here)
    return [*found, seen(folder / "plain"), stat.S_ISSOCK(os.stat(folder / "s").st_mode)]


@scenario
def locks(folder: Path) -> object:
    with opened(folder / "f", os.O_RDWR | os.O_CREAT) as one, opened(folder / "f", os.O_RDWR) as other:
        fcntl.flock(one, fcntl.LOCK_EX)
        found: list[object] = [tried(fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB)]
        fcntl.lockf(one, fcntl.LOCK_EX, 10, 0)
        code = "import fcntl\nprint(tried(fcntl.lockf, open('f', 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB))"
        found += [as_user(folder, code, uid=0)]
    return found


@scenario
def mappings(folder: Path) -> object:
    path = folder / "f"
    path.write_bytes(b"." * 10000)
    with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, 10000) as shared:
        shared[5000:5005] = b"mmap!"
        shared.flush()
        found: list[object] = [path.read_bytes()[4999:5006]]
        os.pwrite(fd, b"write", 9000)
        found += [shared[8999:9006]]
        with opened(path, os.O_RDONLY) as reader, mmap.mmap(reader, 0, prot=mmap.PROT_READ) as other:
            shared[0:3] = b"xyz"
            found += [other[0:4]]
    with opened(path, os.O_RDWR) as fd:
        last = mmap.mmap(fd, 10000)
    last[1:4] = b"end"
    last.close()
    return [*found, path.read_bytes()[:6]]


@scenario
def direct_and_synchronous(folder: Path) -> object:
    buffer = mmap.mmap(-1, 8192)
    buffer[:] = b"d" * 8192
    with opened(folder / "f", os.O_RDWR | os.O_CREAT | os.O_DIRECT) as fd:
        found: list[object] = [tried(os.writev, fd, [buffer]), tried(os.preadv, fd, [buffer], 4096)]
    with opened(folder / "g", os.O_WRONLY | os.O_CREAT | os.O_SYNC) as fd:
        found += [tried(os.write, fd, b"synced"), tried(os.fsync, fd), tried(os.fdatasync, fd)]
    with opened(folder, os.O_RDONLY) as fd:
        found += [tried(os.fsync, fd)]
    return [*found, seen(folder / "f"), (folder / "f").read_bytes().count(b"d"), seen(folder / "g")]


@scenario
def copies(folder: Path) -> object:
    (folder / "a").write_bytes(os.urandom(1000) * 20000)
    with opened(folder / "a", os.O_RDONLY) as source, opened(folder / "b", os.O_RDWR | os.O_CREAT) as target:
        left = 20_000_000
        while left > 0 and (count := os.copy_file_range(source, target, left)):
            left -= count
    return left, (folder / "a").read_bytes() == (folder / "b").read_bytes()


@scenario
def space(folder: Path) -> object:
    status = os.statvfs(folder)
    return status.f_blocks, status.f_bsize, status.f_namemax, status.f_files
