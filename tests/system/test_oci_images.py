"""Images of every kind, on the real plug-in with skopeo, umoci and a registry on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hiverd.contracts.errors import HiverError, InvalidError, NotFoundError
from hiverd.contracts.isolation import Image, Isolation
from hiverd.testing.isolation_harness import Harness, run
from system.oci_support import OciHarness, needs_oci

_TOOLS = ("skopeo", "umoci", "docker-registry")
_ABSENT = [name for name in _TOOLS if shutil.which(name) is None]

pytestmark = [
    pytest.mark.system,
    needs_oci,
    pytest.mark.skipif(bool(_ABSENT), reason=f"the image tests need {' and '.join(_ABSENT)}"),
]

CONFIG = (
    "--config.entrypoint", "/bin/sh", "--config.entrypoint", "-c", "--config.cmd", "echo from the image",
    "--config.env", "FROM_IMAGE=yes", "--config.env", "PATH=/bin", "--config.workingdir", "/srv/app",
    "--config.exposedports", "8080/tcp", "--config.exposedports", "53/udp", "--config.user", "1000",
)  # fmt: skip


def small_root(folder: Path) -> Path:
    """A root of static programs only: busybox if there is one, else a shell with its libraries."""
    (folder / "bin").mkdir(parents=True)
    (folder / "etc").mkdir()
    (folder / "tmp").mkdir(mode=0o1777)
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("the image tests need a static busybox (apt-get install busybox-static)")
    shutil.copy(busybox, folder / "bin" / "busybox")
    for name in ("sh", "cat", "echo", "id", "ls", "stat", "pwd", "sleep"):
        (folder / "bin" / name).symlink_to("busybox")
    (folder / "etc" / "marker").write_text("image\n")
    return folder


def layout_of(root: Path, layout: Path, *config: str, tag: str = "v1") -> None:
    """An OCI layout with one image made of a root."""
    image = f"{layout}:{tag}"
    tool("umoci", "init", "--layout", str(layout))
    tool("umoci", "new", "--image", image)
    bundle = layout.with_name(f"{layout.name}.bundle")
    tool("umoci", "unpack", "--image", image, str(bundle))
    shutil.rmtree(bundle / "rootfs")
    shutil.copytree(root, bundle / "rootfs", symlinks=True)
    tool("umoci", "repack", "--image", image, str(bundle))
    tool("umoci", "config", "--image", image, *config)
    shutil.rmtree(bundle)


def tool(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layout")
    layout_of(small_root(folder / "root"), folder / "image", *CONFIG)
    return folder / "image"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, layout: Path) -> Iterator[str]:
    """`host:port` of a registry without TLS that has the image `small/one:v1`."""
    folder = tmp_path_factory.mktemp("registry")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {"version": 0.1, "storage": {"filesystem": {"rootdirectory": str(folder)}}, "http": {"addr": address}}
    (folder / "config.yml").write_text(json.dumps(config))
    argv = ["docker-registry", "serve", str(folder / "config.yml")]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(f"http://{address}/v2/")
            tool("skopeo", "copy", "--insecure-policy", "--dest-tls-verify=false", f"oci:{layout}:v1",
                 f"docker://{address}/small/one:v1")  # fmt: skip
            yield address
        finally:
            server.terminate()


def _wait_for(url: str) -> None:
    deadline_monotonic = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).close()  # noqa: S310 -- our own registry
        except OSError:
            if time.monotonic() > deadline_monotonic:
                raise
            time.sleep(0.05)
        else:
            return


@pytest.fixture
def harness(tmp_path: Path, layout: Path) -> Iterator[OciHarness]:
    harness = OciHarness(tmp_path, image_roots=[str(layout.parent)])
    yield harness
    harness.remove()


async def resolve(isolation: Isolation, name: str) -> tuple[Image, list[str]]:
    lines: list[str] = []
    return await isolation.resolve_image(name, lines.append), lines


async def check_small(harness: Harness, isolation: Isolation, image: Image) -> None:
    assert image.entrypoint == ("/bin/sh", "-c")
    assert image.cmd == ("echo from the image",)
    assert image.env == {"FROM_IMAGE": "yes", "PATH": "/bin"}
    assert (image.cwd, image.user, image.exposed_ports) == ("/srv/app", "1000", (8080,))
    spec = harness.spec(image, cwd=image.cwd)
    async with harness.created(isolation, spec) as workload:
        await workload.begin()
        output = await run(
            workload, "cat /etc/marker; echo $FROM_IMAGE; pwd; stat -c %u /etc/marker; cat /etc/hostname"
        )
        assert output == (0, b"image\nyes\n/srv/app\n0\nbox\n", b"")
        assert (await run(workload, "echo changed > /etc/marker && cat /etc/marker")).stdout == b"changed\n"
    async with harness.created(isolation, harness.spec(image)) as workload:
        await workload.begin()
        assert (await run(workload, "cat /etc/marker")).stdout == b"image\n", "the image itself never changes"


async def test_registry_reference(harness: OciHarness, registry: str) -> None:
    async with harness.started() as isolation:
        image, lines = await resolve(isolation, f"{registry}/small/one:v1")
        assert any("pulling" in line for line in lines)
        assert any("unpacking" in line for line in lines)
        await check_small(harness, isolation, image)
        again, lines = await resolve(isolation, f"{registry}/small/one:v1")
        assert (again, lines) == (image, [])
    async with harness.started() as isolation:
        assert (await resolve(isolation, f"{registry}/small/one:v1"))[1] == []


async def test_concurrent_pulls_are_one(harness: OciHarness, registry: str) -> None:
    async with harness.started() as isolation:
        results = await asyncio.gather(*(resolve(isolation, f"{registry}/small/one:v1") for _ in range(8)))
        assert len({image.handle for image, _ in results}) == 1
        assert all(lines for _, lines in results), "all who wait are told"
        store = harness.folder / "data" / "images" / "store"
        assert len(list((store / "images").iterdir())) == 1
        assert list((store / "new").iterdir()) == []


async def test_one_of_two_callers_may_leave(harness: OciHarness, registry: str) -> None:
    async with harness.started() as isolation:
        first = asyncio.create_task(resolve(isolation, f"{registry}/small/one:v1"), name="first")
        second = asyncio.create_task(resolve(isolation, f"{registry}/small/one:v1"), name="second")
        await asyncio.sleep(0.05)
        first.cancel()
        image, _ = await second
        assert image.handle


async def test_killed_pull_does_no_harm(harness: OciHarness, registry: str) -> None:
    new = harness.folder / "data" / "images" / "store" / "new"
    async with harness.started() as isolation:
        pulling = asyncio.create_task(resolve(isolation, f"{registry}/small/one:v1"), name="pull")
        deadline_monotonic = time.monotonic() + 10
        while not any(new.iterdir()) and time.monotonic() < deadline_monotonic:
            await asyncio.sleep(0.001)
    with pytest.raises(Exception, match="stopping"):
        await pulling
    (new / "half").mkdir()
    (new / "half" / "junk").write_text("of a killed server")
    async with harness.started() as isolation:
        assert list(new.iterdir()) == []
        image, _ = await resolve(isolation, f"{registry}/small/one:v1")
        await check_small(harness, isolation, image)


@pytest.mark.parametrize("name", ["{registry}/small/none:v1", "{registry}/small/one:v2", "oci:{folder}/none:v1",
                                  "oci:{layout}:none", "dir:{folder}/none"])  # fmt: skip
async def test_missing_images_are_not_found(harness: OciHarness, registry: str, layout: Path, name: str) -> None:
    wanted = name.format(registry=registry, layout=layout, folder=layout.parent)
    async with harness.started() as isolation:
        with pytest.raises(NotFoundError) as caught:
            await resolve(isolation, wanted)
        assert wanted in caught.value.message
        assert list((harness.folder / "data" / "images" / "store" / "new").iterdir()) == []


async def test_registry_that_does_not_answer(harness: OciHarness) -> None:
    async with harness.started() as isolation:
        with pytest.raises(InvalidError, match=r"127\.0\.0\.1:1/some/image"):
            await resolve(isolation, "127.0.0.1:1/some/image:v1")


async def test_layout_and_archives(harness: OciHarness, layout: Path) -> None:
    oci, docker = layout.parent / "oci.tar", layout.parent / "docker.tar"
    tool("skopeo", "copy", "--insecure-policy", f"oci:{layout}:v1", f"oci-archive:{oci}:v1")
    tool("skopeo", "copy", "--insecure-policy", f"oci:{layout}:v1", f"docker-archive:{docker}:small:v1")
    async with harness.started() as isolation:
        for name in (f"oci:{layout}:v1", f"oci-archive:{oci}", f"docker-archive:{docker}"):
            image, _ = await resolve(isolation, name)
            await check_small(harness, isolation, image)


async def test_changed_layout_is_taken_anew(harness: OciHarness, layout: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(layout, mine)
    harness.aliases["mine"] = f"oci:{mine}:v1"
    async with harness.started() as isolation:
        before, _ = await resolve(isolation, "mine")
        tool("umoci", "config", "--image", f"{mine}:v1", "--config.env", "MORE=1")
        after, _ = await resolve(isolation, "mine")
        assert before.handle != after.handle
        assert after.env["MORE"] == "1"


async def test_unpacked_folder(harness: OciHarness, layout: Path) -> None:
    root = layout.parent / "root"
    async with harness.started() as isolation:
        image, _ = await resolve(isolation, f"dir:{root}")
        async with harness.created(isolation, harness.spec(image)) as workload:
            await workload.begin()
            assert (await run(workload, "cat /etc/marker; echo x > /etc/marker")).stdout == b"image\n"
        assert (root / "etc" / "marker").read_text() == "image\n"


async def test_paths_are_the_operators_to_give(harness: OciHarness, layout: Path, tmp_path: Path) -> None:
    elsewhere = small_root(tmp_path / "elsewhere")
    (layout.parent / "sneaky").symlink_to(elsewhere)
    async with harness.started() as isolation:
        for name in (f"dir:{elsewhere}", "dir:/", "dir:/etc/..", f"oci:{tmp_path}:v1", f"dir:{layout.parent}/sneaky",
                     f"docker-archive:{tmp_path}/x.tar", f"dir:{layout.parent}/../elsewhere"):  # fmt: skip
            with pytest.raises(InvalidError, match="image_roots"):
                await resolve(isolation, name)
    harness.aliases["trusted"] = f"dir:{elsewhere}"
    async with harness.started() as isolation:
        assert (await resolve(isolation, "trusted"))[0].handle == f"dir:{elsewhere}"


async def test_aliases(harness: OciHarness) -> None:
    harness.aliases |= {"python": "base", "base": "host", "a": "b", "b": "a"}
    async with harness.started() as isolation:
        assert (await resolve(isolation, "agent-base"))[0].handle == "host"
        assert (await resolve(isolation, "python"))[0].handle == "host"
        with pytest.raises(InvalidError, match="circle"):
            await resolve(isolation, "a")


async def test_upstream_bundles_yield_their_inner_image(harness: OciHarness, layout: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    small_root(outer / "mnt" / "rootfs")
    (outer / "mnt" / "rootfs" / "etc" / "marker").write_text("inner\n")
    blobs = outer / "mnt" / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    inner: dict[str, Any] = {"config": {"Env": ["INNER=1"], "Entrypoint": ["/bin/sh"], "WorkingDir": "/inner"}}
    (blobs / "abc").write_text(json.dumps(inner))
    (outer / "mnt" / "manifest.json").write_text(json.dumps({"config": {"digest": "sha256:abc"}}))
    layout_of(outer, tmp_path / "bundle", "--config.label", "hiver.bundle=1", "--config.entrypoint", "/daemon")
    harness.aliases["bundle"] = f"oci:{tmp_path / 'bundle'}:v1"
    async with harness.started() as isolation:
        image, _ = await resolve(isolation, "bundle")
        assert (image.entrypoint, image.env, image.cwd) == (("/bin/sh",), {"INNER": "1"}, "/inner")
        async with harness.created(isolation, harness.spec(image)) as workload:
            await workload.begin()
            assert (await run(workload, "cat /etc/marker; ls /mnt 2>&1")).stdout.startswith(b"inner\n")


async def test_bundle_with_links_to_the_host_is_refused(harness: OciHarness, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"config": {"Env": ["SECRET=1"]}}')
    links = tmp_path / "links"
    (links / "mnt").mkdir(parents=True)
    (links / "mnt" / "rootfs").symlink_to("/")
    (links / "mnt" / "manifest.json").write_text('{"Config": "image.json"}')
    (links / "mnt" / "blobs").mkdir()
    (links / "mnt" / "blobs" / "image.json").write_text("{}")
    stolen = tmp_path / "stolen"
    (stolen / "mnt" / "rootfs").mkdir(parents=True)
    (stolen / "mnt" / "manifest.json").write_text('{"Config": "image.json"}')
    (stolen / "mnt" / "blobs").mkdir()
    (stolen / "mnt" / "blobs" / "image.json").symlink_to(secret)
    for outer, reason in ((links, "without an inner root"), (stolen, "without a readable configuration")):
        layout_of(outer, tmp_path / f"{outer.name}.oci", "--config.label", "hiver.bundle=1")
        harness.aliases["bundle"] = f"oci:{tmp_path / f'{outer.name}.oci'}:v1"
        async with harness.started() as isolation:
            with pytest.raises(InvalidError, match=reason):
                await resolve(isolation, "bundle")


async def test_hostile_roots_do_not_reach_the_host(harness: OciHarness, tmp_path: Path) -> None:
    """/etc as a link to the host's, /etc/hosts as a folder, /proc as a file: refused or harmless."""
    victim = tmp_path / "victim"
    victim.mkdir()
    linked = small_root(tmp_path / "linked")
    shutil.rmtree(linked / "etc")
    (linked / "etc").symlink_to(f"../../../../../../../..{victim}")
    odd = small_root(tmp_path / "odd")
    (odd / "etc" / "hosts").symlink_to(victim / "hosts")
    harness.aliases |= {"linked": f"dir:{linked}", "odd": f"dir:{odd}"}
    async with harness.started() as isolation:
        for name in ("linked", "odd"):
            image, _ = await resolve(isolation, name)
            spec = harness.spec(image)
            # Refusing is as good as running, as long as nothing of the host is touched and nothing is left.
            with contextlib.suppress(HiverError):
                async with harness.created(isolation, spec) as workload:
                    await workload.begin()
                    await run(workload, "echo x > /etc/escaped; echo y > /etc/hosts")
        assert list(victim.iterdir()) == []
        assert await isolation.list_owned() == frozenset()
