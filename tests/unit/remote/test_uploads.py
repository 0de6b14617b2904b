"""Uploads that fail, collide, and are overtaken by changes."""

from __future__ import annotations

import errno
import os
import re
import threading

import pytest

from hiverd.remote.settings import RemoteSettings
from hiverd.testing.filesystem_fakes import (
    FailingFileSystem,
    FakeFileSystem,
    ForbiddenFileSystem,
    ForgetfulFileSystem,
    StoppedFileSystem,
    UnversionedFileSystem,
)
from support.waiting import until
from unit.remote.rig import LATE, QUICK, mounted

CONFLICT = re.compile(r"/a \(conflict \d{4}-\d\d-\d\d \d\d\.\d\d\.\d\d\)\.txt")


@pytest.mark.parametrize("kind", [FailingFileSystem, ForbiddenFileSystem])
def test_an_upload_is_tried_until_it_succeeds(tmp_path, kind):
    backend = kind(write=3)
    with mounted(tmp_path, backend) as mount:
        mount.write("/a", b"a")
        until(lambda: mount.content.pending().error, seconds=5, what="the reason is told")
        until(lambda: not mount.content.pending().count, seconds=5, what="uploaded")
        assert (backend.calls["write"], backend.files()) == (4, {"/a": b"a"})
        assert mount.paired()


def test_new_credentials_are_tried_at_once(tmp_path):
    backend = ForbiddenFileSystem(write=-1)
    settings = RemoteSettings(quiet_seconds=0.01, retry_seconds=3600, longest_retry_seconds=3600)
    with mounted(tmp_path, backend, settings) as mount:
        mount.write("/a", b"a")
        until(lambda: mount.content.pending().error, seconds=5, what="refused")
        good = FakeFileSystem()
        mount.on_loop(lambda: mount.content.use(good))
        until(lambda: not mount.content.pending().count, seconds=5, what="uploaded")
        assert good.files() == {"/a": b"a"}


def test_a_drain_says_what_is_left(tmp_path):
    backend = FailingFileSystem(write=-1)
    with mounted(tmp_path, backend, LATE) as mount:
        mount.write("/a", b"a" * 10)
        mount.write("/b", b"b" * 20)
        told = []
        left = mount.run(mount.content.drain(0.5, told.append))
        assert (left.count, left.bytes) == (2, 30)
        assert told[0].count == 2
        backend.failures.clear()
        assert mount.drain().count == 0


@pytest.mark.parametrize("kind", [FakeFileSystem, UnversionedFileSystem])
def test_both_versions_are_kept(tmp_path, kind):
    backend = kind()
    backend.put("/a.txt", b"old")
    with mounted(tmp_path, backend, LATE) as mount:
        mount.write("/a.txt", b"ours, which is longer")
        backend.put("/a.txt", b"theirs")
        assert mount.drain().count == 0
        files = backend.files()
        assert files.pop("/a.txt") == b"theirs"
        ((name, content),) = files.items()
        assert CONFLICT.fullmatch(name)
        assert content == b"ours, which is longer"
        assert mount.read("/a.txt") == b"theirs"
        assert mount.read(name) == b"ours, which is longer"
        assert sorted(mount.names()) == sorted(["a.txt", name[1:]])
        assert backend.calls["read"] == 1


def test_a_new_file_whose_name_was_taken(tmp_path):
    backend = FakeFileSystem()
    with mounted(tmp_path, backend, LATE) as mount:
        mount.write("/a.txt", b"ours")
        backend.put("/a.txt", b"theirs")
        assert mount.drain().count == 0
        assert sorted(backend.files().values()) == [b"ours", b"theirs"]
        assert backend.files()["/a.txt"] == b"theirs"


def test_those_who_have_it_open_keep_ours_until_they_close_it(tmp_path):
    backend = FakeFileSystem()
    backend.put("/a.txt", b"old")
    with mounted(tmp_path, backend, LATE) as mount:
        reader = mount.open("/a.txt")
        mount.write("/a.txt", b"ours")
        backend.put("/a.txt", b"theirs!")
        until(lambda: mount.drain().count == 0, seconds=10, what="drained")
        assert reader.read(0, 100) == b"ours"
        reader.close()
        assert mount.read("/a.txt") == b"theirs!"
        assert sorted(backend.files().values()) == [b"ours", b"theirs!"]


def test_what_has_vanished_is_uploaded_as_new(tmp_path):
    backend = FakeFileSystem()
    backend.put("/a", b"old")
    with mounted(tmp_path, backend, LATE) as mount:
        mount.write("/a", b"ours")
        backend.drop("/a")
        assert mount.drain().count == 0
        assert backend.files() == {"/a": b"ours"}


def test_an_upload_whose_answer_was_lost_is_no_conflict(tmp_path):
    backend = ForgetfulFileSystem(count=2)
    with mounted(tmp_path, backend, LATE) as mount:
        mount.write("/a", b"ours")
        assert mount.drain().count == 0
        assert backend.files() == {"/a": b"ours"}
        mount.write("/a", b"more of ours")
        assert mount.drain().count == 0
        assert backend.files() == {"/a": b"more of ours"}


