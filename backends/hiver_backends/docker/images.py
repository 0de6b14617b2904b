"""Images by name: aliases, this machine's own files, folders, what the Engine has, and what it can pull."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import platform
import secrets
import tarfile
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from hiver_backends.linux import bundles, references
from hiver_backends.linux.local_images import LocalImages
from hiverd.contracts.errors import InvalidError, NotFoundError
from hiverd.contracts.isolation import Image, Progress

from . import credentials
from .documents import INSTANCE_LABEL, PASSING_PREFIX, SANDBOX_LABEL, container_name
from .engine import EngineApi
from .settings import Settings

_EMPTY_IMAGE: Final = "hiver-empty:1"
"""Name of an image without files, for sandboxes whose files are not the Engine's."""
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
_ENGINE: Final = "engine:"
_BUNDLE: Final = "bundle:"


class Prepared(Struct, frozen=True, kw_only=True):
    """An image as `create` needs it."""

    engine_id: str
    """What the Engine makes the container of."""
    layers: tuple[tuple[Path, str], ...] | None = None
    """Folders of this host as `RootFs.mount` takes them; None: the Engine's image itself."""
    inner: str = ""
    """The root's place within the Engine's image, for bundles."""


class Images:
    """Resolves names. Handles are `host`, `dir:<path>`, `engine:<id>` and `bundle:<id>`."""

    def __init__(
        self, folder: Path, instance: str, settings: Settings, aliases: Mapping[str, str], engine: EngineApi,
        pool: Executor
    ) -> None:  # fmt: skip
        self._folder = folder
        self._instance = instance
        self._engine = engine
        aliases = {"agent-base": settings.default_image, **aliases}
        usr_local = settings.host_usr_local
        self._local = LocalImages("docker", folder / "host", aliases, settings.image_roots, pool, usr_local=usr_local)
        self._pulls: dict[str, asyncio.Lock] = {}
        self._empty_lock = asyncio.Lock()
        self._empty_id: str | None = None

    def prepare(self) -> None:
        """Makes the folders. Blocking."""
        (self._folder / "bundles").mkdir(mode=0o700, parents=True, exist_ok=True)

    async def resolve(self, name: str, progress: Progress) -> Image:
        """Raises `NotFoundError` or `InvalidError` naming the image."""
        reference, from_alias = self._local.dealias(name)
        image = await self._local.find(reference, progress, trusted=from_alias)
        if image is not None:
            return image
        source = references.parse(reference)
        if source.path is not None:
            raise InvalidError(
                f"image {reference!r}: load archives and layouts into Docker (`docker load`) and name them as it does",
                field="image",
            )
        document = await self._find_or_pull(reference.removeprefix("docker://"), source.registry, progress)
        image_id = str(document["Id"])
        config = {"config": document.get("Config") or {}}
        if references.labels(config).get(references.BUNDLE_LABEL) == "1":
            config = await self._bundle(image_id, reference)
            return references.image_from_config(reference, f"{_BUNDLE}{image_id}", config)
        return references.image_from_config(reference, f"{_ENGINE}{image_id}", config)

    async def prepared(self, handle: str) -> Prepared:
        """What a handle stands for now."""
        layers = self._local.layers(handle)
        if layers is not None:
            return Prepared(engine_id=await self._empty_image(), layers=layers)
        if handle.startswith(_BUNDLE):
            return Prepared(engine_id=handle.removeprefix(_BUNDLE), inner=bundles.INNER_ROOT)
        return Prepared(engine_id=handle.removeprefix(_ENGINE))

    async def load_empty(self) -> None:
        """Loads the image without files, unless it is there."""
        async with self._empty_lock:
            self._empty_id = None
        await self._empty_image()

    async def _find_or_pull(self, name: str, registry: str, progress: Progress) -> dict[str, Any]:
        try:
            return await self._engine.image(name)
        except NotFoundError:
            pass
        # One pull for all who want the image; the others then find it.
        lock = self._pulls.setdefault(name, asyncio.Lock())
        async with lock:
            try:
                return await self._engine.image(name)
            except NotFoundError:
                progress(f"pulling {name}")
            try:
                await self._engine.pull(name, await credentials.find(registry), progress)
                document = await self._engine.image(name)
            except NotFoundError as error:
                raise NotFoundError(
                    f"there is no image {name!r}, or it may not be read: {error.message}. Use an image that exists, an"
                    " alias of the server's configuration, or 'host'"
                ) from error
            finally:
                self._pulls.pop(name, None)
            progress(f"{name} is ready")
            return document

    async def _bundle(self, image_id: str, reference: str) -> dict[str, Any]:
        """The configuration of a bundle's inner image (PROTOCOL 0.19), kept since it takes a container to read it."""
        kept = self._folder / "bundles" / f"{hashlib.sha256(image_id.encode()).hexdigest()}.json"
        try:
            return dict(json.loads(await asyncio.to_thread(kept.read_bytes)))
        except (OSError, ValueError):
            pass
        try:
            manifest = json.loads(await self._read_file(image_id, (bundles.INNER_MANIFEST,)))
            document = json.loads(await self._read_file(image_id, bundles.configuration_paths(manifest)))
        except (NotFoundError, ValueError, KeyError, IndexError, TypeError) as error:
            raise InvalidError(
                f"image {reference!r} is a bundle without a readable configuration", field="image"
            ) from error
        if not isinstance(document, dict):
            raise InvalidError(f"image {reference!r} is a bundle with an odd configuration", field="image")
        await asyncio.to_thread(kept.write_text, json.dumps(document))
        return document

    async def _read_file(self, image_id: str, paths: tuple[str, ...]) -> bytes:
        passing_id = f"{PASSING_PREFIX}{secrets.token_hex(4)}"
        labels = {INSTANCE_LABEL: self._instance, SANDBOX_LABEL: passing_id}
        return await self._engine.read_file(image_id, container_name(self._instance, passing_id), labels, paths)

    async def _empty_image(self) -> str:
        async with self._empty_lock:
            if self._empty_id is None:
                try:
                    document = await self._engine.image(_EMPTY_IMAGE)
                except NotFoundError:
                    await self._engine.load(empty_archive())
                    document = await self._engine.image(_EMPTY_IMAGE)
                self._empty_id = str(document["Id"])
            return self._empty_id


def empty_archive() -> bytes:
    """An image with one layer without files, as `docker save` writes it; the same bytes every time."""
    layer = _tar({})
    config = {
        "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [_EMPTY_IMAGE], "Layers": ["layer.tar"]}]
    files = {"layer.tar": layer, "config.json": _json(config), "manifest.json": _json(manifest)}
    return _tar(files)


def _json(document: object) -> bytes:
    return json.dumps(document, sort_keys=True).encode()


def _tar(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
