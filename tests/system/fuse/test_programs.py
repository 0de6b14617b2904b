"""Programs that people use, on a governed mount."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from support.fuse_mount import FuseFixture
from system.fuse.conftest import MakeMount

ALMOST_OPEN = (("/**", "rw"), ("/docs/**", "ro"), ("/secret/**", "deny"))


@pytest.fixture
def at(mount: MakeMount) -> Path:
    return mount(ALMOST_OPEN).path


def run(*command: str | Path, cwd: Path | None = None) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_tree(at: Path, files: int = 200) -> None:
    for number in range(files):
        path = at / f"d{number % 7}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(number * 13))
    (at / "link").symlink_to("d0/0.txt")
    (at / "d0" / "0.txt").chmod(0o755)


def same_tree(one: Path, other: Path) -> None:
    run("diff", "-r", "--no-dereference", one, other)
    for path in one.rglob("*"):
        assert os.lstat(path).st_mode == os.lstat(other / path.relative_to(one)).st_mode


def test_git(at: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tree(source)
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.test")
    run("git", "init", "-q", ".", cwd=source)
    run("git", "add", "-A", cwd=source)
    run("git", *identity, "commit", "-qm", "one", cwd=source)
    run("git", "clone", "-q", source, at / "clone")
    (at / "clone" / "new").write_text("x")
    run("git", "add", "-A", cwd=at / "clone")
    run("git", *identity, "commit", "-qm", "two", cwd=at / "clone")
    run("git", "gc", "-q", cwd=at / "clone")
    run("git", "fsck", "--strict", cwd=at / "clone")
    assert run("git", "status", "--porcelain", cwd=at / "clone") == ""
    assert run("git", "log", "--format=%s", cwd=at / "clone").split() == ["two", "one"]


def test_npm(at: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "package.json").write_text('{"name": "local-one", "version": "1.0.0", "bin": {"one": "one.js"}}')
    (package / "one.js").write_text("#!/usr/bin/env node\nconsole.log('ran')\n")
    run("npm", "pack", "--pack-destination", tmp_path, cwd=package)
    project = at / "project"
    project.mkdir()
    (project / "package.json").write_text('{"name": "p", "version": "1.0.0"}')
    tarball = tmp_path / "local-one-1.0.0.tgz"
    run("npm", "install", "--offline", "--no-audit", "--no-fund", tarball, cwd=project)
    assert run("node", "node_modules/.bin/one", cwd=project) == "ran\n"


@pytest.mark.parametrize("journal", ["delete", "wal", "truncate"])
def test_sqlite(at: Path, journal: str) -> None:
    code = (
        "import sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1], timeout=60)\n"
        "for _ in range(30):\n"
        "    with db: db.execute('update t set n = n + 1')\n"
    )
    path = at / "db"
    with sqlite3.connect(path) as database:
        assert database.execute(f"pragma journal_mode={journal}").fetchone() == (journal,)
        database.execute("create table t (n)")
        database.execute("insert into t values (0)")
    database.close()
    writers = [subprocess.Popen([sys.executable, "-c", code, path]) for _ in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    database = sqlite3.connect(path)
    try:
        assert database.execute("select n from t").fetchone() == (120,)
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    finally:
        database.close()


def test_tar_and_rsync(at: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tree(source)
    run("tar", "-C", source, "-cf", tmp_path / "a.tar", ".")
    (at / "unpacked").mkdir()
    run("tar", "-C", at / "unpacked", "-xpf", tmp_path / "a.tar")
    same_tree(source, at / "unpacked")
    run("rsync", "-a", f"{source}/", at / "copied")
    same_tree(source, at / "copied")
    (source / "d1" / "more").write_text("x")
    run("rsync", "-a", "--delete", f"{source}/", at / "copied")
    same_tree(source, at / "copied")
    run("cp", "-a", at / "copied", at / "again")
    same_tree(source, at / "again")
    run("rm", "-r", at / "copied", at / "again", at / "unpacked")
    assert os.listdir(at) == []


def test_editors_save_by_renaming(at: Path) -> None:
    path = at / "notes"
    path.write_text("old")
    with open(path, encoding="utf-8") as reader:
        with open(at / ".notes.swp", "w", encoding="utf-8") as file:
            file.write("new")
            file.flush()
            os.fsync(file.fileno())
        os.rename(path, at / "notes~")
        os.rename(at / ".notes.swp", path)
        os.unlink(at / "notes~")
        assert (reader.read(), path.read_text(), os.listdir(at)) == ("old", "new", ["notes"])
    run("vim", "-u", "NONE", "-es", "-c", "normal oline", "-c", "wq", path)
    assert path.read_text() == "new\nline\n"


_HAMMER = """
import os, random, sys
number, chance = int(sys.argv[1]), random.Random(sys.argv[1])
os.makedirs(f"p{number}", exist_ok=True)
for turn in range(150):
    name = f"shared/{chance.randrange(20)}"
    own = f"p{number}/{turn}"
    with open(own, "w") as file: file.write(own * 50)
    assert open(own).read() == own * 50
    for step in (
        lambda: os.rename(own, name), lambda: os.unlink(name), lambda: open(name).read(),
        lambda: os.listdir("shared"), lambda: os.rename(f"p{number}", f"q{number}"), lambda: os.stat(own),
        lambda: os.rename(f"q{number}", f"p{number}"), lambda: os.mkdir(name), lambda: os.rmdir(name),
    ):
        try: step()
        except OSError: pass
    os.makedirs(f"p{number}", exist_ok=True)
"""


@pytest.mark.parametrize("threads", [1, 8])
def test_eight_processes_at_once(mount: MakeMount, threads: int) -> None:
    governed: FuseFixture = mount(ALMOST_OPEN, threads=threads)
    (governed.path / "shared").mkdir()
    idle = governed.ask("descriptors")
    workers = [subprocess.Popen([sys.executable, "-c", _HAMMER, str(number)], cwd=governed.path) for number in range(8)]
    for number in range(10):
        governed.set_rules(*(ALMOST_OPEN if number % 2 else (("/**", "rw"), ("/shared/x/**", "deny"))))
    assert [worker.wait() for worker in workers] == [0] * 8
    run("diff", "-r", governed.folder, governed.path)
    shutil.rmtree(governed.path / "shared")
    for left in os.listdir(governed.path):
        shutil.rmtree(governed.path / left)
    assert os.listdir(governed.folder) == []
    # The last few directories are let go of with the next ones.
    assert governed.ask("descriptors") <= idle + 2 * threads + 2
