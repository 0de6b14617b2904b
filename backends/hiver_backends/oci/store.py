"""Pulled images, unpacked, in a content-addressed store.

    names/<sha256 of the location>.json   which manifest a name stood for when it was pulled
    images/<manifest digest>/rootfs       unpacked root;  image.json beside it is the image's configuration
    new/                                  pulls under way; emptied when the server starts

An image appears in `images` by one rename, so a killed pull leaves nothing that a later one could take for whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Final, TypeVar

from hiver_backends.linux import references
from hiver_backends.linux.children import Children
from hiver_backends.linux.references import Source
from hiverd.contracts.errors import BackendError, InvalidError, NotFoundError, UnavailableError
from hiverd.contracts.isolation import Image, Progress

from . import programs, unpacked
from .settings import Settings

_T = TypeVar("_T")
_POLICY: Final = Path("/etc/containers/policy.json")
_PASSED_ENVIRONMENT: Final = (
    "HOME", "PATH", "XDG_RUNTIME_DIR", "REGISTRY_AUTH_FILE", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
_UNKNOWN_IMAGE: Final = ("manifest unknown", "no descriptor found",
                         "name unknown", "not found", "no image", "does not exist", "denied",
                         "unauthorized", "no such file")  # fmt: skip


class _Pull:
    """A pull under way, shared by all who want the image."""

    def __init__(self, task: asyncio.Task[str], listeners: list[Progress]) -> None:
        self.task = task
        self.listeners = listeners


class ImageStore:
    """Pulls with skopeo, unpacks with umoci."""

    def __init__(self, folder: Path, settings: Settings, children: Children, pool: Executor) -> None:
        self._names = folder / "names"
        self._images = folder / "images"
        self._new = folder / "new"
        self._settings = settings
        self._children = children
        self._pool = pool
        self._pulls: dict[str, _Pull] = {}

    def prepare(self) -> None:
        """Makes the folders and removes what killed pulls have left. Blocking."""
        shutil.rmtree(self._new, ignore_errors=True)
        for folder in (self._names, self._images, self._new):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def root(self, handle: str) -> Path:
        """The unpacked root of a handle. Raises `NotFoundError` if it was removed meanwhile."""
        root = self._images / handle.removeprefix("store:") / "rootfs"
        if not root.is_dir():
            raise NotFoundError("the image's files are gone; create the sandbox anew to pull it again")
        return root

    async def get(self, source: Source, progress: Progress) -> Image:
        """Finds the image in the store or pulls it. Raises `NotFoundError` naming an image that there is not."""
        digest = await self._in_pool(lambda: self._stored(source))
        if digest is None:
            digest = await self._pull_shared(source, progress)
        document = await self._in_pool(lambda: _read_json(self._images / digest / "image.json"))
        return references.image_from_config(source.reference, f"store:{digest}", document)

    async def close(self) -> None:
        """Ends pulls under way."""
        pulls = [pull.task for pull in self._pulls.values()]
        for task in pulls:
            task.cancel()
        await asyncio.gather(*pulls, return_exceptions=True)

    def _stored(self, source: Source) -> str | None:
        try:
            entry = _read_json(self._name_file(source))
        except (OSError, ValueError):
            return None
        digest = str(entry.get("digest"))
        if entry.get("fingerprint") != _fingerprint(source) or not (self._images / digest / "rootfs").is_dir():
            return None
        return digest

    def _name_file(self, source: Source) -> Path:
        return self._names / f"{hashlib.sha256(source.location.encode()).hexdigest()}.json"

    async def _pull_shared(self, source: Source, progress: Progress) -> str:
        pull = self._pulls.get(source.location)
        if pull is None:
            listeners: list[Progress] = []
            task = asyncio.create_task(
                self._pull(source, lambda line: _tell(listeners, line)), name=f"pull {source.reference}"
            )
            pull = self._pulls[source.location] = _Pull(task, listeners)
            task.add_done_callback(lambda _: self._pulls.pop(source.location, None))
        pull.listeners.append(progress)
        try:
            # Shielded: the one who asked first may leave, the others still wait, and the next one will be glad of it.
            return await asyncio.shield(pull.task)
        except asyncio.CancelledError:
            if pull.task.cancelled():
                raise UnavailableError("the server is stopping") from None
            raise
        finally:
            pull.listeners.remove(progress)

    async def _pull(self, source: Source, tell: Callable[[str], None]) -> str:
        work = Path(await self._in_pool(lambda: tempfile.mkdtemp(dir=self._new)))
        try:
            tell(f"pulling {source.reference}")
            await self._copy(source, work, tell)
            digest, document = await self._in_pool(lambda: _manifest_of(work / "layout"))
            if not (self._images / digest / "rootfs").is_dir():
                tell(f"unpacking {source.reference}")
                await self._unpack(source, work, tell)
                await self._in_pool(lambda: unpacked.publish(work, document, self._images / digest, source.reference))
            entry = {"digest": digest, "fingerprint": _fingerprint(source), "location": source.location}
            await self._in_pool(lambda: _write_json(self._name_file(source), entry))
            tell(f"{source.reference} is ready")
            return digest
        finally:
            await asyncio.shield(self._in_pool(lambda: shutil.rmtree(work, ignore_errors=True)))

    async def _copy(self, source: Source, work: Path, tell: Callable[[str], None]) -> None:
        argv = ["skopeo", "copy", "--src-tls-verify=false"] if self._plain_http(source) else ["skopeo", "copy"]
        if not _POLICY.exists():
            argv.insert(1, "--insecure-policy")
        result = await self._run([*argv, source.location, f"oci:{work / 'layout'}:image"], tell)
        if result.code != 0:
            raise _pull_error(source, result.tail)

    async def _unpack(self, source: Source, work: Path, tell: Callable[[str], None]) -> None:
        argv = ["umoci", "unpack", "--image", f"{work / 'layout'}:image", str(work / "bundle")]
        result = await self._run(argv, tell)
        if result.code != 0:
            raise BackendError(f"image {source.reference!r} cannot be unpacked: {_last_line(result.tail)}")

    async def _run(self, argv: list[str], tell: Callable[[str], None]) -> programs.Result:
        env = {name: os.environ[name] for name in _PASSED_ENVIRONMENT if name in os.environ}
        try:
            return await programs.run(self._children, argv, tell, env)
        except FileNotFoundError as error:
            raise InvalidError(
                f"this server cannot fetch images because {argv[0]} is not installed (apt-get install skopeo umoci);"
                " the image 'host' needs no download",
                field="image",
            ) from error

    def _plain_http(self, source: Source) -> bool:
        return references.is_loopback(source.registry) or source.registry in self._settings.insecure_registries

    async def _in_pool(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def _tell(listeners: list[Progress], line: str) -> None:
    for listener in list(listeners):
        listener(line)


def _fingerprint(source: Source) -> str:
    """Local images are taken anew when their files change; a registry's tag stands for what was pulled first."""
    if source.path is None:
        return ""
    path = Path(source.path)
    watched = path / "index.json" if path.is_dir() else path
    try:
        status = watched.stat()
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"


