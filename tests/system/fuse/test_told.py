"""What is told of a mount, what the server itself may, and whose folder it is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from support.fuse_mount import FuseFixture
from system.fuse.conftest import RULES, MakeMount
from system.fuse.scenarios import opened, tried


def test_the_server_is_not_judged_and_leaves_nothing_behind(governed: FuseFixture) -> None:
    at = governed.path
    governed.events()
    governed.server_is(os.getpid())
    assert (at / "secret/c").read_text() == "content of secret/c"
    assert sorted(os.listdir(at)) == [".env", "docs", "secret", "src"]
    (at / "docs/by-server").write_text("x")
    with opened(at / "secret/deep", os.O_RDONLY) as held:
        assert governed.events() == []
        other = subprocess.run(
            ["/bin/sh", "-c", f"cd {at}; ls -a; cat secret/c; cat secret/deep/d; echo x > docs/by-server"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert other.stdout.split() == [".", "..", "docs", "src"]
        assert other.stderr.count("No such file") == 2
        assert other.stderr.count("Read-only") == 1
        assert os.listdir(held) == ["d"]
    governed.server_is(None)
    assert tried(os.stat, at / "secret/c") == "ENOENT"


def test_what_the_server_reads_is_not_left_for_those_who_had_it_open(mount: MakeMount, folder: Path) -> None:
    governed = mount([("/**", "rw")], folder=folder)
    with subprocess.Popen(
        ["/bin/sh", "-c", "exec 3< secret/c; echo open; read x; cat <&3"],
        cwd=governed.path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        governed.set_rules(*RULES)
        governed.server_is(os.getpid())
        assert (governed.path / "secret/c").read_text() == "content of secret/c"
        rest, _ = other.communicate("\n")
    assert rest == ""


def test_events(governed: FuseFixture) -> None:
    at = governed.path
    os.listdir(at)
    (at / "src/touched").touch()
    (at / "src/new").write_text("x")
    (at / "docs/b").read_text()
    os.mkdir(at / "d")
    os.symlink("x", at / "l")
    os.rename(at / "l", at / "l2")
    os.unlink(at / "l2")
    os.rmdir(at / "d")
    os.chmod(at / "src/new", 0o600)
    assert governed.events() == [
        ("allowed", "/", "read"),
        ("allowed", "/src/new", "write"),
        ("allowed", "/docs/b", "read"),
        ("allowed", "/d", "write"),
        ("allowed", "/l", "write"),
        ("allowed", "/l2", "write"),
        ("allowed", "/l", "delete"),
        ("allowed", "/l2", "delete"),
        ("allowed", "/d", "delete"),
    ]
    for way in (
        lambda: os.stat(at / "secret"),
        lambda: os.open(at / "docs/b", os.O_WRONLY),
        lambda: os.mkdir(at / "docs/d"),
        lambda: os.truncate(at / "docs/b", 0),
        lambda: os.chmod(at / "docs/b", 0o777),
        lambda: os.unlink(at / "docs/b"),
    ):
        tried(way)
    assert governed.events() == [
        ("denied", "/secret", "read"),
        ("denied", "/docs/b", "write"),
        ("denied", "/docs/d", "write"),
        ("denied", "/docs/b", "write"),
        ("denied", "/docs/b", "delete"),
    ]
    assert tried(os.rmdir, at / "src") == "ENOTEMPTY"
    assert governed.errors() == [("/src", "delete", "Directory not empty")]
    assert tried(os.stat, at / "secret") == tried(os.stat, at / "secret") == "ENOENT"
    assert governed.events() == [("denied", "/secret", "read")] * 2, "every attempt is told"


def test_large_directories_are_one_read(governed: FuseFixture) -> None:
    for number in range(2000):
        (governed.folder / "src" / f"{number}").touch()
    governed.events()
    assert len(os.listdir(governed.path / "src")) == 2002
    assert governed.events() == [("allowed", "/src", "read")]


def test_the_operators_folder_keeps_its_owners(mount: MakeMount, folder: Path) -> None:
    os.chown(folder, 1234, 1235)
    os.chown(folder / "src/a", 1234, 1235)
    governed = mount([("/**", "rw")], folder=folder, folder_owner=True, shared=True)
    at = governed.path
    os.chown(at, 5000, 5001)
    assert (os.stat(folder).st_uid, os.stat(folder).st_gid) == (1234, 1235)
    shown = {name: (os.stat(at / name).st_uid, os.stat(at / name).st_gid) for name in (".", "src/a", "docs")}
    assert shown == {".": (5000, 5001), "src/a": (5000, 5001), "docs": (65534, 65534)}
    os.chown(at / "docs", 1, 1)
    assert os.stat(folder / "docs").st_uid == 0
    subprocess.run(["/bin/sh", "-c", "echo x > made; mkdir made.d"], cwd=at, user=5000, group=5001, check=True)
    assert {(os.stat(folder / name).st_uid, os.stat(folder / name).st_gid) for name in ("made", "made.d")} == {
        (1234, 1235)
    }


def test_changes_from_outside_show(mount: MakeMount, folder: Path) -> None:
    governed = mount([("/**", "rw")], folder=folder, shared=True)
    path = governed.path / "src/a"
    assert path.read_text() == "content of src/a"
    (folder / "src/a").write_text("from outside")
    governed.ask("invalidate", "/src/a")
    assert path.read_text() == "from outside"
    (folder / "src/a").unlink()
    (folder / "src/a").symlink_to("/etc/hostname")
    governed.ask("invalidate", "/src/a")
    assert os.readlink(path) == "/etc/hostname"
