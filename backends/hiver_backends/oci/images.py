"""Images by name: aliases, the host's own files, folders, layouts, archives and registries."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path

from hiver_backends.linux import references
from hiver_backends.linux.children import Children
from hiver_backends.linux.local_images import LocalImages
from hiverd.contracts.isolation import Image, Progress

from .settings import Settings
from .store import ImageStore


class Images:
    """Resolves names. Handles are `host`, `dir:<path>` and `store:<digest>`."""

    def __init__(
        self, folder: Path, settings: Settings, aliases: Mapping[str, str], children: Children, pool: Executor
    ) -> None:
        aliases = {"agent-base": settings.default_image, **aliases}
        usr_local = settings.host_usr_local
        self._local = LocalImages("oci", folder / "host", aliases, settings.image_roots, pool, usr_local=usr_local)
        self._store = ImageStore(folder / "store", settings, children, pool)

    def prepare(self) -> None:
        """Makes the folders. Blocking."""
        self._store.prepare()

    async def resolve(self, name: str, progress: Progress) -> Image:
        """Raises `NotFoundError` or `InvalidError` naming the image."""
        reference, from_alias = self._local.dealias(name)
        image = await self._local.find(reference, progress, trusted=from_alias)
        if image is not None:
            return image
        source = references.parse(reference)
        if source.path is not None:
            self._local.check_path(reference, source.path, trusted=from_alias)
        return await self._store.get(source, progress)

    def layers(self, handle: str) -> tuple[tuple[Path, str], ...]:
        """The folders of a prepared image, as `RootFs.mount` takes them. Raises `NotFoundError` if it was removed."""
        return self._local.layers(handle) or ((self._store.root(handle), ""),)

    async def close(self) -> None:
        """Ends pulls under way; nothing half-done stays."""
        await self._store.close()
