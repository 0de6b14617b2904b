"""The worker process: one capture or one restore, asked for on standard input. It starts with everything imported, so
that it needs no file of the host once it is inside a sandbox."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
from typing import Final

from hiverd.snapshots import entering
from hiverd.snapshots.capture import Capture, TooManyMembersError
from hiverd.snapshots.extracting import Extractor, LimitError, Limits
from hiverd.snapshots.frames import (
    MAX_FDS,
    Answer,
    Ask,
    Captured,
    CaptureOrder,
    Failed,
    Going,
    Order,
    Restored,
    RestoreOrder,
    encode,
    order_decoder,
)
from hiverd.snapshots.inflating import Inflater
from hiverd.snapshots.mapped import mapped_files
from hiverd.snapshots.reading import DamagedArchiveError, TarReader
from hiverd.snapshots.selection import Selection
from hiverd.snapshots.spool import Spool, SpoolFullError

MAX_ROUNDS: Final = 4
"""Passes that give up their pause because too much has changed, before one does it however long it takes."""
PAUSE_BYTES: Final = 8 << 20
PAUSE_FILES: Final = 500
"""As much is read while the workload is paused: some 30 ms."""
_MEMORY_BYTES: Final = 2 << 30
_READ_BYTES: Final = 1 << 16
_PAUSED_NICENESS: Final = -15


class Channel:
    """The worker's end."""

    def __init__(self, socket_: socket.socket) -> None:
        self._socket = socket_
        self._data = b""

    def receive(self) -> tuple[Order, list[int]]:
        """Raises `EOFError` when the server has gone."""
        descriptors: list[int] = []
        while b"\n" not in self._data:
            data, fds, _, _ = socket.recv_fds(self._socket, _READ_BYTES, MAX_FDS)
            descriptors += fds
            if not data:
                raise EOFError
            self._data += data
        line, _, self._data = self._data.partition(b"\n")
        return order_decoder.decode(line), descriptors

    def send(self, answer: Answer) -> None:
        self._socket.sendall(encode(answer))

    def ask(self, *, paused: bool) -> list[int]:
        """Waits until it is so. Gives the processes that are paused."""
        self.send(Ask(paused))
        answer, _ = self.receive()
        if not isinstance(answer, Going):
            raise EOFError
        return answer.processes


def main() -> None:
    """Serves one order and ends. Nothing is ever written to standard error but what is wrong with this program."""
    entering.die_with_parent()
    channel = Channel(socket.socket(fileno=os.dup(0)))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        order, descriptors = channel.receive()
        channel.send(_outcome(channel, order, descriptors))
    sys.stderr.flush()
    os._exit(0)  # no exit handlers: inside a sandbox nothing more may be imported


def _outcome(channel: Channel, order: Order, descriptors: list[int]) -> Answer:
    try:
        if isinstance(order, CaptureOrder):
            return _capture(channel, order, *descriptors)
        if isinstance(order, RestoreOrder):
            return _restore(order, *descriptors)
    except (SpoolFullError, TooManyMembersError) as error:
        return Failed(_too_much(error))
    except OSError as error:
        return Failed(error.strerror or str(error), error.errno or 0)
    except MemoryError:
        return Failed("out of memory")
    return Failed("an order that makes no sense")


def _too_much(error: SpoolFullError | TooManyMembersError) -> str:
    if isinstance(error, SpoolFullError):
        return "the archive would be larger than snapshots.max_mib"
    return "there are more files than snapshots.max_members"


# -- capture ----------------------------------------------------------------------------------------------------------


def _capture(channel: Channel, order: CaptureOrder, spool_file: int) -> Captured:
    spool = Spool(spool_file, order.compression, order.level, order.threads, order.max_bytes)
    selection = Selection(order.include, order.excluded)
    capture = Capture(order.parts, selection, spool, order.max_members)
    capture.read_all()
    if order.live:
        _settle(channel, capture)
    spans = capture.finish()
    capture.close()
    return Captured(spans, capture.counts.members, capture.counts.left_out)


def _settle(channel: Channel, capture: Capture) -> None:
    for left in reversed(range(MAX_ROUNDS)):
        processes = channel.ask(paused=True)
        _hurry(_PAUSED_NICENESS)
        changes = capture.compare(mapped_files(processes))
        if left == 0 or (changes.bytes <= PAUSE_BYTES and len(changes.changed) <= PAUSE_FILES):
            capture.take(changes)
            channel.ask(paused=False)
            _hurry(0)
            return
        channel.ask(paused=False)
        _hurry(0)
        capture.take(changes)


def _hurry(niceness: int) -> None:
    """While a workload is paused, this comes before what else the host does."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, niceness)


# -- restore ----------------------------------------------------------------------------------------------------------


def _restore(order: RestoreOrder, archive: int, process: int, root: int) -> Answer:
    selection = Selection(order.include, order.excluded)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    inner_root = entering.enter(process, root)
    os.close(process)
    os.close(root)
    extractor = Extractor(inner_root, selection, Limits(order.max_members, order.max_bytes))
    outcome = extractor.outcome
    try:
        extractor.extract(TarReader(Inflater(archive)))
    except DamagedArchiveError as error:
        return Failed(str(error), damaged=True, touched=outcome.members > 0)
    except LimitError as error:
        return Failed(str(error), damaged=True, touched=True)
    except OSError as error:
        return Failed(error.strerror or str(error), error.errno or 0, touched=True)
    return Restored(outcome.members, outcome.bytes, outcome.refused, outcome.first_refusal)