def _manifest_of(layout: Path) -> tuple[str, dict[str, Any]]:
    """Digest (hexadecimal) of a layout's only manifest, and the image configuration it names."""
    index = _read_json(layout / "index.json")
    digest = str(index["manifests"][0]["digest"])
    manifest = _read_json(_blob(layout, digest))
    return digest.removeprefix("sha256:"), _read_json(_blob(layout, str(manifest["config"]["digest"])))


def _blob(layout: Path, digest: str) -> Path:
    algorithm, _, value = digest.partition(":")
    return layout / "blobs" / algorithm / value


def _pull_error(source: Source, tail: str) -> Exception:
    reason = _last_line(tail)
    if any(sign in reason.lower() for sign in _UNKNOWN_IMAGE):
        return NotFoundError(
            f"there is no image {source.reference!r}, or it may not be read: {reason}. Use an image that exists,"
            " an alias of the server's configuration, or 'host'"
        )
    return InvalidError(f"image {source.reference!r} cannot be pulled: {reason}", field="image")


def _last_line(text: str) -> str:
    """The program's own error, without its log decoration."""
    line = text.strip().splitlines()[-1] if text.strip() else "no reason given"
    if 'msg="' in line:
        line = line.split('msg="', 1)[1].rstrip('"').replace('\\"', '"')
    return line[:400]


def _read_json(file: Path) -> dict[str, Any]:
    document = json.loads(file.read_bytes())
    if not isinstance(document, dict):
        raise TypeError(f"{file} is no JSON object")
    return document


def _write_json(file: Path, document: Mapping[str, Any]) -> None:
    fresh = file.with_name(f"{file.name}.new")
    fresh.write_text(json.dumps(document))
    fresh.rename(file)
