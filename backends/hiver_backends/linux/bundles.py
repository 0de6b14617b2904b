"""Upstream bundles: images that hold the image to be run (PROTOCOL 0.19). No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

INNER_ROOT: Final = "mnt/rootfs"
INNER_MANIFEST: Final = "/mnt/manifest.json"
_INNER_BLOBS: Final = "/mnt/blobs"


def configuration_paths(manifest: Any) -> tuple[str, ...]:
    """Where the inner image's configuration may be, by its manifest. Raises `LookupError` or `TypeError`."""
    if isinstance(manifest, list):  # the form of `docker save`
        manifest = manifest[0]
    if not isinstance(manifest, Mapping):
        raise TypeError("the manifest is no object")
    return _blob_paths(str(manifest["config"]["digest"] if "config" in manifest else manifest["Config"]))


def _blob_paths(name: str) -> tuple[str, ...]:
    algorithm, colon, value = name.partition(":")
    if not colon:
        return (f"{_INNER_BLOBS}/{name}", f"{_INNER_BLOBS}/{name.removeprefix('blobs/')}")
    return (f"{_INNER_BLOBS}/{algorithm}/{value}", f"{_INNER_BLOBS}/{value}", f"{_INNER_BLOBS}/{name}")
