"""Ranges on demand, versions that change in mid-read, and the bound of the cache."""

from __future__ import annotations

import errno
import os
import random
import threading

import pytest

from hiverd.remote.settings import RemoteSettings
from hiverd.testing.filesystem_fakes import FakeFileSystem, StoppedFileSystem, TornFileSystem
from support.waiting import until
from unit.remote.rig import QUICK, mounted

MIB = 1 << 20
SMALL = RemoteSettings(block_bytes=64 << 10, chunk_bytes=256 << 10, read_ahead_bytes=512 << 10, part_bytes=512 << 10)
RNG = random.Random(7)


def test_a_small_read_of_a_large_file_is_a_small_download(tmp_path):
    backend = FakeFileSystem()
    data = RNG.randbytes(8 * MIB)
    backend.put("/a", data)
    with mounted(tmp_path, backend, SMALL) as mount, mount.open("/a") as handle:
        assert handle.read(5 * MIB + 17, 1000) == data[5 * MIB + 17 :][:1000]
        assert (backend.calls["list"], backend.calls["stat"], backend.calls["read"]) == (1, 0, 1)
        assert backend.bytes_read <= MIB
        assert mount.real("/a").stat().st_blocks * 512 <= MIB


def test_a_sequential_reader_is_read_ahead_of(tmp_path):
    backend = FakeFileSystem()
    data = RNG.randbytes(8 * MIB)
    backend.put("/a", data)
    with mounted(tmp_path, backend, SMALL) as mount:
        assert mount.read("/a") == data
        assert backend.bytes_read == len(data)
        assert backend.calls["read"] < 30


def test_a_change_in_mid_read_is_an_error_and_no_mixture(tmp_path):
    backend = FakeFileSystem()
    backend.put("/a", b"1" * MIB * 2)
    with mounted(tmp_path, backend, SMALL) as mount:
        with mount.open("/a") as handle:
            assert handle.read(0, 10) == b"1" * 10
            backend.put("/a", b"2" * MIB * 2)
            with pytest.raises(OSError, match="Stale") as failure:
                handle.read(MIB + 600_000, 10)
            assert failure.value.errno == errno.ESTALE
            assert handle.read(0, 10) == b"1" * 10
        assert mount.read("/a") == b"2" * MIB * 2


def test_a_cut_connection_fails_the_read_and_the_next_one_goes_on(tmp_path):
    backend = TornFileSystem(count=1, whole_bytes=256 << 10)
    data = RNG.randbytes(MIB)
    backend.put("/a", data)
    with mounted(tmp_path, backend, QUICK) as mount, mount.open("/a") as handle:
        with pytest.raises(OSError, match="Input/output"):
            handle.read(600_000, 10)
        assert handle.read_all() == data


def test_a_write_into_the_middle_waits_for_the_whole(tmp_path):
    backend = FakeFileSystem()
    data = RNG.randbytes(3 * MIB)
    backend.put("/a", data)
    with mounted(tmp_path, backend, SMALL) as mount:
        with mount.open("/a", os.O_RDWR) as handle:
            handle.write(b"x" * 5, MIB)
        assert mount.drain().count == 0
        assert backend.files()["/a"] == data[:MIB] + b"x" * 5 + data[MIB + 5 :]


def test_a_fetch_never_overwrites_a_change(tmp_path):
    backend = StoppedFileSystem("read")
    backend.put("/a", b"1" * 1000)
    with mounted(tmp_path, backend, QUICK) as mount:
        handle = mount.open("/a")
        failures = []

        def read():
            try:
                handle.read(0, 1000)
            except OSError as error:
                failures.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        until(lambda: backend.waiting, seconds=5, what="the read has begun")
        mount.write("/a", b"2" * 500)
        mount.on_loop(backend.go)
        reader.join(10)
        handle.close()
        assert mount.drain().count == 0
        assert mount.read("/a") == backend.files()["/a"] == b"2" * 500


def test_least_recently_used_content_goes(tmp_path):
    backend = FakeFileSystem()
    for n in range(10):
        backend.put(f"/{n}", bytes([n]) * 100_000)
    settings = RemoteSettings(cache_bytes=350_000)
    with mounted(tmp_path, backend, settings) as mount:
        mount.write("/dirty", b"d" * 200_000)
        held = mount.open("/0")
        assert held.read(0, 100_000) == bytes(100_000)
        for n in range(1, 10):
            assert mount.read(f"/{n}") == bytes([n]) * 100_000

        def blocks(path):
            return mount.real(path).stat().st_blocks * 512

        def used():
            return sum(blocks(f"/{n}") for n in range(10))

        until(lambda: used() <= 360_000, seconds=5, what="within the bound")
        assert blocks("/0") >= 100_000
        assert blocks("/dirty") >= 200_000
        assert blocks("/1") == 0
        assert blocks("/9") >= 100_000
        assert mount.real("/1").stat().st_size == 100_000
        assert mount.read("/1") == b"\1" * 100_000
        held.close()


def test_an_open_file_that_is_removed_can_still_be_read(tmp_path):
    backend = FakeFileSystem()
    backend.put("/a", b"a" * 1000)
    with mounted(tmp_path, backend) as mount:
        handle = mount.open("/a")
        mount.unlink("/a")
        assert handle.read(0, 2000) == b"a" * 1000
        mount.write("/a", b"new")
        handle.close()
        assert mount.drain().count == 0
        assert backend.files() == {"/a": b"new"}


def test_what_vanishes_stays_for_those_who_have_it_open(tmp_path):
    backend = FakeFileSystem()
    for path in ("/a", "/d/b"):
        backend.put(path, b"1" * MIB * 2)
    settings = RemoteSettings(chunk_bytes=MIB, listing_seconds=0, listing_factor=0)
    with mounted(tmp_path, backend, settings) as mount:
        handles = [mount.open(path) for path in ("/a", "/d/b")]
        for handle in handles:
            assert handle.read(0, 10) == b"1" * 10
        backend.drop("/a")
        backend.drop("/d")
        assert mount.names() == ["a", "d"]
        for handle in handles:
            assert handle.read(0, 10) == b"1" * 10
            with pytest.raises(FileNotFoundError):
                handle.read(MIB + 600_000, 10)
            handle.close()
        until(lambda: mount.names() == [], seconds=5, what="gone")
