"""Makes programs in a sandbox trust its CA (PROTOCOL 5.8): before they run, and safely: the image may be hostile.

What is there is added to, where it belongs to the sandbox; folders that are mounted into it are left alone.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from cryptography import x509

from hiverd.contracts.isolation import Workload
from hiverd.files import linux, rooted, staged
from hiverd.sandboxes import keystores, nss

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
    "SSL_CERT_FILE": BUNDLE,  # OpenSSL and most that link it, Go, Python, Ruby, uv
    "REQUESTS_CA_BUNDLE": BUNDLE,
    "CURL_CA_BUNDLE": BUNDLE,
    "GIT_SSL_CAINFO": BUNDLE,
    "PIP_CERT": BUNDLE,
    "AWS_CA_BUNDLE": BUNDLE,
    "CARGO_HTTP_CAINFO": BUNDLE,
    "CLOUDSDK_CORE_CUSTOM_CA_CERTS_FILE": BUNDLE,
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": BUNDLE,
    "HTTPLIB2_CA_CERTS": BUNDLE,
    "DENO_CERT": STAND_ALONE,
}
"""For programs that bring a list of their own, unless the image or the configuration says otherwise."""
FORCED_ENVIRONMENT: Final[Mapping[str, str]] = {"NODE_EXTRA_CA_CERTS": STAND_ALONE}
"""Whatever the configuration says (PROTOCOL 4.1)."""

JAVA_STORES: Final = (
    "/etc/ssl/certs/java/cacerts",  # Debian, Alpine
    "/etc/pki/ca-trust/extracted/java/cacerts",  # Fedora
    "/var/lib/ca-certificates/java-cacerts",  # SUSE
    "/opt/java/openjdk/lib/security/cacerts",  # Temurin's images
)
JAVA_FOLDERS: Final = ("/usr/lib/jvm", "/usr/java", "/usr/local", "/opt")
"""Where Java's homes lie."""
NSS_FOLDER: Final = ".pki/nssdb"
"""Below the home."""

_MAX_BYTES: Final = 4 << 20
"""Of a bundle or store that is added to."""
_MAX_ENTRIES: Final = 64
"""Of a folder that is looked through."""
_PEM_MARK: Final = b"-----BEGIN "
_RESOLVE_OWN: Final = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS | linux.RESOLVE_NO_XDEV

log = logging.getLogger(__name__)


def install(workload: Workload, certificate_pem: bytes, environment: Mapping[str, str]) -> None:
    """`environment` is the workload's. Blocking. Raises `OSError` if the image leaves no place for the bundle; further
    stores that cannot be written are left out."""
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    with contextlib.closing(_Root(workload)) as root:
        root.write(STAND_ALONE, certificate_pem)
        listed = root.read(BUNDLE)
        root.write(BUNDLE, *_appended(_host_bundle() if listed is None else listed, certificate_pem))
        for path in dict.fromkeys((*OTHER_BUNDLES, *_named_bundles(environment))):
            content = root.read(path)
            if content is not None and _PEM_MARK in content:
                root.offer(path, *_appended(content, certificate_pem))
        _install_in_java(root, certificate, environment)
        _install_in_nss(root, certificate, environment)


def _install_in_java(root: _Root, certificate: x509.Certificate, environment: Mapping[str, str]) -> None:
    for path in _java_stores(root, environment):
        content = root.read(path)
        store = None if content is None else keystores.with_certificate(content, certificate)
        if store is not None:
            root.offer(path, store)


def _install_in_nss(root: _Root, certificate: x509.Certificate, environment: Mapping[str, str]) -> None:
    """Also where no browser is: it may be installed later. A database of the image's own stays as it is."""
    folder = f"{_path(environment.get('HOME')) or '/root'}/{NSS_FOLDER}"
    if not root.has(f"{folder}/{nss.FILES[0]}"):
        for name, content in nss.databases(certificate).items():
            root.offer(f"{folder}/{name}", content)


def _named_bundles(environment: Mapping[str, str]) -> Iterator[str]:
    """Those that the image or the configuration prefers to ours: our certificate is added to them as well."""
    for name, ours in ENVIRONMENT.items():
        path = _path(environment.get(name))
        if ours == BUNDLE and path not in (None, BUNDLE):
            yield path


