"""What an agent sees of a remote folder, and what comes to the backend."""

from __future__ import annotations

import errno
import os
import threading

import msgspec
import pytest

from hiverd.remote.settings import RemoteSettings
from hiverd.testing.filesystem_fakes import FakeFileSystem, ForbiddenFileSystem, SlowFileSystem, StoppedFileSystem
from support.waiting import until
from unit.remote.rig import LATE, QUICK, mounted


def test_a_listing_makes_placeholders_and_downloads_nothing(tmp_path):
    backend = FakeFileSystem()
    backend.put("/a.txt", b"hello")
    backend.put("/d/deep.txt", b"x" * 100_000)
    backend.put("/link", "a.txt")
    with mounted(tmp_path, backend) as mount:
        assert mount.names() == ["a.txt", "d", "link"]
        status = mount.real("/a.txt").stat()
        assert (status.st_size, status.st_mtime) == (5, backend.times["/a.txt"].timestamp())
        assert status.st_mode & 0o7777 == 0o644
        assert os.readlink(mount.real("/link")) == "a.txt"
        assert mount.real("/d").is_dir()
        assert mount.names("/d") == ["deep.txt"]
        assert (backend.calls["list"], backend.bytes_read) == (2, 0)
        assert mount.paired()


def test_bytes_come_when_they_are_read(tmp_path):
    backend = FakeFileSystem()
    backend.put("/a", bytes(range(256)) * 100)
    with mounted(tmp_path, backend) as mount:
        assert mount.read("/a") == bytes(range(256)) * 100
        assert mount.read("/a") == bytes(range(256)) * 100
        assert backend.calls["read"] == 1
        assert mount.real("/a").stat().st_mtime == backend.times["/a"].timestamp()


def test_what_is_written_is_uploaded_once_after_a_pause(tmp_path):
    backend = FakeFileSystem()
    with mounted(tmp_path, backend) as mount:
        for n in range(5):
            mount.write("/a", b"%d" % n)
        until(lambda: mount.content.pending().count == 0, seconds=5, what="uploaded")
        assert backend.files() == {"/a": b"4"}
        assert backend.calls["write"] == 1
        assert mount.read("/a") == b"4"
        assert backend.calls["read"] == 0


def test_a_temporary_file_that_is_renamed_is_one_upload_under_its_last_name(tmp_path):
    backend = FakeFileSystem()
    backend.put("/a", b"old")
    with mounted(tmp_path, backend) as mount:
        mount.write("/a.tmp", b"new")
        mount.rename("/a.tmp", "/a")
        assert mount.drain().count == 0
        assert backend.files() == {"/a": b"new"}
        assert (backend.calls["write"], backend.calls["move"], backend.calls["delete"]) == (1, 0, 0)


def test_never_written_files_are_not_uploaded_but_emptied_ones_are(tmp_path):
    backend = FakeFileSystem()
    backend.put("/full", b"full")
    with mounted(tmp_path, backend) as mount:
        mount.open("/touched", os.O_WRONLY | os.O_CREAT).close()
        mount.open("/full", os.O_WRONLY | os.O_TRUNC).close()
        assert mount.drain().count == 0
        assert backend.files() == {"/full": b""}
        assert mount.names() == ["full", "touched"]


def test_part_of_a_remote_file_is_changed(tmp_path):
    backend = FakeFileSystem()
    backend.put("/a", b"0123456789" * 1000)
    with mounted(tmp_path, backend) as mount:
        with mount.open("/a", os.O_RDWR) as handle:
            handle.write(b"xx", 5)
        assert mount.drain().count == 0
        assert backend.files()["/a"] == b"01234xx789" + b"0123456789" * 999


def test_names_change_at_once(tmp_path):
    backend = FakeFileSystem()
    backend.put("/a", b"a")
    backend.put("/d/x", b"x")
    with mounted(tmp_path, backend) as mount:
        mount.mkdir("/new")
        mount.symlink("/etc/passwd", "/new/link")
        mount.rename("/a", "/new/b")
        mount.rename("/d", "/e")
        assert backend.objects == {"/new": None, "/new/link": "/etc/passwd", "/new/b": b"a", "/e": None, "/e/x": b"x"}
        assert mount.read("/new/b") == b"a"
        assert mount.read("/e/x") == b"x"
        mount.unlink("/new/b")
        mount.unlink("/new/link")
        mount.rmdir("/new")
        assert backend.objects == {"/e": None, "/e/x": b"x"}
        assert mount.names() == ["e"]
        assert mount.paired()


def test_a_directory_that_is_not_empty_stays(tmp_path):
    backend = FakeFileSystem()
    backend.put("/d/x", b"x")
    with mounted(tmp_path, backend) as mount:
        with pytest.raises(OSError, match="not empty") as failure:
            mount.rmdir("/d")
        assert failure.value.errno == errno.ENOTEMPTY
        assert backend.calls["delete"] == 0


def test_what_is_pending_below_is_uploaded_before_a_directory_moves(tmp_path):
    backend = FakeFileSystem()
    backend.put("/d/x", b"x")
    with mounted(tmp_path, backend, LATE) as mount:
        mount.write("/d/x", b"changed")
        mount.write("/d/new", b"new")
        mount.rename("/d", "/e")
        assert mount.drain().count == 0
        assert backend.files() == {"/e/x": b"changed", "/e/new": b"new"}


