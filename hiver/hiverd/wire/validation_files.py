"""Rules for the entries of `fs` (PROTOCOL 4.2, 4.4) and for paths inside a sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

from hiverd.contracts.errors import InvalidError
from hiverd.strict import fail, fail_missing, shown
from hiverd.wire.model import AclRule, AzureFileSystem, ExternalFileSystem, FileSystem, GdriveFileSystem

MAX_MOUNTS: Final = 64
MAX_ACLS: Final = 1024
MAX_PATH_BYTES: Final = 4095
"""Linux's PATH_MAX without the closing NUL."""
KERNEL_MOUNTS: Final = ("/proc", "/sys", "/dev")
"""File systems of the sandbox's own that nothing may be mounted over or into."""


def clean_path(path: str) -> str:
    """Folds repeated slashes, `.` segments and a trailing slash. `..` segments stay: validation refuses them."""
    folded = "/".join(segment for segment in path.split("/") if segment not in {"", "."})
    return f"/{folded}" if path.startswith("/") else folded


def is_inside(path: str, folder: str) -> bool:
    """True if the clean `path` is the clean `folder` or lies below it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def validate_absolute(field: str, path: str) -> None:
    """Checks that `path` is one that the kernel can take and that means the same to everyone."""
    if not path.startswith("/"):
        fail(field, f"must be an absolute path, got {shown(path)}")
    if "\0" in path:
        fail(field, "must not hold a NUL character")
    if len(path.encode()) > MAX_PATH_BYTES:
        fail(field, f"must be at most {MAX_PATH_BYTES} bytes")


def validate_mount_path(field: str, path: str) -> None:
    """Checks an absolute path that names a mount: `..` could only hide which one is meant."""
    validate_absolute(field, path)
    if ".." in path.split("/"):
        fail(field, f"must not hold .. segments, got {shown(path)}")


def validate_file_systems(entries: Sequence[FileSystem]) -> None:
    """Checks each entry, and that no mount lies inside another."""
    if len(entries) > MAX_MOUNTS:
        fail("fs", f"must have at most {MAX_MOUNTS} entries")
    for index, entry in enumerate(entries):
        _validate_mount(f"fs[{index}].mount", entry.mount)
        _validate_acls(f"fs[{index}].acls", entry.acls or ())
        _validate_backend(f"fs[{index}]", entry)
    _validate_no_overlap([entry.mount for entry in entries])


def _validate_mount(field: str, mount: str) -> None:
    if not mount:
        fail_missing(field)
    validate_mount_path(field, mount)
    clean = clean_path(mount)
    if clean == "/":
        fail(field, "must not be the root directory")
    for kernel in KERNEL_MOUNTS:
        if is_inside(clean, kernel):
            fail(field, f"must not lie in {kernel}, got {shown(mount)}")


def _validate_no_overlap(mounts: Sequence[str]) -> None:
    for later, mount in enumerate(mounts):
        for earlier, other in enumerate(mounts[:later]):
            if is_inside(clean_path(mount), clean_path(other)) or is_inside(clean_path(other), clean_path(mount)):
                fail(f"fs[{later}].mount", f"{shown(mount)} overlaps fs[{earlier}].mount {shown(other)}")


def _validate_acls(field: str, acls: Sequence[AclRule]) -> None:
    if len(acls) > MAX_ACLS:
        fail(field, f"must have at most {MAX_ACLS} rules")
    for index, rule in enumerate(acls):
        where = f"{field}[{index}].path"
        if not rule.path.strip():
            fail_missing(where)
        if "\0" in rule.path or ".." in rule.path.split("/"):
            fail(where, f"must be a path or a glob without .. segments, got {shown(rule.path)}")
        if len(rule.path.encode()) > MAX_PATH_BYTES:
            fail(where, f"must be at most {MAX_PATH_BYTES} bytes")


def _validate_backend(path: str, entry: FileSystem) -> None:
    missing = next((name for name in entry.required if not getattr(entry, name)), None) or _missing_choice(entry)
    if missing is not None:
        field = f"{path}.{missing.split()[0].rstrip(',')}"
        raise InvalidError(f"{path}.backend {entry.backend}: {missing} is required", field=field)
    for name in entry.__struct_fields__:
        value = getattr(entry, name)
        if isinstance(value, str) and "\0" in value:
            fail(f"{path}.{name}", "must not hold a NUL character")
    if isinstance(entry, ExternalFileSystem):
        _validate_base_url(f"{path}.host", entry.host or "")


def _missing_choice(entry: FileSystem) -> str | None:
    """Which member is missing where one out of several is needed."""
    if isinstance(entry, GdriveFileSystem):
        if not (entry.gdrive_access_token or entry.gdrive_service_account_json):
            return "gdrive_access_token or gdrive_service_account_json"
    elif isinstance(entry, AzureFileSystem):
        if not (entry.azure_account or entry.azure_connection_string or entry.azure_endpoint):
            return "azure_account"
        if not (entry.azure_account_key or entry.azure_connection_string or entry.azure_sas_token):
            return "azure_account_key, azure_connection_string or azure_sas_token"
    return None


def _validate_base_url(field: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        # The value itself is not shown: a user name and a password may be part of it.
        fail(field, "must be an http:// or https:// base URL without query and fragment")