def _java_stores(root: _Root, environment: Mapping[str, str]) -> Iterator[str]:
    yield from JAVA_STORES
    homes = [f"{folder}/{name}" for folder in JAVA_FOLDERS for name in root.folders(folder)]
    named = _path(environment.get("JAVA_HOME"))
    for home in dict.fromkeys((*homes, *(() if named is None else (named,)))):
        yield f"{home}/lib/security/cacerts"
        yield f"{home}/jre/lib/security/cacerts"


def _path(value: str | None) -> str | None:
    """A variable's value if it is a path that can be opened."""
    if not value or not value.startswith("/") or "\0" in value or not value.isascii():
        return None
    path = os.path.normpath(value)
    return None if path.strip("/") == "" else path


def _appended(bundle: bytes, certificate_pem: bytes) -> tuple[bytes, ...]:
    """In pieces: bundles are large, and this is in the way of every sandbox's first instruction."""
    return (bundle, certificate_pem) if bundle.endswith(b"\n") else (bundle, b"\n", certificate_pem)


class _Root:
    """A workload's root folder, as far as it is the workload's own. Every path is hostile."""

    def __init__(self, workload: Workload) -> None:
        self._ids = workload.root_ids
        self._descriptor = workload.open_root()
        self._written: set[tuple[int, int]] = set()

    def close(self) -> None:
        os.close(self._descriptor)

    def has(self, path: str) -> bool:
        """True also for what cannot be looked at."""
        try:
            os.close(rooted.open_in_root(self._descriptor, os.fsencode(path), rooted.O_PATH))
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ENOTDIR)
        return True

    def folders(self, path: str) -> list[str]:
        """Names of the first folders in this folder, in order; none if it is not there."""
        names: list[str] = []
        with contextlib.suppress(OSError):
            descriptor = rooted.open_directory(self._descriptor, os.fsencode(path))
            try:
                listed = itertools.islice(rooted.entries(descriptor), _MAX_ENTRIES)
                names += (os.fsdecode(entry.name) for entry in listed if entry.is_directory)
            finally:
                os.close(descriptor)
        return sorted(names)

    def read(self, path: str) -> bytes | None:
        """None if it is not there, nothing that could be a bundle, or changed by us already: distributions link some
        of these files to one another."""
        with contextlib.suppress(OSError):
            descriptor, size = rooted.open_regular(self._descriptor, os.fsencode(path))
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if size <= _MAX_BYTES and (status.st_dev, status.st_ino) not in self._written:
                    return file.read(_MAX_BYTES)
        return None

    def offer(self, path: str, *pieces: bytes) -> None:
        """Writes a file if the image lets us."""
        try:
            self.write(path, *pieces)
        except OSError as error:
            log.info("the sandbox's CA is not in %s: %s", path, error.strerror or error)

    def write(self, path: str, *pieces: bytes) -> None:
        """Raises `OSError`; EXDEV for what is mounted."""
        self._require_own(os.fsencode(path))
        file = staged.stage(self._descriptor, os.fsencode(path), self._ids)
        try:
            file.write(pieces)
        except BaseException:
            file.close()
            raise
        file.finish()
        descriptor, _ = rooted.open_regular(self._descriptor, os.fsencode(path))
        status = os.fstat(descriptor)
        os.close(descriptor)
        self._written.add((status.st_dev, status.st_ino))

    def _require_own(self, path: bytes) -> None:
        """What the operator or another sandbox shares with this one must not learn of its CA. The nearest folder that
        exists tells."""
        while True:
            try:
                os.close(linux.openat2(self._descriptor, path, rooted.O_PATH, _RESOLVE_OWN))
            except FileNotFoundError:
                path = os.path.dirname(path)
            else:
                return


@functools.cache
def _host_bundle() -> bytes:
    """For images that trust nobody yet: whom this host trusts."""
    for path in (BUNDLE, *OTHER_BUNDLES):
        with contextlib.suppress(OSError):
            return Path(path).read_bytes()
    return b""
