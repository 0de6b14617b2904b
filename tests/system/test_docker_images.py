"""Images on Docker: what the Engine has, what it pulls with credentials, several layers, bundles, hostile roots."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import shutil
import socket
import subprocess
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hiver_backends.docker import settings
from hiver_backends.docker.engine import EngineApi
from hiverd.contracts.errors import HiverError, InvalidError, NotFoundError
from hiverd.contracts.isolation import Image, Isolation
from hiverd.testing.isolation_harness import run
from support.docker import Engine
from system.docker_support import DockerHarness, needs_docker

_TOOLS = ("skopeo", "docker-registry", "busybox")
_ABSENT = [name for name in _TOOLS if shutil.which(name) is None]
_HTPASSWD = "$2y$05$2WgEHsh9UCdfySNPQCuQOuoM20leBsQ0iRkcVxpWzep5urmECFfyu"
"""`me` with the password `right`."""

pytestmark = [
    pytest.mark.system,
    needs_docker,
    pytest.mark.skipif(bool(_ABSENT), reason=f"the image tests need {' and '.join(_ABSENT)}"),
]

CONFIG: dict[str, Any] = {
    "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo from the image"], "Env": ["FROM_IMAGE=yes", "PATH=/bin"],
    "WorkingDir": "/srv/app", "ExposedPorts": {"8080/tcp": {}, "53/udp": {}}, "User": "1000",
    "Volumes": {"/srv/data": {}}, "Healthcheck": {"Test": ["CMD", "touch", "/unhealthy"], "Interval": 1_000_000},
}  # fmt: skip


class Link(NamedTuple):
    target: str


Layer = dict[str, bytes | Link | None]
"""Path to content, link, or None for a folder."""


def small(prefix: str = "", marker: bytes = b"image\n") -> Layer:
    busybox = Path(shutil.which("busybox") or "/").read_bytes()
    names = ("sh", "cat", "echo", "ls", "pwd", "sleep", "stat", "test")
    links: Layer = {f"{prefix}bin/{name}": Link("busybox") for name in names}
    return {f"{prefix}bin/busybox": busybox, f"{prefix}etc/marker": marker, f"{prefix}tmp": None} | links


def _layer(files: Layer) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.mode = 0o755
            if isinstance(content, Link):
                member.type, member.linkname = tarfile.SYMTYPE, content.target
            elif content is None:
                member.type = tarfile.DIRTYPE
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return buffer.getvalue()


def archive_of(name: str, config: dict[str, Any], *layers: Layer) -> bytes:
    """As `docker save` writes it; the lowest layer first."""
    blobs = [_layer(files) for files in layers]
    diff_ids = [f"sha256:{hashlib.sha256(blob).hexdigest()}" for blob in blobs]
    document = {"architecture": "amd64", "os": "linux", "config": config}
    document["rootfs"] = {"type": "layers", "diff_ids": diff_ids}
    names = [f"layer{number}.tar" for number in range(len(blobs))]
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": names}]
    files: Layer = dict(zip(names, blobs, strict=True))
    files |= {"config.json": json.dumps(document).encode(), "manifest.json": json.dumps(manifest).encode()}
    return _layer(files)


class Store:
    """The Engine's images; what a test brings in goes with it."""

    def __init__(self, api: EngineApi, prefix: str) -> None:
        self._api = api
        self._prefix = prefix
        self.names: list[str] = []

    async def load(self, name: str, config: dict[str, Any], *layers: Layer) -> str:
        full = f"{self._prefix}/{name}:v1"
        self.names.append(full)
        await self._api.load(archive_of(full, config, *layers))
        return full


@pytest.fixture
async def store(tmp_path: Path, harness: DockerHarness) -> AsyncIterator[Store]:
    api = EngineApi(settings.endpoint(settings.Settings()), 60)
    store = Store(api, f"hiver-test-{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:8]}")
    yield store
    await api.close()
    for name in store.names:
        subprocess.run(["docker", "rmi", "-f", name], check=False, capture_output=True)


