"""What a sandbox can put in the way of the file API: links, special files, the kernel's file systems, odd owners.

These tests run as root. Names are such that a broken server finds nothing of the host's under them: no real file may
be named here, and kernel switches only if they refuse what is written.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from unit.files.namespaced import FIRST_ID, NamespacedRoot
from unit.files.rig import FakeSandbox, FolderSandbox, NamespacedWorkload, client_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces")


_MOUNTINFO = "result = open('/proc/self/mountinfo').read().splitlines()"


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[NamespacedRoot]:
    with NamespacedRoot(tmp_path) as root:
        yield root


@pytest.fixture
async def client(inside: NamespacedRoot) -> AsyncIterator[httpx.AsyncClient]:
    sandbox = FakeSandbox(NamespacedWorkload(inside), [("/hiver-workspace", "local")])
    async with client_of(sandbox) as client:
        yield client


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the host's, by its absolute path."""
    path = tmp_path / "secret"
    path.write_text("the host's secret")
    return path


@pytest.mark.parametrize("folder", ["hiver-workspace", "hiver-data", "hiver-workspace/new"])
async def test_files_belong_to_the_sandboxes_root(
    client: httpx.AsyncClient, inside: NamespacedRoot, folder: str
) -> None:
    """On a tmpfs of the sandbox's own, the host's root could not even create a file."""
    assert (await client.post(f"/file/{folder}/f", content=b"hello")).status_code == 200
    seen = inside.run(
        f"s = os.stat('/{folder}/f'); result = [s.st_uid, s.st_gid, s.st_mode, open('/{folder}/f').read()]"
    )
    assert seen == [0, 0, stat.S_IFREG | 0o644, "hello"]
    inside.run(f"open('/{folder}/f', 'w').write('changed by the sandbox')")
    assert (await client.get(f"/file/{folder}/f")).content == b"changed by the sandbox"
    assert (await client.post(f"/file/{folder}/f", content=b"again")).status_code == 200
    assert inside.run(f"result = os.listdir('/{folder}')") == ["f"]
    assert (await client.delete(f"/file/{folder}/f")).status_code == 204
    assert inside.run(f"result = os.listdir('/{folder}')") == []


async def test_folders_of_other_users_inside(client: httpx.AsyncClient, inside: NamespacedRoot) -> None:
    inside.run("os.mkdir('/hiver-home'); os.chown('/hiver-home', 1000, 1000); os.chmod('/hiver-home', 0o700)")
    inside.run("open('/hiver-home/old', 'w').write('old'); os.chown('/hiver-home/old', 1000, 1000)")
    inside.run("os.chmod('/hiver-home/old', 0o600)")
    assert (await client.post("/file/hiver-home/new", content=b"new")).status_code == 200
    assert (await client.post("/file/hiver-home/old", content=b"newer")).status_code == 200
    seen = inside.run(
        "result = [[os.stat(f'/hiver-home/{n}').st_uid, os.stat(f'/hiver-home/{n}').st_mode] for n in ('new', 'old')]"
    )
    assert seen == [[0, stat.S_IFREG | 0o644], [1000, stat.S_IFREG | 0o600]]


@pytest.mark.parametrize("climb", ["{path}", "../../../../../../../../..{path}", "/proc/1/root{path}"])
async def test_links_stay_inside(client: httpx.AsyncClient, inside: NamespacedRoot, secret: Path, climb: str) -> None:
    target = climb.format(path=secret)
    folder = climb.format(path=secret.parent)
    inside.run(f"os.symlink({target!r}, '/hiver-workspace/file'); os.symlink({folder!r}, '/hiver-workspace/folder')")
    before = sorted(os.listdir(secret.parent))
    for answer in (
        await client.get("/file/hiver-workspace/file"),
        await client.get("/file/hiver-workspace/folder/secret"),
        await client.post("/file/hiver-workspace/file", content=b"overwritten"),
        await client.post("/file/hiver-workspace/folder/secret", content=b"overwritten"),
        await client.post("/file/hiver-workspace/folder/new", content=b"new"),
        await client.delete("/file/hiver-workspace/folder/secret"),
        await client.get("/directories?path=/hiver-workspace/folder"),
    ):
        assert answer.status_code in {400, 404}, answer.text
        assert "the host's secret" not in answer.text
    assert secret.read_text() == "the host's secret"
    assert sorted(os.listdir(secret.parent)) == before


