"""Bodies of answers (PROTOCOL 3). Absent optional members are left out, never null (PROTOCOL 2)."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

JSON_CONTENT_TYPE: Final = "application/json; charset=utf-8"

SandboxStatus = Literal["starting", "running", "stopping"]
LifecycleStatus = Literal["start", "stop", "die", "destroy"]
_encoder: Final = msgspec.json.Encoder()


class SandboxRef(Struct, frozen=True, omit_defaults=True):
    """Answer to create, and the entries of list (PROTOCOL 3.1, 3.2)."""

    id: str
    key: str
    status: SandboxStatus | None = None


class LifecycleEvent(Struct, frozen=True):
    """One frame of the lifecycle stream (PROTOCOL 3.3)."""

    id: str
    key: str
    status: LifecycleStatus


class PodSandbox(Struct, frozen=True):
    """One entry of `GET /sandbox/{id}/v1` (PROTOCOL 3.4)."""

    key: str
    ready: bool
    status: Literal["starting", "running", "stopping", "stopped"]


class PodInfo(Struct, frozen=True):
    sandboxes: tuple[PodSandbox, ...]


class PodEvent(Struct, frozen=True):
    """One frame of `GET /sandbox/{id}/v1/events`; `timestamp` as RFC 3339, UTC."""

    key: str
    status: str
    timestamp: str


class SandboxInfo(Struct, frozen=True):
    """Answer to info (PROTOCOL 3.8)."""

    isolation: Literal["container", "microvm"]


class ExecResult(Struct, frozen=True, omit_defaults=True):
    """Answer to exec (PROTOCOL 3.11). The last two members say how much output was cut off; absent if none."""

    stdout: str
    stderr: str
    exit_code: int
    stdout_truncated_bytes: int = 0
    stderr_truncated_bytes: int = 0


class ApplyResult(Struct, frozen=True, omit_defaults=True):
    """Answer to PUT config (PROTOCOL 3.9). `config` is what is in force now; both objects hold credentials."""

    applied: bool
    config: dict[str, Any]
    changes: dict[str, Any]
    error: str | None = None


class FileWritten(Struct, frozen=True):
    """Answer to an upload (PROTOCOL 3.10); `path` is absolute and clean."""

    path: str
    bytes: int


class DirectoryEntry(Struct, frozen=True):
    """`size` in bytes, 0 for directories; a symbolic link is not a directory."""

    name: str
    path: str
    is_dir: bool
    size: int


class DirectoryListing(Struct, frozen=True):
    """Answer to directories (PROTOCOL 3.10)."""

    entries: tuple[DirectoryEntry, ...]


class SnapshotPartResult(Struct, frozen=True, omit_defaults=True):
    captured: bool
    key: str
    bytes: int | None = None
    reason: str | None = None


class SnapshotResult(Struct, frozen=True, omit_defaults=True):
    """Answer to snapshot (PROTOCOL 3.15): the parts that were asked for."""

    vm: SnapshotPartResult | None = None
    files: SnapshotPartResult | None = None


class SnapshotVersion(Struct, frozen=True, omit_defaults=True):
    """One version of a snapshot: an archive of so many bytes. `created_at` in UTC. No `sha256`: nobody knows it."""

    version: str
    bytes: int
    created_at: datetime
    sha256: str | None = None


class SnapshotEntry(Struct, frozen=True):
    """One key of the snapshot store; versions from the newest to the oldest, never none."""

    key: str
    versions: tuple[SnapshotVersion, ...]


class SnapshotStored(Struct, frozen=True, omit_defaults=True):
    """Answer to import and fork: what is the newest version of the key now."""

    key: str
    version: str
    bytes: int
    created_at: datetime
    sha256: str | None = None


class ErrorBody(Struct, frozen=True, omit_defaults=True):
    """Body of every 4xx and 5xx (PROTOCOL 0.18, 2); `error` is never empty."""

    error: str
    details: dict[str, Any] | None = None


def encode(answer: object) -> bytes:
    """JSON in UTF-8 of an answer or of a list of answers. Text must be free of surrogates: see `wire_text`."""
    return _encoder.encode(answer)


def wire_text(name: str | bytes) -> str:
    """A file name or other bytes of the sandbox as text that JSON can hold; what is no UTF-8 becomes U+FFFD."""
    raw = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
    return raw.decode("utf-8", "replace")
