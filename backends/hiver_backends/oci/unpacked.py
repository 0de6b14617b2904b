"""Turning what umoci unpacked into an image of the store; upstream bundles (PROTOCOL 0.19) yield their inner image."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from hiver_backends.linux import bundles, syscalls
from hiver_backends.linux.references import BUNDLE_LABEL, labels
from hiverd.contracts.errors import InvalidError

_MAX_DOCUMENT_BYTES: Final = 8 * 1024 * 1024


def publish(work: Path, document: Mapping[str, Any], target: Path, reference: str) -> None:
    """Moves the root that umoci left in `work`/bundle, with its configuration, to `target` in one rename. Blocking."""
    root = work / "bundle" / "rootfs"
    if labels(document).get(BUNDLE_LABEL) == "1":
        document = _inner_document(root, reference)
        root = root / bundles.INNER_ROOT
        if root.is_symlink() or not root.is_dir():
            raise InvalidError(f"image {reference!r} is a bundle without an inner root", field="image")
    finished = work / "finished"
    finished.mkdir(mode=0o700)
    root.rename(finished / "rootfs")
    (finished / "image.json").write_text(json.dumps(document))
    try:
        finished.rename(target)
    except OSError:
        if not (target / "rootfs").is_dir():  # two names of one image may be pulled at once
            raise


def _inner_document(root: Path, reference: str) -> dict[str, Any]:
    try:
        manifest = _read_inside(root, bundles.INNER_MANIFEST)
        document = _read_first(root, bundles.configuration_paths(manifest))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InvalidError(
            f"image {reference!r} is a bundle without a readable configuration", field="image"
        ) from error
    if not isinstance(document, dict):
        raise InvalidError(f"image {reference!r} is a bundle with an odd configuration", field="image")
    return document


def _read_first(root: Path, paths: Sequence[str]) -> Any:
    for path in paths[:-1]:
        try:
            return _read_inside(root, path)
        except FileNotFoundError:
            continue
    return _read_inside(root, paths[-1])


def _read_inside(root: Path, path: str) -> Any:
    """A JSON file of an image, which may hold links that lead anywhere: they stay inside."""
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        descriptor = syscalls.openat2(directory, path, os.O_RDONLY | os.O_NONBLOCK)
    finally:
        os.close(directory)
    with os.fdopen(descriptor, "rb") as file:
        return json.loads(file.read(_MAX_DOCUMENT_BYTES))