@pytest.fixture
def harness(tmp_path: Path, docker_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[DockerHarness]:
    monkeypatch.setenv("DOCKER_HOST", docker_engine.host)
    harness = DockerHarness(tmp_path, image_roots=[str(tmp_path / "roots")])
    yield harness
    harness.remove()


@pytest.fixture
async def isolation(harness: DockerHarness) -> AsyncIterator[Isolation]:
    async with harness.started() as isolation:
        yield isolation
        assert await isolation.list_owned() == frozenset()


async def shown(harness: DockerHarness, isolation: Isolation, image: Image, script: str) -> bytes:
    async with harness.created(isolation, harness.spec(image, cwd=image.cwd)) as workload:
        await workload.begin()
        code, stdout, stderr = await run(workload, script)
        assert (code, stderr) == (0, b"")
        return stdout


async def test_of_the_engine_with_its_configuration(harness: DockerHarness, isolation: Isolation, store: Store) -> None:
    name = await store.load("one", CONFIG, small())
    lines: list[str] = []
    image = await isolation.resolve_image(name, lines.append)
    assert lines == []
    assert (image.entrypoint, image.cmd) == (("/bin/sh", "-c"), ("echo from the image",))
    assert image.env == {"FROM_IMAGE": "yes", "PATH": "/bin"}
    assert (image.cwd, image.user, image.exposed_ports) == ("/srv/app", "1000", (8080,))
    script = "cat /etc/marker; echo $FROM_IMAGE; pwd; stat -c %u /etc/marker; echo changed > /etc/marker; sleep 0.3"
    script += "; test ! -e /unhealthy"
    assert await shown(harness, isolation, image, script) == b"image\nyes\n/srv/app\n0\n"
    assert await shown(harness, isolation, image, "cat /etc/marker") == b"image\n", "the image itself never changes"


async def test_layers_hide_and_replace(harness: DockerHarness, isolation: Isolation, store: Store) -> None:
    bottom: Layer = {"srv/gone": b"x", "srv/kept": b"kept\n", "opaque/below": b"x", "etc/over": b"old\n"}
    top: Layer = {"srv/.wh.gone": b"", "opaque/.wh..wh..opq": b"", "opaque/above": b"x", "etc/over": b"new\n"}
    name = await store.load("layers", {}, small(), bottom, top)
    image = await isolation.resolve_image(name, lambda _: None)
    output = await shown(harness, isolation, image, "ls /srv; cat /srv/kept; ls /opaque; cat /etc/over /etc/marker")
    assert output == b"kept\nkept\nabove\nnew\nimage\n"


async def test_many_layers(harness: DockerHarness, isolation: Isolation, store: Store) -> None:
    """More than fit into one list of folders."""
    layers: list[Layer] = [{f"srv/{number}": b"x"} for number in range(60)]
    name = await store.load("many", {}, small(), *layers)
    image = await isolation.resolve_image(name, lambda _: None)
    assert len((await shown(harness, isolation, image, "ls /srv; echo x > /srv/mine")).split()) == 60
    assert b"hiver" not in await shown(harness, isolation, image, "ls -a /")


async def test_bundles_yield_their_inner_image(harness: DockerHarness, isolation: Isolation, store: Store) -> None:
    inner = {"config": {"Env": ["INNER=1"], "Entrypoint": ["/bin/sh"], "WorkingDir": "/inner"}}
    files = small("mnt/rootfs/", b"inner\n")
    files["mnt/blobs/sha256/abc"] = json.dumps(inner).encode()
    files["mnt/manifest.json"] = json.dumps({"config": {"digest": "sha256:abc"}}).encode()
    name = await store.load("bundle", {"Labels": {"hiver.bundle": "1"}, "Entrypoint": ["/daemon"]}, files)
    for _ in range(2):  # read, then remembered
        image = await isolation.resolve_image(name, lambda _: None)
        assert (image.entrypoint, image.env, image.cwd) == (("/bin/sh",), {"INNER": "1"}, "/inner")
    output = await shown(harness, isolation, image, "cat /etc/marker; pwd; test ! -e /mnt/rootfs")
    assert output == b"inner\n/inner\n"


async def test_hostile_images_do_not_reach_the_host(
    harness: DockerHarness, isolation: Isolation, store: Store, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    out = f"../../../../../../../..{victim}"
    rest = {name: content for name, content in small().items() if not name.startswith("etc")}
    manifest = {"mnt/manifest.json": b'{"Config": "x"}', "mnt/blobs/x": b"{}"}
    label = {"Labels": {"hiver.bundle": "1"}}
    names = [
        await store.load("etc", {}, rest | {"etc": Link(out)}),
        await store.load("hosts", {}, small() | {"etc/hosts": Link(f"{victim}/hosts")}),
        await store.load("proc", {}, small() | {"proc": Link(str(victim))}),
        await store.load("dev", {}, small() | {"dev": b"file"}),
        await store.load("root", label, small() | manifest | {"mnt/rootfs": Link(str(victim))}),
    ]
    for name in names:
        image = await isolation.resolve_image(name, lambda _: None)
        # Refusing is as good as running, as long as nothing of the host is touched and nothing is left.
        with contextlib.suppress(HiverError):
            await shown(harness, isolation, image, "echo x > /etc/escaped; echo y > /etc/hosts; test -d /proc/1")
    assert list(victim.iterdir()) == []


async def test_folders_are_the_operators_to_give(harness: DockerHarness, isolation: Isolation, tmp_path: Path) -> None:
    root = tmp_path / "roots" / "one"
    with tarfile.open(fileobj=io.BytesIO(_layer(small()))) as archive:
        archive.extractall(root, filter="tar")
    image = await isolation.resolve_image(f"dir:{root}", lambda _: None)
    assert await shown(harness, isolation, image, "cat /etc/marker; echo x > /etc/marker") == b"image\n"
    assert (root / "etc" / "marker").read_bytes() == b"image\n"
    for name in ("dir:/", f"dir:{tmp_path}", f"dir:{tmp_path}/roots/../data"):
        with pytest.raises(InvalidError, match=r"\[docker\] image_roots"):
            await isolation.resolve_image(name, lambda _: None)
    with pytest.raises(InvalidError, match="docker load"):
        await isolation.resolve_image(f"oci:{root}:v1", lambda _: None)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """`host:port` of a registry that wants a password and has the image `small/one:v1`."""
    folder = tmp_path / "registry"
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    (folder / "htpasswd").write_text(f"me:{_HTPASSWD}\n")
    config = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(folder)}},
        "http": {"addr": address},
        "auth": {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}},
    }
    (folder / "config.yml").write_text(json.dumps(config))
    (folder / "image.tar").write_bytes(archive_of("small/one:v1", CONFIG, small()))
    argv = ["docker-registry", "serve", str(folder / "config.yml")]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(f"http://{address}/v2/")
            copy = ["skopeo", "copy", "--insecure-policy", "--dest-tls-verify=false", "--dest-creds", "me:right"]
            target = f"docker://{address}/small/one:v1"
            subprocess.run([*copy, f"docker-archive:{folder}/image.tar", target], check=True, capture_output=True)
            yield address
        finally:
            server.terminate()