async def test_links_are_followed_inside(client: httpx.AsyncClient, inside: NamespacedRoot) -> None:
    inside.run("""
os.makedirs('/hiver-workspace/a/b')
open('/hiver-data/target', 'w').write('through a link')
os.symlink('/hiver-data/target', '/hiver-workspace/absolute')
os.symlink('../../../../hiver-data/target', '/hiver-workspace/a/b/relative')
os.symlink('absolute', '/hiver-workspace/twice')
os.symlink('/hiver-data', '/hiver-workspace/folder')
os.symlink('/hiver-data/none', '/hiver-workspace/dangling')
os.symlink('folder/../fromlink', '/hiver-workspace/dots')
""")
    for path in ("absolute", "a/b/relative", "twice", "folder/target"):
        assert (await client.get(f"/file/hiver-workspace/{path}")).text == "through a link"
    assert (await client.get("/directories?path=/hiver-workspace/folder")).json()["entries"][0]["name"] == "target"

    assert (await client.post("/file/hiver-workspace/twice", content=b"written through")).status_code == 200
    assert inside.run("result = open('/hiver-data/target').read()") == "written through"
    assert inside.run(
        "result = os.path.islink('/hiver-workspace/twice') and os.path.islink('/hiver-workspace/absolute')"
    )
    assert (await client.post("/file/hiver-workspace/dangling", content=b"made")).status_code == 200
    assert inside.run("result = open('/hiver-data/none').read()") == "made"
    # `..` behind a link is the parent of where the link leads, as open(2) has it.
    assert (await client.post("/file/hiver-workspace/dots", content=b"dots")).status_code == 200
    assert inside.run("result = os.listdir('/')").count("fromlink") == 1


async def test_loops_and_long_chains(client: httpx.AsyncClient, inside: NamespacedRoot) -> None:
    inside.run("os.symlink('loop', '/hiver-workspace/loop'); os.symlink('/hiver-data/', '/hiver-workspace/slash')")
    inside.run("[os.symlink(f'l{i + 1}', f'/hiver-workspace/l{i}') for i in range(60)]")
    for name in ("loop", "l0", "l0/x"):
        assert (await client.get(f"/file/hiver-workspace/{name}")).status_code == 400
        assert (await client.post(f"/file/hiver-workspace/{name}", content=b"x")).status_code == 400
    assert (await client.post("/file/hiver-workspace/slash", content=b"x")).status_code == 400


@pytest.mark.parametrize(
    "path",
    [
        "/proc/1/environ",
        "/proc/self/environ",
        "/proc/version",
        "/proc/kcore",
        "/proc/sys/vm/swappiness",
        "/proc/1/root/hiver-none",
        "/proc/1/fd/0",
        "/proc/1/mem",
        "/sys/kernel/uevent_seqnum",
    ],
)
async def test_the_kernels_files_are_not_served(client: httpx.AsyncClient, inside: NamespacedRoot, path: str) -> None:
    inside.run(f"os.symlink({path!r}, '/hiver-workspace/link')")
    for url in (f"/file{path}", "/file/hiver-workspace/link"):
        read = await client.get(url)
        assert read.status_code in {400, 404}, read.text
        written = await client.post(url, content=b"x")
        assert written.status_code in {400, 403, 404}, written.text
    assert (await client.delete(f"/file{path}")).status_code in {400, 403, 404}
    inside.run("os.unlink('/hiver-workspace/link'); os.symlink('/proc', '/hiver-workspace/link')")
    assert (await client.post("/file/hiver-workspace/link/made/here", content=b"x")).status_code == 400


