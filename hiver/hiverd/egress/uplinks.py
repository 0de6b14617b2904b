"""Connections of one sandbox to upstreams, kept for a moment to be used again (PROTOCOL 5.4)."""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

from hiverd.http.connection import Connection

IDLE_SECONDS: Final = 10.0
MAX_IDLE: Final = 64


class Upstream(NamedTuple):
    """What two requests must have in common to share a connection."""

    secure: bool
    host: str
    """What its certificate is checked against."""
    target: str
    """Where it is dialled: the host itself, unless the rule overrides it."""
    port: int
    exact: bool
    """The rule names the host, so guarded addresses may have been dialled."""
    denials: int
    """How many rules against addresses stand above the rule, so were asked before dialling."""
    own_authority: str | None = None
    """This server's own API: what its requests have for a Host, whatever the agent calls it."""


class Uplinks:
    """Used from one event loop only."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._idle: dict[Upstream, list[tuple[Connection, float]]] = {}
        self._all: dict[Connection, int] = {}
        """Each with the generation of rules under which it was made."""
        self.generation = 0
        """Changes with the rules."""
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._all)

    def take(self, upstream: Upstream, *, sure: bool) -> Connection | None:
        """The idle connection that was used last, if one still stands. `sure`: also if the event loop does not yet know
        that it does not, for a request that could not be sent again."""
        idle = self._idle.get(upstream)
        while idle:
            connection, _ = idle.pop()
            if connection.idle and not (sure and connection.stale()):
                connection.reused = True
                return connection
            self.discard(connection)
        return None

    def add(self, connection: Connection, generation: int) -> None:
        """Counts a new connection, dialled under the rules of that generation, as one of this sandbox's."""
        if self._closed:
            connection.abort()
        self._all[connection] = generation

    def give_back(self, upstream: Upstream, connection: Connection) -> None:
        """After an exchange: keeps the connection if it can carry another one."""
        old = self._all.get(connection) != self.generation
        if old or self._closed or not connection.finish() or sum(map(len, self._idle.values())) >= MAX_IDLE:
            self.discard(connection)
            return
        self._idle.setdefault(upstream, []).append((connection, self._loop.time() + IDLE_SECONDS))
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(IDLE_SECONDS, self._sweep)

    def discard(self, connection: Connection) -> None:
        """Closes at once."""
        self._all.pop(connection, None)
        connection.abort()

    def forget_idle(self) -> None:
        """The rules have changed: what was dialled under the old ones is not used again, nor what is in use now."""
        self.generation += 1
        for idle in self._idle.values():
            for connection, _ in idle:
                self.discard(connection)
        self._idle.clear()

    def close(self) -> None:
        """Closes all, those in use as well."""
        self._closed = True
        self.forget_idle()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in tuple(self._all):
            self.discard(connection)

    def _sweep(self) -> None:
        self._sweeper = None
        now = self._loop.time()
        for upstream, idle in list(self._idle.items()):
            kept = [(connection, expiry) for connection, expiry in idle if expiry > now and connection.idle]
            for entry in idle:
                if entry not in kept:
                    self.discard(entry[0])
            if kept:
                self._idle[upstream] = kept
            else:
                del self._idle[upstream]
        if self._idle:
            self._sweeper = self._loop.call_later(IDLE_SECONDS, self._sweep)
