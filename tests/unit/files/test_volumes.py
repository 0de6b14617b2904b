"""Volumes on a real kernel: bounds, adoption, clean-up."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from hiverd.contracts.errors import InvalidError, UnavailableError
from hiverd.files import ext4, loop
from hiverd.files import volumes as module
from hiverd.files.volume_store import VolumeStore
from hiverd.files.volumes import Volumes, probe_volumes
from unit.files.rig import eventually

MIB = 1 << 20

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts")


def _can_loop() -> bool:
    return os.geteuid() == 0 and os.path.exists("/dev/loop-control") and ext4.mkfs_program() is not None


needs_loop = pytest.mark.skipif(not _can_loop(), reason="needs loop devices and mkfs.ext4")


def leftovers(base: Path) -> list[str]:
    """Everything on the host that belongs to volumes below `base`, besides the template and the empty folders."""
    found = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    left = [path for path in found if path.startswith(str(base))]
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            text = backing.read_text()
        except OSError:
            continue
        if text.startswith(str(base)):
            left.append(text.strip())
    for path in base.rglob("*"):
        if path.name not in {"images", "live", "owners"} and not path.name.startswith("template-"):
            left += [str(path)]
    return left


MakeVolumes = Callable[..., Volumes]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[MakeVolumes]:
    """Builds `Volumes` on one folder; all of them are closed and nothing may be left."""
    base = tmp_path / "volumes"
    made: list[Volumes] = []

    def build(**options: object) -> Volumes:
        arguments: dict[str, object] = {"disk_bytes": 128 * MIB, "warm": 0, "reserve_bytes": 0, **options}
        made.append(Volumes(base, **arguments))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for volumes in made[:-1]:
        await volumes.close()
    if made:
        await made[-1].close(remove_all=True)
        await eventually(lambda: leftovers(base) == [])


async def started(volumes: Volumes) -> Volumes:
    await volumes.start()
    return volumes


def fill(folder: Path, limit_bytes: int) -> int:
    """Writes until the disk is full, at most `limit_bytes`; how much fitted."""
    written = 0
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while written < limit_bytes:
                written += file.write(bytes(MIB))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    return written


@pytest.mark.parametrize("kind", [pytest.param("loop", marks=needs_loop), "plain"])
async def test_a_volume_is_a_private_folder(make: MakeVolumes, tmp_path: Path, kind: str) -> None:
    volumes = await started(make(kind=kind))
    folder = await volumes.allocate("a", 0)
    assert sorted(os.listdir(folder)) == ["mounts", "root"]
    for path in (tmp_path / "volumes", folder, folder / "root", folder / "mounts"):
        assert path.stat().st_mode & 0o777 == 0o700
    assert await volumes.allocate("a", 0) == folder
    assert await volumes.allocate("b", 1) != folder
    assert await volumes.list_owned() == {"a", "b"}
    await volumes.release("a")
    await volumes.release("a")
    await volumes.release("never-seen")
    assert not folder.exists()
    assert await volumes.list_owned() == {"b"}


@needs_loop
async def test_a_full_volume_hurts_nobody_else(make: MakeVolumes) -> None:
    volumes = await started(make(kind="loop"))
    first, second = await volumes.allocate("a", 0), await volumes.allocate("b", 1)
    assert 100 * MIB < fill(first / "root", 200 * MIB) < 128 * MIB
    (second / "root" / "fine").write_text("fine")
    (first / "root/filler").unlink()
    (first / "root" / "fine").write_text("fine again")


@needs_loop
async def test_deleted_files_give_the_hosts_disk_back(make: MakeVolumes, tmp_path: Path) -> None:
    volumes = await started(make(kind="loop"))
    folder = await volumes.allocate("a", 0)
    (image,) = (tmp_path / "volumes/images").iterdir()
    fill(folder, 64 * MIB)
    os.sync()
    assert image.stat().st_blocks * 512 > 60 * MIB
    (folder / "filler").unlink()
    os.sync()
    await eventually(lambda: image.stat().st_blocks * 512 < 10 * MIB)


@needs_loop
async def test_releasing_does_not_wait_for_dirty_pages_or_users(make: MakeVolumes, tmp_path: Path) -> None:
    volumes = await started(make(kind="loop"))
    folder = await volumes.allocate("a", 0)
    fill(folder, 64 * MIB)
    with (folder / "root/open").open("wb", buffering=0) as file:
        await volumes.release("a")
        assert not folder.exists()
        with pytest.raises(OSError, match="Input/output"):
            file.write(bytes(MIB))


@pytest.mark.parametrize("kind", [pytest.param("loop", marks=needs_loop), "plain"])
async def test_a_hundred_at_once(make: MakeVolumes, kind: str) -> None:
    volumes = await started(make(kind=kind, warm=3))
    folders = await asyncio.gather(*(volumes.allocate(f"s{number}", number) for number in range(100)))
    assert len(set(folders)) == 100
    for folder in folders:
        (folder / "root/mine").write_text(str(folder))
    assert all((folder / "root/mine").read_text() == str(folder) for folder in folders)
    await asyncio.gather(*(volumes.release(f"s{number}") for number in range(100)))
    assert not any(folder.exists() for folder in folders)


async def test_racing_allocations_of_one_sandbox_get_one_volume(make: MakeVolumes) -> None:
    volumes = await started(make(kind="plain"))
    assert len({*await asyncio.gather(*(volumes.allocate("a", 0) for _ in range(10)))}) == 1


@needs_loop
async def test_releasing_during_allocation(make: MakeVolumes) -> None:
    volumes = await started(make(kind="loop"))
    allocating = asyncio.create_task(volumes.allocate("a", 0))
    await asyncio.sleep(0)
    allocating.cancel()
    await volumes.release("a")
    assert await volumes.list_owned() == frozenset()


@needs_loop
async def test_warm_volumes_are_made_ahead_and_removed_at_the_end(make: MakeVolumes, tmp_path: Path) -> None:
    volumes = await started(make(kind="loop", warm=2))
    live = tmp_path / "volumes/live"
    await eventually(lambda: len(volumes._ready) == 2)
    prepared = set(os.listdir(live))
    folder = await volumes.allocate("a", 0)
    assert folder.name in prepared
    await eventually(lambda: len(volumes._ready) == 2)
    assert len(os.listdir(live)) == 3
    await volumes.close()
    assert os.listdir(live) == [folder.name]
    await started(make(kind="loop"))


@pytest.mark.parametrize("kind", [pytest.param("loop", marks=needs_loop), "plain"])
async def test_the_next_server_adopts(make: MakeVolumes, kind: str) -> None:
    first = await started(make(kind=kind, warm=2))
    folder = await first.allocate("a", 0)
    (folder / "root/kept").write_text("kept")
    await first.close()
    second = await started(make(kind=kind))
    assert await second.list_owned() == {"a"}
    assert await second.adopt("a") == folder
    assert await second.adopt("unknown") is None
    assert (folder / "root/kept").read_text() == "kept"


@needs_loop
async def test_a_volume_is_mounted_again_after_a_reboot(make: MakeVolumes) -> None:
    first = await started(make(kind="loop"))
    folder = await first.allocate("a", 0)
    (folder / "root/kept").write_text("kept")
    await first.close()
    from hiverd.files import linux

    linux.umount(str(folder))
    assert os.listdir(folder) == []
    second = await started(make(kind="plain"))  # also when the server's choice has changed
    assert await second.adopt("a") == folder
    assert (folder / "root/kept").read_text() == "kept"


@needs_loop
async def test_an_image_is_never_attached_twice(make: MakeVolumes, tmp_path: Path) -> None:
    """A server in another mount namespace does not see the mount; a second device would destroy the file system."""
    first = await started(make(kind="loop"))
    folder = await first.allocate("a", 0)
    (image,) = (tmp_path / "volumes/images").iterdir()
    device = loop.device_of(image)
    assert device is not None
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    loop.mount_image(image, elsewhere)
    try:
        (elsewhere / "root/seen").write_text("seen")
        assert (folder / "root/seen").read_text() == "seen"
        assert elsewhere.stat().st_dev == folder.stat().st_dev
    finally:
        loop.discard_mounts(elsewhere)


async def test_what_nobody_owns_is_removed_at_the_start(make: MakeVolumes, tmp_path: Path) -> None:
    base = tmp_path / "volumes"
    store = VolumeStore(base, "plain", 128 * MIB)
    store.prepare()
    stray = store.build()
    (base / "images/half-made.img").write_bytes(b"x")
    (base / "live/half-made").mkdir()
    await started(make(kind="plain"))
    assert not store.folder(stray).exists()
    assert os.listdir(base / "images") == []
    assert os.listdir(base / "live") == []


async def test_a_hostile_tree_is_removed(make: MakeVolumes, tmp_path: Path) -> None:
    """Deeper than Python recurses and longer than a path may be, with a link to the host's files."""
    volumes = await started(make(kind="plain"))
    folder = await volumes.allocate("a", 0)
    host = tmp_path / "host"
    host.mkdir()
    (host / "file").write_text("the host's")
    (folder / "root/link").symlink_to(host)
    fd = os.open(folder / "root", os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("deep", dir_fd=fd)
        below = os.open("deep", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    await volumes.release("a")
    assert not folder.exists()
    assert (host / "file").read_text() == "the host's"


async def test_a_nearly_full_host_is_a_clear_error(make: MakeVolumes) -> None:
    volumes = await started(make(kind="plain", reserve_bytes=1 << 60))
    with pytest.raises(UnavailableError, match="nearly full"):
        await volumes.allocate("a", 0)
    assert await volumes.list_owned() == frozenset()


async def test_a_small_disk_makes_smaller_volumes(make: MakeVolumes, monkeypatch: pytest.MonkeyPatch) -> None:
    """One full sandbox alone must not fill the host's disk."""
    monkeypatch.setattr(module, "_free_bytes", lambda _: 7 * module.GIB)
    volumes = make(kind="plain", disk_bytes=10 * module.GIB, reserve_bytes=2 * module.GIB)
    assert volumes._bounded_bytes() == 5 * module.GIB


async def test_without_loop_devices_auto_is_plain_with_a_warning(
    make: MakeVolumes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ext4, "mkfs_program", lambda: None)
    volumes = await started(make(kind="auto"))
    (finding,) = volumes.findings
    assert not finding.ok
    assert not finding.required
    assert "e2fsprogs" in finding.remedy
    assert (await volumes.allocate("a", 0) / "root").is_dir()
    with pytest.raises(UnavailableError, match=r"mkfs\.ext4"):
        await make(kind="loop").start()


@needs_loop
async def test_probing_leaves_nothing(tmp_path: Path) -> None:
    finding = probe_volumes(tmp_path / "data")
    assert finding.ok, finding
    await eventually(lambda: leftovers(tmp_path / "data") == [])


@pytest.mark.parametrize("sandbox_id", ["", "..", "a/b", "/etc", "-x", "a\0", "x" * 200])
async def test_ids_never_name_other_paths(make: MakeVolumes, sandbox_id: str) -> None:
    volumes = await started(make(kind="plain"))
    with pytest.raises(InvalidError):
        await volumes.allocate(sandbox_id, 0)


def test_the_hosts_file_system_is_never_shut_down(tmp_path: Path) -> None:
    """`discard_mounts` shuts a file system down: on an unmounted folder that would be the host's own."""
    folder = tmp_path / "folder"
    folder.mkdir()
    loop.discard_mounts(folder)
    loop.discard_mounts(tmp_path / "none")
    (folder / "still").write_text("writable")
    assert (folder / "still").read_text() == "writable"
