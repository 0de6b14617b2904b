"""Hostile archives, and archives of other programs: nothing is ever written outside of the folder."""

from __future__ import annotations

import gzip
import io
import os
import random
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard

from hiverd.files import linux
from hiverd.snapshots import members
from hiverd.snapshots.extracting import LimitError, Limits
from hiverd.snapshots.members import END, Attributes
from hiverd.snapshots.reading import DamagedArchiveError
from support.archives import Taking, extract, look

MINE = Attributes(0o644, os.getuid(), os.getgid(), 10**18)
Add = Callable[..., None]


@contextmanager
def archive(path: Path) -> Iterator[Add]:
    """An archive by our own writer, which writes whatever it is told."""
    pieces: list[bytes] = []

    def add(name: str, kind: bytes = members.REGULAR, content: bytes = b"", link: str = "", **more: object) -> None:
        attributes = MINE._replace(**more)  # type: ignore[arg-type]
        pieces.append(members.header(name.encode(), kind, attributes, size=len(content), link=link.encode()))
        pieces.append(content + members.padding(len(content)))

    yield add
    path.write_bytes(zstandard.ZstdCompressor().compress(b"".join(pieces) + END))


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """What must stay as it is."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_text("untouched")
    before = look(folder)
    yield folder
    assert look(folder) == before


def test_paths_that_lead_out(tmp_path: Path, outside: Path) -> None:
    with archive(tmp_path / "a") as add:
        add("../outside/file", content=b"x")
        add("a/../../outside/file", content=b"x")
        add(str(outside / "file"), content=b"x")
        add("..", members.DIRECTORY)
        add("good/", members.DIRECTORY, mode=0o755)
        add("//good///./file", content=b"good")
    outcome = extract(tmp_path / "a", tmp_path / "out")
    assert outcome.refused == 3
    assert ".." in outcome.first_refusal
    assert (tmp_path / "out" / "good" / "file").read_text() == "good"
    assert (tmp_path / "out" / str(outside)[1:] / "file").read_text() == "x"


def test_links_that_lead_out(tmp_path: Path, outside: Path) -> None:
    with archive(tmp_path / "a") as add:
        add("link", members.SYMLINK, link=str(outside))
        add("link/file", content=b"x")
        add("up", members.SYMLINK, link="..")
        add("up2", members.SYMLINK, link="up/outside")
        add("up2/file", content=b"x")
        add("hard", members.HARD_LINK, link="../outside/file")
        add("hard2", members.HARD_LINK, link=str(outside / "file"))
        add("to", members.SYMLINK, link=str(outside / "file"))
        add("hard3", members.HARD_LINK, link="to")
        add("to", content=b"replaced")
        add("dir", members.SYMLINK, link=str(outside))
        add("dir/", members.DIRECTORY, mode=0o700)
        add("dir/file", content=b"inside")
        add("real/sub/", members.DIRECTORY, mode=0o755)
        add("alias", members.SYMLINK, link="real")
        add("alias/sub/file", content=b"not through a link")
    outcome = extract(tmp_path / "a", tmp_path / "out")
    assert outcome.refused == 3
    assert (tmp_path / "out" / "link" / "file").read_text() == "x"
    assert not (tmp_path / "out" / "link").is_symlink()
    assert (tmp_path / "out" / "to").read_text() == "replaced"
    assert (tmp_path / "out" / "dir" / "file").read_text() == "inside"
    assert not (tmp_path / "out" / "real" / "sub" / "file").exists()
    assert (tmp_path / "out" / "alias" / "sub" / "file").exists()


def test_links_that_are_there_already(tmp_path: Path, outside: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").symlink_to(outside)
    (out / "b").symlink_to(outside / "file")
    os.link(outside / "file", out / "c")
    assert (outside / "file").stat().st_nlink == 2
    with archive(tmp_path / "a") as add:
        add("a/file", content=b"x")
        add("b", content=b"x")
        add("c", content=b"x")
    assert extract(tmp_path / "a", out).refused == 0
    assert {(out / name).read_text() for name in ("a/file", "b", "c")} == {"x"}


def test_the_overflow_of_long_paths(tmp_path: Path, outside: Path) -> None:
    """CVE-2025-4517: a chain of links whose resolved path is longer than PATH_MAX led past the checks."""
    with archive(tmp_path / "a") as add:
        step, path = "d" * 247, ""
        for letter in "abcdefghijklmnop":
            add(f"{path}{step}/", members.DIRECTORY, mode=0o755)
            add(f"{path}{letter}", members.SYMLINK, link=step)
            path += f"{letter}/"
        add(path + "l" * 254, members.SYMLINK, link="../" * 16)
        add("escape", members.SYMLINK, link=path + "l" * 254 + "/../outside")
        add("escape/file", content=b"x")
        add("flag", members.HARD_LINK, link="escape/file")
        add("flag", content=b"x")
    extract(tmp_path / "a", tmp_path / "out")
    assert (tmp_path / "out" / "flag").read_text() == "x"


def test_names_that_are_too_long(tmp_path: Path) -> None:
    with archive(tmp_path / "a") as add:
        add("x" * 256, content=b"x")
        add("y/" * 3000 + "z", content=b"x")
        add("fine", content=b"x")
    outcome = extract(tmp_path / "a", tmp_path / "out")
    assert (outcome.refused, outcome.members) == (2, 1)


def test_devices_and_kernel_folders(tmp_path: Path) -> None:
    with archive(tmp_path / "a") as add:
        add("null", b"3")
        add("disk", b"4")
        add("proc/sys/kernel/core_pattern", content=b"|/evil")
        add("dev/shm/x", content=b"x")
        add("./sys/x", content=b"x")
    outcome = extract(tmp_path / "a", tmp_path / "out")
    assert outcome.refused == 2
    assert list((tmp_path / "out").iterdir()) == []


def test_marks_of_deletion_stay_inside(tmp_path: Path, outside: Path) -> None:
    out = tmp_path / "out"
    (out / "etc").mkdir(parents=True)
    (out / "etc" / "stays").touch()
    (out / "etc" / "goes").mkdir()
    (out / "etc" / "goes" / "link").symlink_to(outside)
    with archive(tmp_path / "a") as add:
        add("etc/", members.DIRECTORY, mode=0o755, xattrs={members.DELETED: b"goes/../.."})
        add("etc/", members.DIRECTORY, mode=0o755, xattrs={members.DELETED: b"goes"})
        add("./", members.DIRECTORY, mode=0o755, xattrs={members.OPAQUE: b"y"})
    outcome = extract(tmp_path / "a", out)
    assert outcome.refused == 1
    assert [path.name for path in (out / "etc").iterdir()] == ["stays"]


@pytest.mark.skipif(os.getuid() != 0, reason="makes a mount")
def test_what_is_mounted_is_never_emptied(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "workspace").mkdir(parents=True)
    linux.mount("tmpfs", str(out / "workspace"), "tmpfs", 0, "size=1m")
    try:
        (out / "workspace" / "precious").touch()
        with archive(tmp_path / "a") as add:
            add("workspace/", members.DIRECTORY, mode=0o755, xattrs={members.OPAQUE: b"y"})
            add("./", members.DIRECTORY, mode=0o755, xattrs={members.DELETED: b"workspace"})
            add("workspace", content=b"a file instead")
            add("workspace/new", content=b"x")
        extract(tmp_path / "a", out)
        assert sorted(path.name for path in (out / "workspace").iterdir()) == ["new", "precious"]
    finally:
        linux.umount(str(out / "workspace"), linux.MNT_DETACH)


def test_bombs(tmp_path: Path) -> None:
    with archive(tmp_path / "a") as add:
        add("zeros", content=bytes(50 << 20))
    with pytest.raises(LimitError):
        extract(tmp_path / "a", tmp_path / "out", limits=Limits(max_members=10, max_bytes=1 << 20))
    assert (tmp_path / "out" / "zeros").stat().st_size <= 2 << 20
    with archive(tmp_path / "b") as add:
        for number in range(20):
            add(f"f{number}")
    with pytest.raises(LimitError):
        extract(tmp_path / "b", tmp_path / "out", limits=Limits(max_members=10, max_bytes=1 << 20))


def test_a_window_that_is_too_large_is_refused(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a").write_bytes(compressor.compress(bytes(1 << 20)) + compressor.flush())
    with pytest.raises(DamagedArchiveError):
        extract(tmp_path / "a", tmp_path / "out")


def _whole(tmp_path: Path) -> bytes:
    tree = tmp_path / "tree"
    (tree / "d").mkdir(parents=True)
    for number in range(20):
        (tree / "d" / f"f{number}").write_bytes(os.urandom(700))
    return Taking(tree, tmp_path / "w").first().finish().read_bytes()


def test_what_is_cut_off_is_damaged(tmp_path: Path) -> None:
    whole = _whole(tmp_path)
    plain = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(whole), read_across_frames=True).read()
    for content in (whole[: len(whole) // 2], whole[:-3], plain[: len(plain) // 2], plain[:-1024], b"", b"nonsense"):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(DamagedArchiveError):
            extract(tmp_path / "a", tmp_path / "out")
    (tmp_path / "a").write_bytes(gzip.compress(plain)[:-4])
    with pytest.raises(DamagedArchiveError):
        extract(tmp_path / "a", tmp_path / "out")


def test_noise_is_damaged_or_refused_and_nothing_else(tmp_path: Path, outside: Path) -> None:
    whole = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(_whole(tmp_path)), read_across_frames=True).read()
    chance = random.Random(7)
    for _ in range(300):
        noisy = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            noisy[chance.randrange(len(noisy))] = chance.randrange(256)
        (tmp_path / "a").write_bytes(noisy)
        try:
            extract(tmp_path / "a", tmp_path / "out")
        except DamagedArchiveError:
            continue


@pytest.mark.parametrize(
    "records",
    [
        b"10 path=x",
        b"99 path=x\n",
        b"0 path=x\n",
        b" path=x\n",
        b"9999999999999999999999999 path=x\n",
        members.record(b"size", b"-5"),
        members.record(b"uid", b"many"),
        members.record(b"mtime", b"1.2.3"),
        members.record(b"GNU.sparse.major", b"0") + members.record(b"GNU.sparse.minor", b"1"),
        members.record(b"GNU.sparse.major", b"1") + members.record(b"GNU.sparse.minor", b"0"),
    ],
)
def test_records_that_make_no_sense(tmp_path: Path, records: bytes) -> None:
    block = members.header(b"file", members.REGULAR, MINE._replace(mtime_ns=0), records=records)
    (tmp_path / "a").write_bytes(block + END)
    with pytest.raises(DamagedArchiveError):
        extract(tmp_path / "a", tmp_path / "out")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_archives_of_other_programs(tmp_path: Path, form: int) -> None:
    tree = tmp_path / "tree"
    (tree / "d").mkdir(parents=True)
    (tree / "d" / "file").write_text("text")
    os.link(tree / "d" / "file", tree / "hard")
    (tree / "soft").symlink_to("d/file")
    if form != tarfile.USTAR_FORMAT:
        (tree / ("l" * 200)).write_text("long")
    os.utime(tree / "d", (10**9, 10**9))
    with tarfile.open(tmp_path / "a", "w:gz", format=form) as tar:
        for name in sorted(os.listdir(tree)):
            tar.add(tree / name, name)
    assert extract(tmp_path / "a", tmp_path / "out").refused == 0
    assert {name: found[0] for name, found in look(tmp_path / "out").items()} == {
        name: found[0] for name, found in look(tree).items()
    }
    assert (tmp_path / "out" / "d").stat().st_mtime == 10**9
    assert (tmp_path / "out" / "hard").samefile(tmp_path / "out" / "d" / "file")


def test_patterns_filter(tmp_path: Path) -> None:
    with archive(tmp_path / "a") as add:
        for name in ("workspace/a/x", "workspace/b/x", "root/x", "workspaces/x"):
            add(name, content=b"x")
    assert extract(tmp_path / "a", tmp_path / "out", ("/workspace/a/**", "/root")).members == 2
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("x")}
    assert found == {"workspace/a/x", "root/x"}


def test_a_tree_that_is_too_deep_to_be_removed_stays(tmp_path: Path) -> None:
    """As deep as a name can be: neither recursion nor descriptors run out."""
    deep = "/".join(["a"] * 2000)
    with archive(tmp_path / "a") as add:
        add(deep, members.DIRECTORY, mode=0o755)
        add("a", content=b"in its place")
        add("next", content=b"goes on")
    outcome = extract(tmp_path / "a", tmp_path / "to")
    assert outcome.refused == 1
    assert (tmp_path / "to" / "a").is_dir()
    assert (tmp_path / "to" / "next").read_bytes() == b"goes on"
    subprocess.run(["rm", "-r", tmp_path / "to"], check=True)  # too deep for pytest as well