@pytest.mark.parametrize("operation", ["list", "read", "delete"])
def test_what_the_service_refuses_is_eacces(tmp_path, operation):
    backend = ForbiddenFileSystem(**{operation: -1})
    backend.put("/a", b"a")

    def all_of_it():
        mount.names()
        mount.read("/a")
        mount.unlink("/a")

    with mounted(tmp_path, backend) as mount:
        with pytest.raises(PermissionError) as failure:
            all_of_it()
        assert failure.value.errno == errno.EACCES
        assert [call.error for call in mount.calls if call.error] == ["[Errno 13] the token has expired"]


def test_racing_listings_and_reads_are_one_call_each(tmp_path):
    backend = SlowFileSystem(0.1)
    backend.put("/a", b"a" * 1000)
    with mounted(tmp_path, backend) as mount:
        found = []
        threads = [threading.Thread(target=lambda: found.append(mount.read("/a"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [b"a" * 1000] * 8
        assert (backend.calls["list"], backend.calls["read"]) == (1, 1)


def test_nothing_is_asked_again_in_a_tight_loop(tmp_path):
    backend = FakeFileSystem()
    backend.put("/a", b"a")
    with mounted(tmp_path, backend) as mount:
        for _ in range(200):
            mount.names()
            mount.exists("/nothing")
            mount.read("/a")
        assert backend.calls["list"] == 1
        assert backend.calls["stat"] <= 1


def test_changes_of_others_come(tmp_path):
    backend = FakeFileSystem()
    for name in "abc":
        backend.put(f"/{name}", b"old")
    settings = RemoteSettings(listing_seconds=0, listing_factor=0, stat_seconds=0)
    with mounted(tmp_path, backend, settings) as mount:
        assert mount.read("/a") == b"old"
        with mount.open("/a") as handle:
            assert handle.unchanged
        backend.put("/a", b"newer")
        backend.drop("/b")
        backend.put("/new/x", b"x")
        with mount.open("/a") as handle:
            assert not handle.unchanged
            assert handle.read_all() == b"newer"
        assert mount.names() == ["a", "c", "new"]
        assert mount.read("/new/x") == b"x"
        assert {"/a", "/b", "/new"} <= set(mount.changed)
        backend.drop("/new")
        assert mount.names() == ["a", "c"]


def test_async_mounts_never_ask_again(tmp_path):
    backend = FakeFileSystem()
    backend.put("/a", b"old")
    settings = RemoteSettings(asynchronous=True, listing_seconds=0, listing_factor=0, stat_seconds=0)
    with mounted(tmp_path, backend, settings) as mount:
        assert mount.read("/a") == b"old"
        backend.put("/a", b"newer")
        backend.put("/b", b"b")
        assert mount.read("/a") == b"old"
        assert mount.names() == ["a"]
        assert (backend.calls["list"], backend.calls["stat"]) == (1, 0)


def test_names_that_lead_elsewhere_are_left_out(tmp_path):
    backend = FakeFileSystem()
    backend.put("/fine", b"")
    backend.objects["/.."] = backend.objects["/."] = backend.objects["/a\0b"] = b"x"
    backend.objects["/" + "n" * 300] = b"x"
    for path in backend.objects:
        backend.versions.setdefault(path, 1)
        backend.times.setdefault(path, backend.times["/fine"])
    with mounted(tmp_path, backend) as mount:
        assert mount.names() == ["fine"]


def test_odd_names(tmp_path):
    backend = FakeFileSystem()
    odd = "/" + os.fsdecode(b"caf\xe9 \n%0")
    with mounted(tmp_path, backend, QUICK) as mount:
        mount.write(odd, b"odd")
        assert mount.drain().count == 0
        assert backend.files() == {odd: b"odd"}
        mount.rename(odd, "/ü")
        assert mount.read("/ü") == b"odd"


def test_a_listing_knows_nothing_of_what_changes_while_it_runs(tmp_path):
    backend = StoppedFileSystem()
    for name in "abc":
        backend.put(f"/{name}", name.encode())
    settings = msgspec.structs.replace(QUICK, listing_seconds=0, listing_factor=0)
    with mounted(tmp_path, backend, settings) as mount:
        mount.names()
        backend.stopped.add("after-list")
        listing = threading.Thread(target=mount.content.list, args=("/",))
        listing.start()
        until(lambda: backend.waiting, seconds=5, what="the listing has begun")
        for path in ("/a", "/b"):
            mount.content.unlink(path)
            mount.real(path).unlink()
        fd = os.open(mount.real("/new"), os.O_CREAT | os.O_WRONLY)
        mount.content.created("/new")
        mount.content.modify("/new")
        os.write(fd, b"new")
        os.close(fd)
        mount.content.close("/new", written=True)
        mount.content.open("/c", write=True, truncate=True)
        mount.content.modify("/c")
        mount.real("/c").write_bytes(b"changed")
        assert mount.drain().count == 0
        mount.on_loop(backend.go)
        listing.join(10)
        mount.content.close("/c", written=True)
        assert "/c" not in mount.changed
        assert sorted(os.listdir(mount.tree)) == ["c", "new"]
        assert mount.read("/new") == b"new"
        assert mount.drain().count == 0
        assert sorted(backend.files()) == ["/c", "/new"]


def test_a_folder_that_does_not_follow_is_made_to(tmp_path, monkeypatch):
    monkeypatch.setattr("hiverd.remote.nodes.INTENT_SECONDS", 0.0)
    backend = FakeFileSystem()
    backend.put("/a", b"a")
    with mounted(tmp_path, backend) as mount:
        mount.names()
        mount.content.rename("/a", "/b")
        until(lambda: os.listdir(mount.tree) == ["b"], seconds=5, what="the folder follows")
