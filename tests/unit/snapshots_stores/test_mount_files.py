"""Files in mounts: what other programs read of ours, what we read of theirs, and what hostile code lays out."""

import asyncio
import gzip
import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from hiverd.contracts.errors import HiverError, NotFoundError
from hiverd.sandboxes.snapshot_trailers import TRAILER_MAX_BYTES, parsed, trailer
from hiverd.testing.snapshot_harness import get, listed, noise, put
from support.snapshot_stores import FolderMountHarness

VERSION = "20261124T211503123456Z-5f0c9a1e"


def tar_of(content: bytes) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        member = tarfile.TarInfo("workspace/file")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return raw.getvalue()


@pytest.fixture
def harness(tmp_path: Path) -> FolderMountHarness:
    return FolderMountHarness(tmp_path / "mount", tmp_path / "spool")


@pytest.mark.parametrize("size", [0, 1, 10_000])
@pytest.mark.parametrize("head", [b"\x28\xb5\x2f\xfd", b"\x1f\x8b", b"other"])
def test_a_trailer_is_read_back(head: bytes, size: int) -> None:
    end = trailer(head, VERSION, "ab" * 32, size)
    assert len(end) <= TRAILER_MAX_BYTES
    assert parsed((bytes(200) + end)[-TRAILER_MAX_BYTES:], size + len(end)) == (VERSION, "ab" * 32, size)
    assert parsed(end, size + len(end) + 1) is None
    assert parsed(end[:-1], size + len(end)) is None
    assert parsed(b"", 0) is None


@pytest.mark.parametrize("kind", ["gz", "zst"])
async def test_plain_tar_reads_it(harness: FolderMountHarness, tmp_path: Path, kind: str) -> None:
    raw = tar_of(b"hello")
    if kind == "zst":
        if shutil.which("zstd") is None:
            pytest.skip("zstd is not installed")
        data = subprocess.run(["zstd", "-c"], input=raw, capture_output=True, check=True).stdout
    else:
        data = gzip.compress(raw)
    async with harness.started() as store:
        await put(store, "demo", data)
        assert await get(store, "demo") == data
    path = harness.folder / f"snapshot-demo.tar.{kind}"
    listing = subprocess.run(["tar", "tf", str(path)], capture_output=True, text=True, check=True)
    assert (listing.stdout, listing.stderr) == ("workspace/file\n", "")
    assert path.stat().st_mode & 0o777 == 0o600


async def test_what_another_program_left_is_read(harness: FolderMountHarness) -> None:
    data = gzip.compress(tar_of(b"theirs"))
    (harness.folder / "snapshot-demo.tar.gz").write_bytes(data)
    async with harness.started() as store:
        [info] = await listed(store)
        assert (info.key, info.bytes, info.sha256) == ("demo", len(data), None)
        assert await get(store, "demo") == data
        ours = await put(store, "demo", b"\x28\xb5\x2f\xfd" + noise(10))
        assert await listed(store) == [ours]
    assert [path.name for path in harness.folder.iterdir()] == ["snapshot-demo.tar.zst"]


async def test_hostile_names_are_not_followed(harness: FolderMountHarness, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(gzip.compress(b"the host's"))
    mount = harness.folder
    (mount / "snapshot-link.tar.gz").symlink_to(secret)
    (mount / "snapshot-up.tar.gz").symlink_to("../secret")
    (mount / "snapshot-folder.tar.gz").mkdir()
    os.mkfifo(mount / "snapshot-pipe.tar.gz")
    (mount / ".hiver-snapshot-link").symlink_to(secret)
    os.mkfifo(mount / ".hiver-snapshot-pipe")
    async with harness.started() as store, asyncio.timeout(20):
        for key in ("link", "up", "folder", "pipe"):
            with pytest.raises(NotFoundError):
                await get(store, key)
        assert await listed(store) == []
        for key in ("link", "up", "pipe"):
            await put(store, key, b"ours")
            assert await get(store, key) == b"ours"
        with pytest.raises(HiverError):
            await put(store, "folder", gzip.compress(b"ours"))  # of the same name as the directory
    assert gzip.decompress(secret.read_bytes()) == b"the host's"
    assert (mount / "snapshot-link.tar").read_bytes().startswith(b"ours")


async def test_a_key_with_the_look_of_an_ending(harness: FolderMountHarness) -> None:
    async with harness.started() as store:
        for key in ("demo", "demo.tar", "demo.tar.gz", "demo.tar.zst"):
            await put(store, key, key.encode())
        assert [info.key for info in await listed(store)] == ["demo", "demo.tar", "demo.tar.gz", "demo.tar.zst"]
        for key in ("demo", "demo.tar", "demo.tar.gz", "demo.tar.zst"):
            assert await get(store, key) == key.encode()