@pytest.mark.parametrize("moment", ["write", "after-write"])
def test_a_change_during_the_upload_is_uploaded_after_it(tmp_path, moment):
    backend = StoppedFileSystem(moment)
    with mounted(tmp_path, backend, QUICK) as mount:
        mount.write("/a", b"first")
        until(lambda: backend.waiting, seconds=5, what="the upload has begun")
        mount.write("/a", b"other")
        mount.on_loop(backend.go)
        until(lambda: not mount.content.pending().count, seconds=5, what="uploaded")
        assert backend.files() == {"/a": b"other"}


def test_a_file_that_goes_during_its_upload_is_gone(tmp_path):
    backend = StoppedFileSystem("write")
    with mounted(tmp_path, backend, QUICK) as mount:
        mount.write("/a", b"a")
        mount.write("/b", b"b")
        until(lambda: backend.waiting == 2, seconds=5, what="the uploads have begun")
        threads = [
            threading.Thread(target=mount.unlink, args=("/a",)),
            threading.Thread(target=mount.rename, args=("/b", "/c")),
        ]
        for thread in threads:
            thread.start()
        mount.on_loop(backend.go)
        for thread in threads:
            thread.join(10)
        assert mount.drain().count == 0
        assert backend.files() == {"/c": b"b"}
        assert mount.names() == ["c"]


def test_what_stays_open_is_uploaded_when_it_is_closed_or_drained(tmp_path):
    backend = FakeFileSystem()
    with mounted(tmp_path, backend, QUICK) as mount:
        handle = mount.open("/a", os.O_WRONLY | os.O_CREAT)
        handle.write(b"one")
        assert mount.drain().count == 0
        assert backend.files() == {"/a": b"one"}
        handle.write(b"two", 3)
        handle.close()
        until(lambda: backend.files() == {"/a": b"onetwo"}, seconds=5, what="uploaded")


def test_changes_wait_for_room(tmp_path):
    backend = StoppedFileSystem("write")
    settings = RemoteSettings(quiet_seconds=0.01, dirty_bytes=100, room_seconds=0.3)
    with mounted(tmp_path, backend, settings) as mount:
        mount.write("/a", b"a" * 200)
        with mount.open("/b", os.O_WRONLY | os.O_CREAT) as handle:
            with pytest.raises(OSError, match="space") as failure:
                handle.write(b"b")
            assert failure.value.errno == errno.ENOSPC
            mount.on_loop(backend.go)
            handle.write(b"b")
        assert mount.drain().count == 0
        assert backend.files() == {"/a": b"a" * 200, "/b": b"b"}


def test_what_is_pending_is_uploaded_before_it_moves(tmp_path):
    backend = FakeFileSystem()
    backend.put("/a", b"old")
    with mounted(tmp_path, backend, LATE) as mount:
        mount.write("/a", b"new")
        mount.rename("/a", "/b")
        assert backend.files() == {"/b": b"new"}
        assert [operation for operation, _ in backend.log if operation in {"write", "move"}] == ["write", "move"]
        assert mount.content.pending().count == 0


def test_a_reader_does_not_keep_a_file_from_its_upload(tmp_path):
    backend = FakeFileSystem()
    backend.put("/log", b"old")
    with mounted(tmp_path, backend, QUICK) as mount:
        reader = mount.open("/log")
        mount.write("/log", b"new")
        until(lambda: not mount.content.pending().count, seconds=5, what="uploaded")
        assert backend.files() == {"/log": b"new"}
        assert reader.read(0, 10) == b"new"
        reader.close()
        assert not mount.content.pending().count


def test_an_open_file_that_is_replaced_does_not_keep_its_successor(tmp_path):
    backend = FakeFileSystem()
    backend.put("/a", b"old")
    with mounted(tmp_path, backend, QUICK) as mount:
        reader = mount.open("/a")
        assert reader.read(0, 10) == b"old"
        mount.write("/b", b"new")
        mount.rename("/b", "/a")
        assert reader.read(0, 10) == b"old"
        reader.close()
        until(lambda: not mount.content.pending().count, seconds=5, what="uploaded")
        assert backend.files() == {"/a": b"new"}
        until(lambda: not mount.content._table.nodes, seconds=5, what="at rest")


def test_what_is_changed_all_the_time_is_uploaded_now_and_then(tmp_path):
    backend = FakeFileSystem()
    with mounted(tmp_path, backend, QUICK) as mount:
        with mount.open("/log", os.O_WRONLY | os.O_CREAT) as handle:
            handle.write(b"0")
            mount.write("/log", b"another one, who closes it")

            def still_changing():
                handle.write(b"0")
                return backend.calls["write"] >= 3

            until(still_changing, seconds=10, what="several uploads")
            handle.write(b"last")
        assert mount.drain().count == 0
        assert backend.files() == {"/log": b"lasther one, who closes it"}
