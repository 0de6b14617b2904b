"""From folders to archives and back, with our extractor and with others'."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import tarfile
import time
from contextlib import closing
from pathlib import Path

import pytest
import zstandard

from hiverd.snapshots.capture import Part, TooManyMembersError
from hiverd.snapshots.spool import Compression, SpoolFullError
from support.archives import Taking, extract, look
from support.waiting import until


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    (folder / "inner" / "deep").mkdir(parents=True)
    (folder / "file").write_text("text")
    (folder / "empty").touch()
    (folder / "file").chmod(0o640)
    (folder / "large").write_bytes(os.urandom(5 << 20) + b"end")
    os.link(folder / "file", folder / "inner" / "hard")
    (folder / "soft").symlink_to("inner/hard")
    (folder / "broken").symlink_to("/" + "x" * 200)
    os.mkfifo(folder / "pipe", 0o600)
    (folder / ("n" * 200)).write_text("long")
    (folder / "inner" / "deep" / ("d" * 150)).mkdir()
    (folder / "umlaut-\u00fc").write_text("\u00fc")
    os.close(os.open(os.fsencode(folder) + b"/\xff\xfe", os.O_CREAT | os.O_WRONLY, 0o600))
    with (folder / "sparse").open("wb") as file:
        file.truncate(50 << 20)
        file.seek(10 << 20)
        file.write(b"in the middle")
    os.utime(folder / "file", ns=(981173106123456789, 981173106123456789))
    os.utime(folder / "inner" / "deep", ns=(10**18, 10**18))
    (folder / "inner" / "deep").chmod(0o555)
    return folder


@pytest.mark.parametrize("compression", ["zstd", "gzip"])
def test_everything_comes_back(tree: Path, tmp_path: Path, compression: Compression) -> None:
    archive = Taking(tree, tmp_path / "a", compression=compression).first().finish()
    outcome = extract(archive, tmp_path / "out")
    assert outcome.refused == 0, outcome
    assert look(tmp_path / "out") == look(tree)
    assert (tmp_path / "out" / "sparse").stat().st_blocks < 1000
    assert archive.stat().st_size < 6 << 20


@pytest.mark.parametrize(("compression", "option"), [("zstd", "--zstd"), ("gzip", "-z")])
def test_tar_reads_it(tree: Path, tmp_path: Path, compression: Compression, option: str) -> None:
    if shutil.which("tar") is None or (compression == "zstd" and shutil.which("zstd") is None):
        pytest.skip("needs tar and zstd")
    archive = Taking(tree, tmp_path / "a", compression=compression).first().finish()
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        ["tar", option, "-xpf", archive, "-C", tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert look(tmp_path / "out") == look(tree)


def test_python_reads_it(tree: Path, tmp_path: Path) -> None:
    archive = Taking(tree, tmp_path / "a", compression="gzip").first().finish()
    with tarfile.open(archive) as tar:
        names = {member.name for member in tar.getmembers()}
        file = tar.extractfile("sparse")
        assert file is not None
        assert file.read() == (tree / "sparse").read_bytes()
    assert {"file", "inner/hard", "soft", "n" * 200, "umlaut-\u00fc"} <= names


def test_attributes_of_files(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").touch()
    try:
        os.setxattr(tree / "file", "user.note", b"a=b\n\0c")
        os.setxattr(tree, "user.of-the-root", b"1")
        os.setxattr(tree / "file", "user.hiver.deleted", b"etc")
    except OSError:
        pytest.skip("no extended attributes here")
    extract(Taking(tree, tmp_path / "a").first().finish(), tmp_path / "out")
    assert os.getxattr(tmp_path / "out" / "file", "user.note") == b"a=b\n\0c"
    assert os.listxattr(tmp_path / "out" / "file") == ["user.note"]


def test_what_changes_between_passes_is_as_it_was_last(tree: Path, tmp_path: Path) -> None:
    taking = Taking(tree, tmp_path / "a").first()
    (tree / "file").write_text("longer text")
    (tree / "empty").unlink()
    (tree / "large").unlink()
    (tree / "inner" / "new").write_text("new")
    (tree / "soft").unlink()
    (tree / "soft").mkdir()
    (tree / "soft" / "in").write_text("in")
    (tree / "pipe").rename(tree / "pipe2")
    os.link(tree / "umlaut-\u00fc", tree / "a-name-before-it")
    taking.again()
    (tree / "file").write_text("last")
    shutil.rmtree(tree / "soft")
    (tree / "soft").write_text("now a file")
    archive = taking.again().finish()
    extract(archive, tmp_path / "out")
    assert look(tmp_path / "out") == look(tree)
    with tarfile.open(fileobj=_inflated(archive)) as tar:
        files = [member.name for member in tar.getmembers() if not member.isdir()]
    assert len(files) == len(set(files))
    assert "empty" not in files


def test_what_changed_a_moment_before_it_was_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel whose clock is coarse would give another change in the same moment the same time."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_text("a")
    with closing(Taking(tree, tmp_path / "a").first()) as taking:
        assert taking.capture.compare().changed == [(0, b"file")]
    later = time.time_ns() + 10**9
    monkeypatch.setattr(time, "time_ns", lambda: later)
    with closing(Taking(tree, tmp_path / "b").first()) as taking:
        assert taking.capture.compare().changed == []


def test_the_last_link_that_is_left_holds_the_data(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").write_text("data")
    for name in "bcd":
        os.link(tree / "a", tree / name)
    taking = Taking(tree, tmp_path / "x").first()
    (tree / "a").unlink()
    (tree / "c").unlink()
    extract(taking.again().finish(), tmp_path / "out")
    assert look(tmp_path / "out") == look(tree)


def test_patterns_choose(tree: Path, tmp_path: Path) -> None:
    def names(*include: str) -> set[str]:
        archive = Taking(tree, tmp_path / "a", place="workspace", include=include).first().finish()
        with tarfile.open(fileobj=_inflated(archive)) as tar:
            return {member.name for member in tar.getmembers()}

    deep = f"workspace/inner/deep/{'d' * 150}"
    assert names("/workspace/inner/**") == {"workspace/inner", "workspace/inner/hard", "workspace/inner/deep", deep}
    assert names("/workspace/inner/deep/*", "/workspace/file") == {"workspace/inner/deep", deep, "workspace/file"}
    assert names("workspace/umlaut*") == {"workspace/umlaut-\u00fc"}
    assert names("/other/**") == set()
    assert "workspace/large" in names("/**")


def test_sockets_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    monkeypatch.chdir(tree)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        taking = Taking(tree, tmp_path / "a").first()
    assert taking.capture.counts.left_out == 1
    taking.close()


def test_whoever_waits_at_a_pipe_goes_on_waiting(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    os.mkfifo(tree / "pipe")
    writer = subprocess.Popen(["sh", "-c", f"echo text > {tree}/pipe"])
    try:
        until(lambda: Path(f"/proc/{writer.pid}/wchan").exists(), seconds=5, what="the writer")
        for _ in range(20):
            Taking(tree, tmp_path / "a").first().again().finish()
            time.sleep(0.01)  # it has time to notice a reader
        assert writer.poll() is None
        assert (tree / "pipe").read_text() == "text\n"
    finally:
        writer.kill()
        writer.wait()


def test_an_overlay_tells_what_was_deleted(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    (upper / "etc").mkdir(parents=True)
    (upper / "srv").mkdir()
    (upper / "srv" / "new").write_text("new")
    try:
        os.mknod(upper / "etc" / "gone", 0o020000, 0)
        os.setxattr(upper / "srv", "trusted.overlay.opaque", b"y")
    except PermissionError:
        pytest.skip("needs root")
    part = Part(place="", folder=str(upper), overlay=True)
    archive = Taking(upper, tmp_path / "a", parts=[part]).first().finish()
    image = tmp_path / "out"
    (image / "etc").mkdir(parents=True)
    (image / "srv" / "old").mkdir(parents=True)
    for name in ("etc/gone", "etc/stays", "srv/old/file"):
        (image / name).touch()
    assert extract(archive, image).refused == 0
    assert sorted(str(path.relative_to(image)) for path in image.rglob("*")) == ["etc", "etc/stays", "srv", "srv/new"]


def test_links_in_the_way_lead_nowhere(tmp_path: Path) -> None:
    """A folder that becomes a link while it is read is not followed."""
    tree = tmp_path / "tree"
    (tree / "folder").mkdir(parents=True)
    (tree / "folder" / "file").write_text("mine")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").write_text("of the host")
    taking = Taking(tree, tmp_path / "a").first()
    changes = taking.capture.compare()
    changes.changed.append((0, b"folder/file"))
    shutil.rmtree(tree / "folder")
    (tree / "folder").symlink_to("../secret")
    taking.capture.take(changes)
    extract(taking.finish(), tmp_path / "out")
    assert not (tmp_path / "out" / "folder" / "file").exists()
    base = Taking(tree, tmp_path / "b", include=("/folder/**",)).first()
    extract(base.finish(), tmp_path / "out2")
    assert os.readlink(tmp_path / "out2" / "folder") == "../secret"


def test_bounds(tree: Path, tmp_path: Path) -> None:
    few = Taking(tree, tmp_path / "a", max_members=3)
    with pytest.raises(TooManyMembersError):
        few.first()
    few.close()
    small = Taking(tree, tmp_path / "b", max_bytes=1 << 20)
    with pytest.raises(SpoolFullError):
        small.first().again().finish()
    small.close()


def _inflated(archive: Path) -> io.BytesIO:
    with zstandard.ZstdDecompressor().stream_reader(archive.open("rb"), read_across_frames=True) as stream:
        return io.BytesIO(stream.read())
