"""Where on this host an image's files are, as the lower folders of a sandbox's own overlay. Blocking calls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from hiverd.contracts.errors import BackendError

from .below import Below, root_folder
from .images import Prepared

_MAX_BYTES: Final = 3000
"""What the kernel takes as mount options is a page, and the other options need room as well."""


def of(prepared: Prepared, container: Mapping[str, Any], found: Below) -> tuple[tuple[Path, str], ...]:
    """As `RootFs.mount` takes them. The container holds them for as long as it exists."""
    if prepared.layers is not None:
        return prepared.layers
    folders = [] if prepared.inner else overlay_folders(container)
    if not folders:
        # The Engine's own mount of the image, whatever makes it: one overlay over another is what kernels allow.
        merged = root_folder(found)
        folders = [merged / prepared.inner]
        # An Engine in a mount namespace of its own may have it there alone, and here is but an empty folder.
        if not is_root_of(int(container["State"]["Pid"]), merged) or not _is_inside(merged, prepared.inner):
            raise BackendError("the image's files cannot be found on this host")
    return tuple((folder, "") for folder in folders)


def overlay_folders(container: Mapping[str, Any]) -> list[Path]:
    """An image's layers, topmost first, if the Engine keeps them as the kernel's overlay takes them; else empty."""
    driver = container.get("GraphDriver")
    if not isinstance(driver, Mapping) or driver.get("Name") != "overlay2":
        return []
    lower = str((driver.get("Data") or {}).get("LowerDir") or "")
    # The first is the Engine's own, for its files in /etc.
    folders = [Path(name) for name in lower.split(":") if name][1:]
    if len(lower) > _MAX_BYTES or not all(folder.is_dir() for folder in folders):
        return []
    return folders


def is_root_of(pid: int, folder: Path) -> bool:
    """Whether a folder is what a process has as its root."""
    try:
        return not folder.is_symlink() and folder.samefile(f"/proc/{pid}/root")
    except OSError:
        return False


def _is_inside(root: Path, place: str) -> bool:
    """Whether a folder of a possibly hostile image is there, without links on the way."""
    current = root
    for name in filter(None, place.split("/")):
        current /= name
        if current.is_symlink():
            return False
    return current.is_dir()
