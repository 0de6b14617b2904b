"""Connections into one sandbox: dialled from sockets that are born in its network namespace, kept for reuse."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Sequence
from typing import Final

from hiverd.http.connection import Connection
from hiverd.netns import SocketFactory, SocketRequest, family_of, open_socket

RETRY_INTERVAL_SECONDS: Final = 0.1
CONNECT_TIMEOUT_SECONDS: Final = 30.0
"""For one attempt at one address; only a listener with a full backlog ever takes long on loopback."""
_FAMILY_MISSING: Final = frozenset((errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.ENETUNREACH))


class DialError(Exception):
    """The target could not be reached. The text is safe to show."""


class NothingListensError(DialError):
    """Connection refused, at every address, for as long as we were asked to try."""


class Pool:
    """Connections into one sandbox, by port. Used from one event loop only."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sockets: SocketFactory, *, max_idle: int, idle_seconds: float
    ) -> None:
        self._loop = loop
        self._sockets = sockets
        self._max_idle = max_idle
        self._idle_seconds = idle_seconds
        self._idle: dict[int, list[tuple[Connection, float]]] = {}
        self._idle_count = 0
        self._connections: set[Connection] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def connection_count(self) -> int:
        """Open connections, idle ones included."""
        return len(self._connections)

    def take(self, port: int, *, checked: bool) -> Connection | None:
        """The most recently used idle connection, or None. `checked` asks the kernel whether the peer has closed it."""
        idle = self._idle.get(port)
        while idle:
            connection, _ = idle.pop()
            self._idle_count -= 1
            if connection.idle and not (checked and connection.stale()):
                connection.reused = True
                return connection
            self.discard(connection)
        return None

    def give_back(self, port: int, connection: Connection) -> None:
        """Ends the connection's exchange and keeps the connection if that is possible."""
        if self._closed or self._idle_count >= self._max_idle or not connection.finish():
            self.discard(connection)
            return
        self._idle.setdefault(port, []).append((connection, self._loop.time() + self._idle_seconds))
        self._idle_count += 1
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(self._idle_seconds, self._sweep)

    def discard(self, connection: Connection) -> None:
        """Closes at once."""
        self._connections.discard(connection)
        connection.abort()

    async def dial(
        self, namespace: str | None, addresses: Sequence[str], port: int, *, refused_patience_seconds: float
    ) -> Connection:
        """A fresh connection to the first address that accepts.

        While every address refuses, tries again each 100 ms until the patience ends (`NothingListensError`).
        Raises `DialError` at once for anything else. `namespace` None dials from the host, never to its loopback.
        """
        deadline = self._loop.time() + refused_patience_seconds
        while not self._closed:
            connection = await self._try_addresses(namespace, addresses, port)
            if connection is not None:
                return connection
            wait_seconds = min(RETRY_INTERVAL_SECONDS, deadline - self._loop.time())
            if wait_seconds <= 0:
                raise NothingListensError(f"nothing listens on port {port} in the sandbox")
            await asyncio.sleep(wait_seconds)
        raise DialError("the sandbox is gone")

    def close(self) -> None:
        """Closes all connections, those in use as well. Whoever waits on one gets an error."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        self._idle.clear()
        for connection in tuple(self._connections):
            self.discard(connection)

    async def _try_addresses(self, namespace: str | None, addresses: Sequence[str], port: int) -> Connection | None:
        """A connection to the first address that accepts; None if all refuse."""
        missing: OSError | None = None
        refused = False
        for address in addresses:
            try:
                return await self._connect(namespace, address, port)
            except ConnectionRefusedError:
                refused = True
            except OSError as error:  # TimeoutError is one, too
                if error.errno not in _FAMILY_MISSING:
                    raise DialError(f"cannot connect to port {port} in the sandbox") from error
                missing = error
        if not refused:
            raise DialError(f"cannot connect to port {port} in the sandbox") from missing
        return None

    async def _open(self, namespace: str | None, address: str) -> socket.socket:
        if namespace is not None:
            return await self._sockets.for_connect(namespace, address)
        if ipaddress.ip_address(address).is_loopback:
            raise DialError("the sandbox has no network namespace to enter")
        return open_socket(
            SocketRequest(family=family_of(address), options=((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),))
        )

    async def _connect(self, namespace: str | None, address: str, port: int) -> Connection:
        sock = await self._open(namespace, address)
        authority = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        connection = Connection(self._loop, sock, authority.encode("ascii"))
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                await self._loop.sock_connect(sock, (address, port))
                await self._loop.create_connection(lambda: connection, sock=sock)
        except BaseException:
            connection.abort()
            sock.close()
            raise
        if self._closed:
            connection.abort()
            raise DialError("the sandbox is gone")
        self._connections.add(connection)
        return connection

    def _sweep(self) -> None:
        """Closes what has been idle for too long; runs only while something is idle."""
        self._sweeper = None
        now = self._loop.time()
        for port, idle in list(self._idle.items()):
            kept: list[tuple[Connection, float]] = []
            for connection, expiry in idle:
                if expiry > now and connection.idle:
                    kept.append((connection, expiry))
                else:
                    self.discard(connection)
            self._idle_count -= len(idle) - len(kept)
            if kept:
                self._idle[port] = kept
            else:
                del self._idle[port]
        if self._idle:
            soonest = min(idle[0][1] for idle in self._idle.values())
            self._sweeper = self._loop.call_later(max(0.05, soonest - now), self._sweep)
