"""From native to governed: nothing that was opened before leads to governed data, and nothing is lost."""

from __future__ import annotations

import array
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from hiverd.files import sever as sever_module
from hiverd.files.sever import sever, trash_of
from support.waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="file handles and owners need root")

Snapshot = dict[str, tuple[object, ...]]
ROOTS: Final = Path(__file__).resolve().parents[3] / "hiver"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "workspace"
    made.mkdir()
    return made


def nothing(_: str) -> bool:
    return False


def everything(_: str) -> bool:
    return True


def snapshot(folder: Path) -> Snapshot:
    """Everything that must stay, by path."""
    found: Snapshot = {}
    for parent, directories, files in os.walk(folder):
        for path in [Path(parent), *(Path(parent) / name for name in [*directories, *files])]:
            status = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
            target = os.readlink(path) if path.is_symlink() else ""
            attributes = {name: os.getxattr(path, name, follow_symlinks=False) for name in _attributes(path)}
            owner = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns)
            found[str(path.relative_to(folder))] = (*owner, content, target, str(attributes), status.st_rdev)
    return found


def _attributes(path: Path) -> list[str]:
    return os.listxattr(path, follow_symlinks=False)


def inodes(folder: Path) -> dict[str, int]:
    return {
        str(Path(parent, name).relative_to(folder)): os.lstat(Path(parent, name)).st_ino
        for parent, directories, files in os.walk(folder)
        for name in [".", *directories, *files]
    }


