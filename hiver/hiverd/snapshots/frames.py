"""What the server and its snapshot workers tell each other: lines of JSON over a socket, descriptors beside them."""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Struct

from hiverd.snapshots.capture import Part
from hiverd.snapshots.spool import Compression, Span

SUBCOMMAND: Final = "snapshot-worker"
"""Of the command line, hidden: how a frozen binary starts a worker from itself."""
MAX_FDS: Final = 3


class CaptureOrder(Struct, frozen=True, tag="capture"):
    """One descriptor comes with it: the spool file."""

    parts: list[Part]
    include: list[str]
    excluded: list[str]
    compression: Compression
    level: int
    threads: int
    max_bytes: int
    max_members: int
    live: bool
    """The workload runs: ask for it to be paused."""


class RestoreOrder(Struct, frozen=True, tag="restore"):
    """Three descriptors come with it: the archive, a pidfd of the sandbox, its root folder."""

    include: list[str]
    excluded: list[str]
    max_members: int
    max_bytes: int


class Going(Struct, frozen=True, tag="go"):
    """The server has paused the workload, or let it go on, as asked."""

    processes: list[int] = []
    """Those that are paused."""


class Ask(Struct, frozen=True, tag="ask"):
    paused: bool


class Captured(Struct, frozen=True, tag="captured"):
    spans: list[Span]
    members: int
    left_out: int


class Restored(Struct, frozen=True, tag="restored"):
    members: int
    bytes: int
    refused: int
    first_refusal: str


class Failed(Struct, frozen=True, tag="failed"):
    reason: str
    errno: int = 0
    damaged: bool = False
    """It is the archive that is wrong."""
    touched: bool = False
    """Part of it has been restored."""


Order = CaptureOrder | RestoreOrder | Going
Answer = Ask | Captured | Restored | Failed
order_decoder: Final = msgspec.json.Decoder(Order)
answer_decoder: Final = msgspec.json.Decoder(Answer)


def encode(frame: Order | Answer) -> bytes:
    return msgspec.json.encode(frame) + b"\n"
