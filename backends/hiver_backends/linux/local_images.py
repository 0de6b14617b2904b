"""Image names that need no registry: aliases, this machine's own files, folders with a root file system."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Final

from hiverd.contracts.errors import InvalidError, NotFoundError
from hiverd.contracts.isolation import Image, Progress

from . import host_image, references

_MAX_ALIAS_DEPTH: Final = 8
_HOST_FRESH_SECONDS: Final = 1.0
"""How long a look at this machine's /etc serves the sandboxes that follow: it takes some 150 system calls."""


class LocalImages:
    """`table` names the plug-in's table of the configuration, for messages. Handles are `host` and `dir:<path>`."""

    def __init__(
        self, table: str, folder: Path, aliases: Mapping[str, str], roots: tuple[str, ...], pool: Executor,
        *, usr_local: bool
    ) -> None:  # fmt: skip
        self._table = table
        self._aliases = aliases
        self._roots = roots
        self._pool = pool
        self._host = host_image.HostImage(folder, usr_local=usr_local)
        self._host_lock = asyncio.Lock()
        self._host_fresh_until_monotonic = 0.0

    async def find(self, reference: str, progress: Progress, *, trusted: bool) -> Image | None:
        """`host` and `dir:`; None for what is neither. `trusted`: the operator's table says it."""
        if reference == "host":
            return await self._resolve_host(progress)
        if reference.startswith("dir:"):
            path = self.check_path(reference, reference[4:], trusted=trusted)
            return await asyncio.get_running_loop().run_in_executor(self._pool, _folder_image, reference, path)
        return None

    def layers(self, handle: str) -> tuple[tuple[Path, str], ...] | None:
        """The folders of an image, as `RootFs.mount` takes them; None for a handle that is not from here."""
        if handle == "host":
            return self._host.layers()
        if handle.startswith("dir:"):
            return ((Path(handle[4:]), ""),)
        return None

    async def _resolve_host(self, progress: Progress) -> Image:
        async with self._host_lock:
            began_monotonic = time.monotonic()
            if began_monotonic >= self._host_fresh_until_monotonic:
                await asyncio.get_running_loop().run_in_executor(self._pool, self._host.prepare, progress)
                self._host_fresh_until_monotonic = began_monotonic + _HOST_FRESH_SECONDS
        return Image(reference="host", handle="host", cwd="/root")

    def dealias(self, name: str) -> tuple[str, bool]:
        """Follows the operator's table; says whether the result came from there. Raises `InvalidError`."""
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

    def check_path(self, reference: str, path: str, *, trusted: bool) -> Path:
        """API callers may name files of the host only below the operator's folders."""
        folder = Path(path)
        if not folder.is_absolute():
            raise InvalidError(f"image {reference!r}: the path must be absolute", field="image")
        if not trusted:
            real = folder.resolve()
            roots = [Path(root).resolve() for root in self._roots]
            if not any(real == root or root in real.parents for root in roots):
                raise InvalidError(
                    f"image {reference!r}: images from this host's files must lie below a folder that the operator"
                    f" lists in [{self._table}] image_roots, or be named by an alias",
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
