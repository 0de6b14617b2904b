"""The guard of one sandbox's gate: accepts what leaves, answers names, and records what the packet filter rejected."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from hiverd.contracts.isolation import GATE_ADDRESS
from hiverd.egress import netlink
from hiverd.egress.gate import GateSockets, original_destination
from hiverd.egress.names import joined
from hiverd.egress.outlet import Outlet
from hiverd.egress.recorder import Attempt
from hiverd.egress.resolver import Resolver
from hiverd.egress.session import UNKNOWN, Session

MAX_CONNECTIONS: Final = 1024
"""Of one sandbox at a time; further ones wait in the listener's backlog."""
RECORDS_PER_SECOND: Final = 50
"""Of rejected packets and questions of one sandbox."""
_DATAGRAM_BYTES: Final = 64 * 1024
_DATAGRAMS_PER_TURN: Final = 32
_ACCEPT_PAUSE_SECONDS: Final = 0.1

log = logging.getLogger(__name__)


class Guard:
    """Lives as long as the sandbox, or the server."""

    def __init__(self, key: str, outlet: Outlet, sockets: GateSockets) -> None:
        """`key` is for the log. Owns the sockets and the outlet."""
        self.outlet = outlet
        self._key = key
        self._sockets = sockets
        self._loop = asyncio.get_running_loop()
        self._sessions: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(MAX_CONNECTIONS)
        self._budget = _Budget(self._loop)
        self._resolver = Resolver(
            sockets.dns, sockets.dns_tcp, outlet.names.note, lambda name: self._record("dns", name)
        )
        self._loop.add_reader(sockets.packet_log, self._record_packets)
        self._accepting = asyncio.create_task(self._accept(), name=f"egress-{key}")

    @property
    def connection_count(self) -> int:
        return len(self._sessions)

    async def close(self) -> None:
        """Cuts everything. Idempotent."""
        self._loop.remove_reader(self._sockets.packet_log)
        tasks = [self._accepting, *self._sessions]
        for task in tasks:
            task.cancel()
        self.outlet.close()
        await asyncio.gather(*tasks, self._resolver.close(), return_exceptions=True)
        # Closing a socket of the packet filter's kind can wait for the kernel to free rules of any namespace.
        await asyncio.to_thread(self._sockets.close)

    async def _accept(self) -> None:
        while True:
            await self._room.acquire()
            try:
                sock, _ = await self._loop.sock_accept(self._sockets.tcp)
                sock.setblocking(False)
            except OSError as error:
                # Out of descriptors, for instance: what waits in the backlog is not lost.
                self._room.release()
                log.warning("egress %s: cannot accept a connection: %s", self._key, error)
                await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            try:
                address, port = original_destination(sock)
            except OSError:
                address = GATE_ADDRESS
            if address == GATE_ADDRESS:  # not redirected, so nothing that wanted to leave
                self._room.release()
                sock.close()
                continue
            task = self._loop.create_task(
                Session(self.outlet, sock, address, port).run(), name=f"egress-{self._key}-{address}:{port}"
            )
            self._sessions.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._sessions.discard(task)
        self._room.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("egress %s: a connection failed unexpectedly", self._key, exc_info=error)

    def _record_packets(self) -> None:
        for _ in range(_DATAGRAMS_PER_TURN):
            try:
                datagram = self._sockets.packet_log.recv(_DATAGRAM_BYTES)
            except OSError:
                return
            for packet in netlink.logged_packets(datagram):
                host = packet.address if packet.port is None else joined(packet.address, packet.port)
                self._record(packet.protocol, host)

    def _record(self, protocol: str, host: str) -> None:
        """A denial without a connection; `protocol` stands where other events have a path."""
        if self._budget.take():
            Attempt(self.outlet.events, host=host, method=UNKNOWN, path=f"/{protocol}").denied(0)
        elif self._budget.first_refusal():
            log.warning("egress %s: more than %d rejected packets a second", self._key, RECORDS_PER_SECOND)


class _Budget:
    """A sandbox that floods its gate must not flood its journal."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._second = 0
        self._taken = 0

    def take(self) -> bool:
        second = int(self._loop.time())
        if second != self._second:
            self._second, self._taken = second, 0
        self._taken += 1
        return self._taken <= RECORDS_PER_SECOND

    def first_refusal(self) -> bool:
        return self._taken == RECORDS_PER_SECOND + 1
