"""Beginning and end of a mount, and that it takes no more of anything than it should."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from support.waiting import until
from system.fuse.conftest import MakeMount
from system.fuse.scenarios import tried


def test_an_aborted_mount_answers_at_once(mount: MakeMount) -> None:
    governed = mount()
    (governed.path / "f").write_text("x")
    with open(governed.path / "f", encoding="utf-8") as held:
        assert governed.ask("abort") is True, "the threads have ended"
        assert tried(os.fstatvfs, held.fileno()) == "ENOTCONN"
    assert os.listdir(governed.path) == []


def test_unmounting_from_outside_ends_it(mount: MakeMount) -> None:
    governed = mount()
    subprocess.run(["umount", governed.path], check=True)
    until(lambda: governed.ask("threads") == 0, seconds=10, what="the serving threads end")


def test_the_kernel_lets_go_of_nodes(mount: MakeMount) -> None:
    governed = mount([("/**", "rw"), ("/x", "ro")])
    (governed.path / "d").mkdir()
    for number in range(500):
        (governed.path / "d" / f"{number}").touch()
    assert governed.ask("nodes") == 502
    for number in range(500):
        (governed.path / "d" / f"{number}").unlink()
    (governed.path / "d").rmdir()
    until(lambda: governed.ask("nodes") == 1, seconds=10, what="no node but the mount's own")


def test_many_directories_take_a_bounded_number_of_descriptors(mount: MakeMount) -> None:
    governed = mount([("/**", "rw"), ("/x", "ro")], descriptors=16)
    for number in range(100):
        (governed.path / f"a{number}" / "b").mkdir(parents=True)
        (governed.path / f"a{number}" / "b" / "f").write_text(f"{number}")
    assert governed.ask("descriptors") < 60
    assert [(governed.path / f"a{n}/b/f").read_text() for n in range(100)] == [f"{n}" for n in range(100)]
    assert governed.ask("descriptors") < 60


def test_a_folder_that_moves_stays_mounted(mount: MakeMount, tmp_path: Path) -> None:
    governed = mount()
    os.rename(governed.folder, tmp_path / "moved")
    (governed.path / "f").write_text("x")
    assert (tmp_path / "moved" / "f").read_text() == "x"
