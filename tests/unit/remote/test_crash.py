"""`kill -9` at any moment: what was written is on the backend or still pending, whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hiverd.remote.state import State
from hiverd.testing.filesystem_directory import DirectoryFileSystem
from hiverd.testing.filesystem_fakes import FakeFileSystem
from unit.remote.crash_writer import content_of
from unit.remote.rig import LATE, QUICK, mounted

TESTS = Path(__file__).parents[2]
COUNT = 1000


def run_and_kill(base: Path, folder: Path, *, after: int, pause_seconds: float) -> int:
    """How many files the writer said were written when it was killed."""
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent / 'hiver'}"}
    argv = [sys.executable, str(Path(__file__).with_name("crash_writer.py")), str(base), str(folder), str(COUNT)]
    written = 0
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        try:
            for _ in range(after):
                line = process.stdout.readline()
                assert line, "the writer has failed"
                written = int(line) + 1
            time.sleep(pause_seconds)  # no wait for anything: it chooses the moment
        finally:
            process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().splitlines()
        return written + len([line for line in rest if line])


@pytest.mark.parametrize(("after", "pause_seconds"), [(37, 0), (400, 0.003), (COUNT, 0), (COUNT, 0.35), (COUNT, 0.8)])
def test_nothing_is_lost_or_torn(tmp_path, after, pause_seconds):
    folder = tmp_path / "backend"
    backend = DirectoryFileSystem(folder)
    written = run_and_kill(tmp_path / "base", folder, after=after, pause_seconds=pause_seconds)
    before = backend.files()
    with mounted(tmp_path / "base", backend, LATE) as mount:
        assert mount.recovered.count >= written - len(before)
        assert mount.drain().count == 0
        files = backend.files()
        assert not [name for name in files if "conflict" in name]
        for number in range(written):
            assert files.get(f"/f{number:04d}") == content_of(number), number
        for number in (0, written - 1):
            assert mount.read(f"/f{number:04d}") == content_of(number)


def kill(mount):
    """What is in the database and on the disk stays as it is; nothing is put in order."""
    mount.content._table.save = lambda node: None
    mount.content._table.state.commit = lambda: None


def test_what_the_folder_did_not_follow_is_finished(tmp_path):
    backend = FakeFileSystem()
    for name in ("remote", "doomed", "d/x"):
        backend.put(f"/{name}", name.encode())
    with mounted(tmp_path, backend, LATE) as mount:
        mount.write("/new", b"new")
        mount.names("/d")
        mount.content.rename("/new", "/newer")
        mount.content.rename("/remote", "/moved")
        mount.content.rename("/d", "/e")
        mount.content.unlink("/doomed")
        kill(mount)
    with mounted(tmp_path, backend, LATE) as mount:
        assert mount.recovered.count == 1
        assert sorted(os.listdir(mount.tree)) == ["e", "moved", "newer"]
        assert mount.drain().count == 0
        assert backend.files() == {"/newer": b"new", "/moved": b"remote", "/e/x": b"d/x"}
        assert mount.names() == ["e", "moved", "newer"]
        assert mount.read("/e/x") == b"d/x"


def test_what_does_not_fit_its_record_is_fetched_again(tmp_path):
    backend = FakeFileSystem()
    for name in "abc":
        backend.put(f"/{name}", name.encode() * 1000)
    with mounted(tmp_path, backend) as mount:
        for name in "abc":
            mount.read(f"/{name}")
    with (tmp_path / "tree/a").open("r+b") as file:
        file.write(b"torn")
    os.truncate(tmp_path / "tree/b", 10)
    with mounted(tmp_path, backend) as mount:
        before = backend.calls["read"]
        for name in "abc":
            assert mount.read(f"/{name}") == name.encode() * 1000
        assert backend.calls["read"] - before == 2


def test_after_a_reboot_only_what_is_pending_is_trusted(tmp_path):
    backend = FakeFileSystem()
    backend.put("/a", b"a" * 1000)
    with mounted(tmp_path, backend, LATE) as mount:
        mount.read("/a")
        mount.write("/b", b"b")
    state = State(tmp_path / "state.sqlite3")
    state.set_fact("boot_id", "another one")
    state.close()
    with mounted(tmp_path, backend, QUICK) as mount:
        assert mount.recovered.count == 1
        mount.read("/a")
        assert backend.calls["read"] == 2
        assert mount.drain().count == 0
        assert backend.files() == {"/a": b"a" * 1000, "/b": b"b"}


def test_what_only_the_folder_has_is_kept(tmp_path):
    backend = FakeFileSystem()
    with mounted(tmp_path, backend):
        pass
    (tmp_path / "tree/orphan").write_bytes(b"orphan")
    (tmp_path / "tree/empty").touch()
    with mounted(tmp_path, backend) as mount:
        assert mount.names() == ["empty", "orphan"]
        assert mount.drain().count == 0
        assert backend.files() == {"/orphan": b"orphan"}