def _wait_for(url: str) -> None:
    deadline_monotonic = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).close()  # noqa: S310 -- our own registry
        except urllib.error.HTTPError as error:
            error.close()
            return
        except OSError:
            if time.monotonic() > deadline_monotonic:
                raise
            time.sleep(0.05)


def _log_in(folder: Path, registry: str, password: str) -> None:
    auth = base64.b64encode(f"me:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {registry: {"auth": auth}}}))


async def test_pulls_with_the_users_credentials(
    harness: DockerHarness, isolation: Isolation, store: Store, registry: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    name = f"{registry}/small/one:v1"
    store.names.append(name)
    with pytest.raises(NotFoundError) as caught:
        await isolation.resolve_image(name, lambda _: None)
    assert name in caught.value.message
    _log_in(tmp_path, registry, "wrong")
    with pytest.raises(HiverError) as refused:
        await isolation.resolve_image(name, lambda _: None)
    assert refused.value.status < 500
    _log_in(tmp_path, registry, "right")
    lines: list[str] = []
    images = await asyncio.gather(*(isolation.resolve_image(name, lines.append) for _ in range(4)))
    assert len({image.handle for image in images}) == 1
    assert any("ull" in line for line in lines)
    assert await shown(harness, isolation, images[0], "cat /etc/marker") == b"image\n"
    missing = f"{registry}/small/none:v1"
    with pytest.raises(NotFoundError) as caught:
        await isolation.resolve_image(missing, lambda _: None)
    assert missing in caught.value.message


async def test_a_registry_that_does_not_answer(isolation: Isolation) -> None:
    with pytest.raises(HiverError, match=r"127\.0\.0\.1:1/some/image") as caught:
        await isolation.resolve_image("127.0.0.1:1/some/image:v1", lambda _: None)
    assert caught.value.status < 500
