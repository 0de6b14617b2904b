"""Images by name: aliases, the host's own files, folders, layouts, archives and registries."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Final

from hiver_backends.linux import host_image, references
from hiver_backends.linux.children import Children
from hiverd.contracts.errors import InvalidError, NotFoundError
from hiverd.contracts.isolation import Image, Progress

from .settings import Settings
from .store import ImageStore

_MAX_ALIAS_DEPTH: Final = 8
_HOST_FRESH_SECONDS: Final = 1.0
"""How long a look at this machine's /etc serves the sandboxes that follow: it takes some 150 system calls."""


class Images:
    """Resolves names. Handles are `host`, `dir:<path>` and `store:<digest>`."""

    def __init__(
        self, folder: Path, settings: Settings, aliases: Mapping[str, str], children: Children, pool: Executor
    ) -> None:
        self._settings = settings
        self._aliases = {"agent-base": settings.default_image, **aliases}
        self._pool = pool
        self._host = host_image.HostImage(folder / "host", usr_local=settings.host_usr_local)
        self._store = ImageStore(folder / "store", settings, children, pool)
        self._host_lock = asyncio.Lock()
        self._host_fresh_until_monotonic = 0.0

    def prepare(self) -> None:
        """Makes the folders. Blocking."""
        self._store.prepare()

    async def resolve(self, name: str, progress: Progress) -> Image:
        """Raises `NotFoundError` or `InvalidError` naming the image."""
        reference, from_alias = self._dealias(name)
        if reference == "host":
            return await self._resolve_host(progress)
        if reference.startswith("dir:"):
            path = self._local_path(reference, reference[4:], trusted=from_alias)
            return await asyncio.get_running_loop().run_in_executor(self._pool, _folder_image, reference, path)
        source = references.parse(reference)
        if source.path is not None:
            self._local_path(reference, source.path, trusted=from_alias)
        return await self._store.get(source, progress)

    def layers(self, handle: str) -> tuple[tuple[Path, str], ...]:
        """The folders of a prepared image, as `RootFs.mount` takes them. Raises `NotFoundError` if it was removed."""
        if handle == "host":
            return self._host.layers()
        if handle.startswith("dir:"):
            return ((Path(handle[4:]), ""),)
        return ((self._store.root(handle), ""),)

    async def close(self) -> None:
        """Ends pulls under way; nothing half-done stays."""
        await self._store.close()

    async def _resolve_host(self, progress: Progress) -> Image:
        async with self._host_lock:
            began_monotonic = time.monotonic()
            if began_monotonic >= self._host_fresh_until_monotonic:
                await asyncio.get_running_loop().run_in_executor(self._pool, self._host.prepare, progress)
                self._host_fresh_until_monotonic = began_monotonic + _HOST_FRESH_SECONDS
        return Image(reference="host", handle="host", cwd="/root")

    def _dealias(self, name: str) -> tuple[str, bool]:
        """Follows the operator's table; says whether the result came from there."""
        current, seen = name, [name]
        while current in self._aliases:
            current = self._aliases[current]
            if current in seen or len(seen) > _MAX_ALIAS_DEPTH:
                chain = " -> ".join([*seen, current])
                raise InvalidError(f"image alias {name!r} leads in a circle: {chain}", field="image")
            seen.append(current)
        if not current.strip():
            raise InvalidError("the image name is empty", field="image")
        return current, len(seen) > 1

    def _local_path(self, reference: str, path: str, *, trusted: bool) -> Path:
        """API callers may name files of the host only below the operator's folders."""
        folder = Path(path)
        if not folder.is_absolute():
            raise InvalidError(f"image {reference!r}: the path must be absolute", field="image")
        if not trusted:
            real = folder.resolve()
            roots = [Path(root).resolve() for root in self._settings.image_roots]
            if not any(real == root or root in real.parents for root in roots):
                raise InvalidError(
                    f"image {reference!r}: images from this host's files must lie below a folder that the operator"
                    " lists in [oci] image_roots, or be named by an alias",
                    field="image",
                )
            folder = real
        if not folder.exists():
            raise NotFoundError(f"image {reference!r}: there is no {folder}")
        return folder


def _folder_image(reference: str, folder: Path) -> Image:
    """An unpacked root; `<folder>.json` beside it may hold the configuration of an OCI image."""
    if not folder.is_dir():
        raise InvalidError(f"image {reference!r} is not a folder", field="image")
    if not any((folder / name).exists() for name in ("bin", "usr", "etc", "sbin")):
        raise InvalidError(f"image {reference!r} does not look like a root file system", field="image")
    beside = folder.with_name(f"{folder.name}.json")
    config = json.loads(beside.read_bytes()) if beside.is_file() else {}
    return references.image_from_config(reference, f"dir:{folder.resolve()}", config)
