"""What the operator's environment gives to mounts that do not say (PROTOCOL 4.2). Pure.

Filled in where a mount is judged and made, and never stored or answered: these are the operator's credentials.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from hiverd.wire.model import (
    AnyFileSystem,
    AzureFileSystem,
    ExternalFileSystem,
    GcsFileSystem,
    GdriveFileSystem,
    OnedriveFileSystem,
    S3FileSystem,
    SandboxConfig,
)
from hiverd.wire.redaction import SECRET_MEMBERS

_WITHOUT: Final = frozenset({"mount", "acls", "internal", "async_", "s3_use_path_style"})
_CLASSES: Final[tuple[type[AnyFileSystem], ...]] = (
    GdriveFileSystem,
    GcsFileSystem,
    S3FileSystem,
    AzureFileSystem,
    OnedriveFileSystem,
    ExternalFileSystem,
)
_ENDPOINTS: Final = ("s3_endpoint", "azure_endpoint")


def variable_of(backend: str, member: str) -> str:
    """The environment variable that stands for a member: `HIVE_S3_BUCKET` for `s3_bucket`."""
    return f"HIVE_{backend.upper()}_{member.removeprefix(f'{backend}_').upper()}"


VARIABLES: Final[Mapping[str, tuple[str, str]]] = {
    variable_of(cls.backend, member): (cls.backend, member)
    for cls in _CLASSES
    for member in cls.__struct_fields__
    if member not in _WITHOUT
}
"""Variable -> (backend, member)."""


def with_environment(config: SandboxConfig, environ: Mapping[str, str]) -> SandboxConfig:
    """Empty members of mounts filled in. Credentials go only to the service itself or to the operator's endpoint:
    with an endpoint of its own, an entry has to bring its own."""
    if not config.fs:
        return config
    return msgspec.structs.replace(config, fs=tuple(_filled(entry, environ) for entry in config.fs))


def _filled(entry: AnyFileSystem, environ: Mapping[str, str]) -> AnyFileSystem:
    own_endpoint = any(getattr(entry, name, None) for name in _ENDPOINTS)
    values: dict[str, Any] = {}
    for variable, (backend, member) in VARIABLES.items():
        if backend != entry.backend or getattr(entry, member) or not environ.get(variable):
            continue
        if not (own_endpoint and member in SECRET_MEMBERS):
            values[member] = environ[variable]
    return msgspec.structs.replace(entry, **values) if values else entry