async def test_listing_proc_tells_nothing_about_the_host(client: httpx.AsyncClient, inside: NamespacedRoot) -> None:
    entries = (await client.get("/directories?path=/proc")).json()["entries"]
    assert {entry["name"] for entry in entries if entry["name"].isdigit()} == {"1"}


async def test_special_files_are_never_opened(client: httpx.AsyncClient, inside: NamespacedRoot) -> None:
    inside.run("""
os.mkfifo('/hiver-workspace/fifo')
sock = socket.socket(socket.AF_UNIX); sock.bind('/hiver-workspace/socket'); sock.listen()
os.symlink('fifo', '/hiver-workspace/link')
""")
    started = time.monotonic()
    for name in ("fifo", "socket", "link"):
        assert (await client.get(f"/file/hiver-workspace/{name}")).status_code == 404
        assert (await client.post(f"/file/hiver-workspace/{name}", content=b"x")).status_code == 400
        assert (await client.get(f"/directories?path=/hiver-workspace/{name}")).status_code == 400
        assert (await client.post(f"/file/hiver-workspace/{name}/below", content=b"x")).status_code == 400
    assert time.monotonic() - started < 2
    assert sorted(inside.run("result = os.listdir('/hiver-workspace')")) == ["fifo", "link", "socket"]
    assert (await client.delete("/file/hiver-workspace/fifo")).status_code == 204


async def test_a_lease_does_not_hold_the_server(client: httpx.AsyncClient, inside: NamespacedRoot) -> None:
    """Opening a file that is leased waits for its holder, 45 seconds by default, unless told otherwise."""
    inside.run("""
signal.signal(signal.SIGIO, signal.SIG_IGN)
leased = open('/hiver-workspace/leased', 'w')
fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_WRLCK)
""")
    started = time.monotonic()
    answer = await client.get("/file/hiver-workspace/leased")
    assert answer.status_code == 409, answer.text
    assert time.monotonic() - started < 2


async def test_a_file_that_is_a_mount_of_its_own(client: httpx.AsyncClient, inside: NamespacedRoot) -> None:
    """Like `/etc/hosts` in many containers: it cannot be replaced, so its content is."""
    inside.run("""
open('/hiver-data/hosts', 'w').write('a long original')
open('/hiver-hosts', 'w').close()
mount('/hiver-data/hosts', '/hiver-hosts', '', 4096)
""")
    assert (await client.post("/file/hiver-hosts", content=b"short")).status_code == 200
    assert inside.run("result = open('/hiver-data/hosts').read()") == "short"
    assert inside.run("result = open('/hiver-hosts').read()") == "short"
    assert not [name for name in inside.run("result = os.listdir('/')") if name.startswith(".hiver")]
    for path in ("hiver-hosts", "hiver-data"):
        inside.run("os.unlink('/hiver-data/hosts')") if path == "hiver-data" else None
        busy = await client.delete(f"/file/{path}")
        assert busy.status_code == 409, path
        assert "mount" in busy.json()["error"]
    assert {"/hiver-hosts", "/hiver-data"} <= {line.split()[4] for line in inside.run(_MOUNTINFO)}


async def test_a_kernel_file_mounted_elsewhere(client: httpx.AsyncClient, inside: NamespacedRoot) -> None:
    inside.run(
        "open('/hiver-workspace/f', 'w').close(); mount('/proc/sys/vm/swappiness', '/hiver-workspace/f', '', 4096)"
    )
    assert (await client.get("/file/hiver-workspace/f")).status_code == 404
    written = await client.post("/file/hiver-workspace/f", content=b"x")
    assert written.status_code == 400
    assert "kernel" in written.json()["error"]
    assert not [name for name in inside.run("result = os.listdir('/hiver-workspace')") if name.startswith(".hiver")]