def fill(folder: Path, *, files: int = 60) -> None:
    numbers = random.Random(7)
    for number in range(files):
        place = folder / f"d{number % 7}" / f"e{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"f{number}").write_bytes(numbers.randbytes(numbers.randrange(3000)))
    os.symlink("../nowhere", folder / "d0" / "link")
    os.mkfifo(folder / "d0" / "pipe", 0o640)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "d0" / "s"))
    os.mknod(folder / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    (folder / "d1" / "empty").mkdir()
    os.chmod(folder / "d1", 0o1777)
    os.chown(folder / "d1", 1000, 1001)
    os.chown(folder / "d2" / "e2", 5, 6)
    for path in (folder / "d3", folder / "d0" / "e0" / "f0"):
        os.setxattr(path, "user.note", b"kept\0bytes")
    os.chown(folder / "d0" / "e0" / "f0", 12, 13)
    os.chmod(folder / "d0" / "e0" / "f0", 0o6750)
    (folder / os.fsdecode(b"odd \xff\n name")).write_text("x")
    for number, path in enumerate(sorted(folder.rglob("*"), reverse=True)):
        os.utime(path, ns=(10**18, 10**18 + number), follow_symlinks=False)
    os.utime(folder, ns=(10**18, 10**18 - 1))


def only_the_old_folder_is_left(folder: Path) -> bool:
    """Empty, in the trash, since a mount may lie on it; one for each time."""
    left = list(trash_of(folder).iterdir())
    return all(path.name.startswith("kept-") and not list(path.iterdir()) for path in left)


@pytest.mark.parametrize("restricted", [nothing, everything, lambda path: "e1" in path])
def test_everything_stays_as_it_is(folder: Path, restricted: Callable[[str], bool]) -> None:
    fill(folder)
    before, inodes_before = snapshot(folder), inodes(folder)
    sever(folder, restricted)
    assert snapshot(folder) == before
    assert only_the_old_folder_is_left(folder)
    for path, inode in inodes(folder).items():
        directory = (folder / path).is_dir() and not (folder / path).is_symlink()
        regular = stat.S_ISREG((folder / path).lstat().st_mode)
        made_anew = directory or (regular and restricted(path))
        assert (inode != inodes_before[path]) == made_anew, path


def test_rules_are_asked_for_paths_below_the_folder(folder: Path) -> None:
    (folder / "a" / "b").mkdir(parents=True)
    for name in ("top", "a/one", "a/b/two"):
        (folder / name).write_text(name)
    asked: list[str] = []
    told: list[int] = []
    sever(folder, lambda path: bool(asked.append(path)), told.append)
    assert sorted(asked) == ["a/b/two", "a/one", "top"]
    assert told[-1] == 5


def test_holes_stay_holes(folder: Path) -> None:
    with (folder / "sparse").open("wb") as file:
        file.seek(1 << 30)
        file.write(b"end")
        file.truncate(2 << 30)
    sever(folder, everything)
    found = (folder / "sparse").stat()
    assert found.st_size == 2 << 30
    assert found.st_blocks * 512 < 1 << 20
    with (folder / "sparse").open("rb") as file:
        file.seek(1 << 30)
        assert file.read(4) == b"end\0"


@pytest.mark.parametrize(("restricted", "changed"), [(nothing, 1), (everything, 0), (lambda path: path != "b", None)])
def test_names_of_one_file_become_files(folder: Path, restricted: Callable[[str], bool], changed: int | None) -> None:
    """One that is open may still be what was open before; none that is restricted is."""
    (folder / "a").write_text("x")
    for name in "bc":
        os.link(folder / "a", folder / name)
    kept = os.open(folder / "a", os.O_WRONLY)
    sever(folder, restricted)
    os.write(kept, b"y")
    os.close(kept)
    assert len({os.stat(folder / name).st_ino for name in "abc"}) == 3
    contents = [(folder / name).read_text() for name in "abc"]
    if changed is not None:
        assert contents.count("y") == changed
    else:
        assert [contents[0], contents[2]] == ["x", "x"]


def test_a_link_to_the_outside_is_not_followed(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("x")
    os.symlink(outside, folder / "link")
    os.symlink(outside / "file", folder / "file")
    before = snapshot(outside)
    sever(folder, everything)
    assert snapshot(outside) == before
    assert os.readlink(folder / "link") == str(outside)


def test_a_tree_deeper_than_a_path_can_be(folder: Path) -> None:
    depth = 3000
    at = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("deep", dir_fd=at)
        inner = os.open("deep", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    os.close(os.open("end", os.O_CREAT | os.O_WRONLY, dir_fd=at))
    os.close(at)
    asked: list[str] = []
    sever(folder, lambda path: bool(asked.append(path)))
    assert asked == ["deep/" * depth + "end"]
    subprocess.run(["rm", "-rf", str(folder)], check=True)


# -- what was open --------------------------------------------------------------------------------------------------


@pytest.fixture
def mounted(folder: Path, tmp_path: Path) -> Iterator[Path]:
    """The native mount of the folder: a bind mount, as sandboxes have it."""
    point = tmp_path / "mount"
    point.mkdir()
    subprocess.run(["mount", "--bind", str(folder), str(point)], check=True)
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


def hidden(fds: list[int]) -> tuple[socket.socket, socket.socket]:
    """Descriptors that lie in a socket's queue and nowhere else."""
    here, there = socket.socketpair()
    here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    for fd in fds:
        os.close(fd)
    return here, there


def test_nothing_that_was_opened_leads_to_what_is_governed(folder: Path, mounted: Path) -> None:
    (folder / "d" / "inner").mkdir(parents=True)
    (folder / "d" / "secret").write_text("old")
    (folder / "d" / "inner" / "secret").write_text("old")
    paths = [mounted, mounted / "d", mounted / "d" / "inner", mounted / "d" / "secret"]
    here, there = hidden([os.open(path, os.O_RDONLY) for path in paths[:3]] + [os.open(paths[3], os.O_RDWR)])
    sever(folder, everything)
    (folder / "d" / "secret").write_text("new")
    (folder / "d" / "added").write_text("new")
    _, fds, _, _ = socket.recv_fds(there, 1, 10)
    root, directory, inner, secret = fds
    for fd in (root, directory, inner):
        assert os.listdir(fd) == []
        if fd == root:  # it stays for what is mounted on it, and leads nowhere
            os.close(os.open("made", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
            assert not (folder / "made").exists()
        else:
            with pytest.raises(FileNotFoundError):
                os.open("made", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        for way in ("secret", "d/secret", "../d/secret", "../secret", "../../d/secret", "../../../workspace/d/secret"):
            with pytest.raises(FileNotFoundError):
                os.open(way, os.O_RDONLY, dir_fd=fd)
    assert os.read(secret, 10) == b"old"
    os.pwrite(secret, b"evil", 0)
    assert (folder / "d" / "secret").read_text() == "new"
    with pytest.raises(OSError, match=r"Invalid cross-device|No such file"):
        os.link(f"/proc/self/fd/{secret}", folder / "d" / "linked")
    for resource in (*fds, here.detach(), there.detach()):
        os.close(resource)


SPAMMER = """
import os, sys
os.chdir(sys.argv[1])
print("ready", flush=True)
number = 0
while True:
    number += 1
    try:
        os.close(os.open(f"f{number % 50}", os.O_CREAT | os.O_WRONLY))
        os.mkdir(f"d{number}")
        os.rename(f"d{number}", f"f-{number}")
    except FileNotFoundError:
        break
    except OSError:
        pass
print("ended", flush=True)
"""


def test_a_process_that_goes_on_making_entries(folder: Path) -> None:
    (folder / "busy").mkdir()
    (folder / "kept").write_text("x")
    argv = [sys.executable, "-c", SPAMMER, str(folder / "busy")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            until(lambda: len(os.listdir(folder / "busy")) > 50, seconds=20, what="entries are there")
            sever(folder, everything)
            assert process.stdout.readline() == "ended\n"
        finally:
            process.kill()
    assert (folder / "kept").read_text() == "x"
    assert len(os.listdir(folder / "busy")) > 50


def test_a_directory_that_cannot_be_emptied_is_left_where_nobody_looks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who makes entries faster than they can be moved."""
    (folder / "busy").mkdir()
    (folder / "busy" / "first").write_text("x")
    held = os.open(folder / "busy", os.O_RDONLY)
    rename, number = os.rename, iter(range(10**9))

    def and_another(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        if os.fstat(src_dir_fd).st_ino == os.fstat(held).st_ino:
            os.close(os.open(f"more{next(number)}", os.O_CREAT | os.O_WRONLY, dir_fd=held))
        rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "rename", and_another)
    monkeypatch.setattr(sever_module, "_EMPTYING_SECONDS", 0.2)
    sever(folder, nothing)
    assert any(path.name.startswith("dead-") for path in trash_of(folder).iterdir())
    assert (folder / "busy" / "first").read_text() == "x"
    assert (folder / "busy").stat().st_ino != os.fstat(held).st_ino
    os.close(os.open("late", os.O_CREAT | os.O_WRONLY, dir_fd=held))
    assert not (folder / "busy" / "late").exists()
    os.close(held)


# -- crashes --------------------------------------------------------------------------------------------------------

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from hiverd.files.sever import sever
print("ready", flush=True)
sever(Path(sys.argv[2]), lambda path: hash(path) % 2 == 0)
"""


def test_killed_at_any_moment_nothing_is_lost(folder: Path) -> None:
    """And the next call finishes what was begun, without the first one's memory."""
    fill(folder, files=400)
    before = {path: entry for path, entry in snapshot(folder).items() if not (folder / path).is_dir()}
    names = set(snapshot(folder))
    delays = random.Random(3)
    killed = 0
    for _ in range(25):
        argv = [sys.executable, "-c", RUN, str(ROOTS), str(folder)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delays.uniform(0.0, 0.05))
            process.send_signal(signal.SIGKILL)
        killed += trash_of(folder).exists()
    assert killed > 5
    asked: set[str] = set()
    held = os.open(folder, os.O_RDONLY)
    interrupted = trash_of(folder).exists()
    sever(folder, lambda path: bool(asked.add(path)))
    assert (os.fstat(held).st_nlink > 0) == interrupted, "what was begun is finished, and nothing begun anew"
    os.close(held)
    after = snapshot(folder)
    assert set(after) == names
    assert {path: after[path] for path in before} == before
    assert asked <= names
    assert only_the_old_folder_is_left(folder)


class Stopped(Exception):  # noqa: N818 -- it stops a test's subject
    pass


@pytest.mark.parametrize("calls", range(1, 60, 2))
def test_stopped_before_any_call(folder: Path, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    fill(folder, files=4)
    before = snapshot(folder)
    left = calls

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                raise Stopped
            return function(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "rmdir", "mkdir", "unlink", "utime"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(sever_module.linux, "exchange", counted(sever_module.linux.exchange))
        with suppress(Stopped):
            sever(folder, lambda path: "f" in path)
    sever(folder, lambda path: "f" in path)
    after = snapshot(folder)
    assert {path: entry[4:] for path, entry in after.items()} == {path: entry[4:] for path, entry in before.items()}
    assert only_the_old_folder_is_left(folder)
