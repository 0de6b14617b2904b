"""What passes over a mount server's control socket: msgpack documents, each behind its length in four bytes.

The server asks, one `Done` answers each question; between them the mount server tells what happens, unasked.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from hiverd.wire.model import AclRule

SIZE_BYTES: Final = 4
MAX_FRAME_BYTES: Final = 16 << 20

FailureKind = Literal["invalid", "unsupported", "refused", "missing", "unreachable", "internal"]
FileOperation = Literal["read", "write", "delete"]
SyncOperation = Literal["list", "list-dir", "stat", "get", "put", "delete", "move"]


class RemoteOptions(Struct, frozen=True):
    """The operator's choice for remote mounts (settings, `[files]`)."""

    cache_bytes: int
    uploads: int
    """At a time."""


class Begin(Struct, frozen=True, tag=True, kw_only=True):
    """The first question of all: what to serve. Holds credentials."""

    number: int
    server_pid: int
    mount: str
    """Where the agent sees it."""
    backend: str
    entry: Annotated[dict[str, Any], Meta(description="The whole `fs[]` entry (PROTOCOL 4.2)")]
    rules: list[AclRule]
    folder: str
    """Local: what is served. Remote: where the copy and the database are."""
    mountpoint: str | None
    """None: nothing is mounted, what is pending is uploaded."""
    recording: bool
    """Whether accesses are told of."""
    check: bool = False
    """Whether the service is asked before the mount is made."""
    operators: bool = False
    """The folder is not the sandbox's own: owners are presented, not changed."""
    remote: RemoteOptions | None = None


class Attach(Struct, frozen=True, tag=True, kw_only=True):
    """A server that was not there at the beginning."""

    number: int
    server_pid: int


class Change(Struct, frozen=True, tag=True, kw_only=True):
    """New rules, new credentials, or another wish for events. In force when the answer comes."""

    number: int
    rules: list[AclRule]
    recording: bool
    entry: dict[str, Any] | None = None
    """None: as it was."""


class Finish(Struct, frozen=True, tag=True, kw_only=True):
    """Unmounts; answered then. Uploads what is pending, removes the folder of a remote mount, and ends."""

    number: int


class Quit(Struct, frozen=True, tag=True, kw_only=True):
    """Unmounts and ends. What is pending stays on disk."""

    number: int


class Tell(Struct, frozen=True, tag=True, kw_only=True):
    """Answered when everything that happened until now has been told."""

    number: int


class Recorded(Struct, frozen=True, tag=True):
    """No question: so many of the accesses that were told on this connection are on record for good."""

    accesses: int


Question = Begin | Attach | Change | Tell | Finish | Quit


class Failure(Struct, frozen=True):
    kind: FailureKind
    message: str
    field: str | None = None
    """Of the `fs[]` entry."""


class Done(Struct, frozen=True, tag=True):
    number: int
    pid: int
    pending: int = 0
    """Files that are not uploaded yet."""
    failure: Failure | None = None


class Access(Struct, frozen=True, array_like=True):
    """One access of the agent's (PROTOCOL 6.3). `path` is relative to the mount."""

    allowed: bool
    operation: FileOperation
    path: str
    duration_ms: int = 0
    error: str | None = None


class Accessed(Struct, frozen=True, tag=True):
    accesses: list[Access]


class SyncBegan(Struct, frozen=True, tag=True):
    """A call of the backend (PROTOCOL 7, `system.fs-sync-request`)."""

    call: int
    operation: SyncOperation
    path: str


class SyncEnded(Struct, frozen=True, tag=True):
    call: int
    duration_ms: int
    error: str | None = None


class Pending(Struct, frozen=True, tag=True):
    """How much is to be uploaded, told now and then while it is more than nothing, and when it is nothing."""

    files: int
    size_bytes: int


class Lost(Struct, frozen=True, tag=True):
    """What happened while no server was there, beyond what is kept: accesses; calls of the service and log lines."""

    accesses: int
    others: int = 0


class Said(Struct, frozen=True, tag=True):
    """A line for the server's log."""

    level: int
    text: str


Told = Done | Accessed | SyncBegan | SyncEnded | Pending | Lost | Said

_encode = msgspec.msgpack.Encoder().encode
_heard_decoder: msgspec.msgpack.Decoder[Question | Recorded] = msgspec.msgpack.Decoder(Question | Recorded)
_told_decoder: msgspec.msgpack.Decoder[Told] = msgspec.msgpack.Decoder(Told)


class FrameError(Exception):
    """The other side does not keep to the protocol."""


def frame(message: Question | Recorded | Told) -> bytes:
    """Ready to send."""
    content = _encode(message)
    return len(content).to_bytes(SIZE_BYTES) + content


def heard_of(content: bytes) -> Question | Recorded:
    """What the server says. Raises `msgspec.MsgspecError`."""
    return _heard_decoder.decode(content)


def told_of(content: bytes) -> Told:
    """Raises `msgspec.MsgspecError`."""
    return _told_decoder.decode(content)


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """The next document; None at the end. Raises `FrameError`, `OSError`."""
    try:
        size = int.from_bytes(await reader.readexactly(SIZE_BYTES))
        if size > MAX_FRAME_BYTES:
            raise FrameError(f"a frame of {size} bytes")
        return await reader.readexactly(size)
    except asyncio.IncompleteReadError:
        return None
