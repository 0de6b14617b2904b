"""`kill -9` while volumes are prepared, allocated and released: the next start adopts or removes everything."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hiverd.files import ext4
from hiverd.files.volumes import Volumes

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(
        os.geteuid() != 0 or not os.path.exists("/dev/loop-control") or ext4.mkfs_program() is None,
        reason="needs root, loop devices and mkfs.ext4",
    ),
]

ROUNDS = 25
DISK_BYTES = 128 << 20

CHILD = """
import asyncio, random, sys
from pathlib import Path
from hiverd.files.volumes import Volumes

async def churn(volumes, prefix):
    for number in range(10**6):
        name = f"{prefix}-{number}"
        folder = await volumes.allocate(name, 0)
        (folder / "root/marker").write_text(name)
        print("allocated", name, flush=True)
        if random.random() < 0.8:
            print("releasing", name, flush=True)
            await volumes.release(name)

async def main():
    volumes = Volumes(Path(sys.argv[1]), kind="loop", disk_bytes=int(sys.argv[2]), warm=2, reserve_bytes=0)
    await volumes.start()
    for name in await volumes.list_owned():
        await volumes.adopt(name)
    await asyncio.gather(*(churn(volumes, f"{sys.argv[3]}-{number}") for number in range(3)))

asyncio.run(main())
"""


def attached_below(base: Path) -> list[str]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            text = backing.read_text()
        except OSError:
            continue
        if text.startswith(str(base)):
            found.append(text.strip())
    return found


def mounted_below(base: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if line.split()[4].startswith(str(base))]


def run_and_kill(base: Path, round_number: int) -> tuple[set[str], set[str]]:
    """Names whose allocation was announced, and those whose release had begun."""
    argv = [sys.executable, "-c", CHILD, str(base), str(DISK_BYTES), str(round_number)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "hiver"})
    time.sleep(random.uniform(0.15, 0.5))
    process.kill()
    out, _ = process.communicate()
    said = [line.split() for line in out.splitlines() if len(line.split()) == 2]
    return {name for verb, name in said if verb == "allocated"}, {name for verb, name in said if verb == "releasing"}


async def test_nothing_is_lost_and_nothing_is_left(tmp_path: Path) -> None:
    base = tmp_path / "volumes"
    alive: set[str] = set()
    seen = 0
    try:
        for number in range(ROUNDS):
            allocated, released = await asyncio.to_thread(run_and_kill, base, number)
            seen += len(allocated)
            alive = (alive | allocated) - released
            volumes = Volumes(base, kind="loop", disk_bytes=DISK_BYTES, warm=0, reserve_bytes=0)
            await volumes.start()
            owned = await volumes.list_owned()
            for name in sorted(owned):
                folder = await volumes.adopt(name)
                if name in alive:
                    assert folder is not None
                    assert (folder / "root/marker").read_text() == name
                else:  # its release had begun, or its allocation was not announced
                    await volumes.release(name)
            assert alive <= await volumes.list_owned(), "an allocated volume was lost"
            live = set(os.listdir(base / "live"))
            assert len(live) == len(await volumes.list_owned()) == len(os.listdir(base / "images"))
            assert {Path(path).name for path in mounted_below(base)} == live
            for name in sorted(alive)[3:]:
                await volumes.release(name)
                alive.discard(name)
            await volumes.close()
        assert seen > ROUNDS, "the rounds were too short to show anything"
    finally:
        volumes = Volumes(base, kind="loop", disk_bytes=DISK_BYTES, warm=0, reserve_bytes=0)
        await volumes.start()
        await volumes.close(remove_all=True)
    deadline = time.monotonic() + 5
    while attached_below(base) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    assert attached_below(base) == []
    assert mounted_below(base) == []
    template = f"template-{ext4.TEMPLATE_VERSION}-{DISK_BYTES}.img"
    assert sorted(path.name for path in base.rglob("*")) == ["images", "live", "owners", template]
