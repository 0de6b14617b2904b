"""Makes programs in a sandbox trust its CA (PROTOCOL 5.8): before they run, and safely: the image may be hostile."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from hiverd.contracts.isolation import Workload
from hiverd.files import rooted, staged

BUNDLE: Final = "/etc/ssl/certs/ca-certificates.crt"
"""Every image has it afterwards; what it lists stays."""
OTHER_BUNDLES: Final = (
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
    "/var/lib/ca-certificates/ca-bundle.pem",
)
"""Of other distributions: only added to where they are."""
STAND_ALONE: Final = "/etc/ssl/certs/sandbox-ca.crt"
ENVIRONMENT: Final[Mapping[str, str]] = {
    "SSL_CERT_FILE": BUNDLE,
    "REQUESTS_CA_BUNDLE": BUNDLE,
    "CURL_CA_BUNDLE": BUNDLE,
    "GIT_SSL_CAINFO": BUNDLE,
    "PIP_CERT": BUNDLE,
    "NODE_EXTRA_CA_CERTS": STAND_ALONE,
}
MAX_BUNDLE_BYTES: Final = 4 << 20


def install(workload: Workload, certificate_pem: bytes) -> None:
    """Blocking. Raises `OSError` if the image leaves no place for it."""
    root = workload.open_root()
    try:
        ids = workload.root_ids
        _write(root, STAND_ALONE, certificate_pem, ids)
        listed = _read(root, BUNDLE)
        _add(root, BUNDLE, _host_bundle() if listed is None else listed, certificate_pem, ids)
        seen = {_identity(root, BUNDLE)}
        for path in OTHER_BUNDLES:
            # Distributions link some of these to one another: an addition to one is enough.
            content = _read(root, path)
            if content is not None and _identity(root, path) not in seen:
                _add(root, path, content, certificate_pem, ids)
                seen.add(_identity(root, path))
    finally:
        os.close(root)


def _add(root: int, path: str, content: bytes, certificate_pem: bytes, ids: tuple[int, int]) -> None:
    if certificate_pem not in content:
        _write(root, path, content.rstrip(b"\n") + b"\n" + certificate_pem, ids)


def _read(root: int, path: str) -> bytes | None:
    """None if it is not there, or nothing that could be a bundle."""
    with contextlib.suppress(OSError):
        descriptor, size = rooted.open_regular(root, path.encode())
        with os.fdopen(descriptor, "rb") as file:
            return file.read() if size <= MAX_BUNDLE_BYTES else None
    return None


def _identity(root: int, path: str) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        descriptor, _ = rooted.open_regular(root, path.encode())
        try:
            status = os.fstat(descriptor)
            return status.st_dev, status.st_ino
        finally:
            os.close(descriptor)
    return None


def _write(root: int, path: str, content: bytes, ids: tuple[int, int]) -> None:
    file = staged.stage(root, path.encode(), ids)
    try:
        file.write([content])
        file.commit()
        file.finish()
    finally:
        file.close()


@functools.cache
def _host_bundle() -> bytes:
    """For images that trust nobody yet: whom this host trusts."""
    for path in (BUNDLE, *OTHER_BUNDLES):
        with contextlib.suppress(OSError):
            return Path(path).read_bytes()
    return b""