async def test_read_only_mounts(client: httpx.AsyncClient, inside: NamespacedRoot) -> None:
    inside.run("mount('/hiver-data', '/hiver-data', '', 4096); mount('none', '/hiver-data', '', 4096 | 32 | 1)")
    for answer in (
        await client.post("/file/hiver-data/f", content=b"x"),
        await client.post("/file/hiver-data/new/f", content=b"x"),
    ):
        assert answer.status_code == 403
        assert "read-only" in answer.json()["error"]


async def test_a_full_disk(client: httpx.AsyncClient, inside: NamespacedRoot) -> None:
    inside.run("os.mkdir('/hiver-small'); libc.mount(b'tmpfs', b'/hiver-small', b'tmpfs', 0, b'size=1m')")
    answer = await client.post("/file/hiver-small/f", content=bytes(3 << 20))
    assert answer.status_code == 507
    assert "space" in answer.json()["error"]
    assert inside.run("result = os.listdir('/hiver-small')") == []


async def test_hard_links_are_not_written_through(client: httpx.AsyncClient, inside: NamespacedRoot) -> None:
    inside.run("open('/hiver-data/one', 'w').write('one'); os.link('/hiver-data/one', '/hiver-data/two')")
    assert (await client.post("/file/hiver-data/one", content=b"new")).status_code == 200
    assert inside.run("result = [open('/hiver-data/one').read(), open('/hiver-data/two').read()]") == ["new", "one"]


async def test_hostile_names(client: httpx.AsyncClient, inside: NamespacedRoot) -> None:
    inside.run("""
for name in (b'\\xff\\xfe', b'new\\nline', b'"quote', b'\\x01\\x7f', 'ünï'.encode(), b'a' * 255, '\U0001f600'.encode()):
    open(b'/hiver-workspace/' + name, 'w').close()
""")
    listed = (await client.get("/directories?path=/hiver-workspace")).json()["entries"]
    assert len(listed) == 7
    for path in (f"/hiver-workspace/{'a' * 256}", "/" + "a/" * 2047 + "a"):
        assert (await client.get(f"/file{path}")).status_code in {400, 404}
        assert (await client.post(f"/file{path}/b", content=b"x")).status_code == 400


async def test_a_deep_path_is_made_within_limits(client: httpx.AsyncClient, inside: NamespacedRoot) -> None:
    deep = "/hiver-workspace/" + "d/" * 500 + "f"
    assert (await client.post(f"/file{deep}", content=b"deep")).status_code == 200
    assert (await client.get(f"/file{deep}")).content == b"deep"


@pytest.mark.parametrize("options", ["", ",index=on,nfs_export=on"])
async def test_on_an_overlay(tmp_path: Path, options: str) -> None:
    """As the embedded isolation has it: lower files of the image, upper ones of the sandbox."""
    from hiverd.files import linux

    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
        os.chown(tmp_path / name, FIRST_ID, FIRST_ID)
    (tmp_path / "lower/hiver-etc").mkdir()
    (tmp_path / "lower/hiver-etc/hosts").write_text("image's")
    (tmp_path / "lower/link").symlink_to("/hiver-etc")
    folders = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work{options}"
    linux.mount("overlay", str(tmp_path / "merged"), "overlay", 0, folders)
    try:
        async with client_of(FolderSandbox(tmp_path / "merged", (FIRST_ID, FIRST_ID))) as client:
            for path in ("hiver-etc/hosts", "link/new", "hiver-made/here"):
                assert (await client.post(f"/file/{path}", content=b"mine")).status_code == 200
                assert (await client.post(f"/file/{path}", content=b"again")).status_code == 200
                assert (await client.get(f"/file/{path}")).content == b"again"
            assert sorted(os.listdir(tmp_path / "merged/hiver-etc")) == ["hosts", "new"]
            assert (tmp_path / "merged/hiver-made/here").stat().st_uid == FIRST_ID
            assert (await client.delete("/file/hiver-etc/hosts")).status_code == 204
            assert (await client.get("/file/hiver-etc/hosts")).status_code == 404
        assert (tmp_path / "lower/hiver-etc/hosts").read_text() == "image's"
    finally:
        linux.umount(str(tmp_path / "merged"))
