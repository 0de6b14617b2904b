"""Serves the names of one sandbox, over UDP and TCP (RFC 1035, RFC 7766). What is asked goes nowhere."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Final

from hiverd.egress import dns
from hiverd.egress.names import HostError, canonical_host

MAX_DNS_CONNECTIONS: Final = 32
"""Over TCP, of one sandbox at a time; further ones are closed."""
DNS_SECONDS: Final = 10.0
"""For one question over TCP, waiting for it included."""
MAX_DNS_QUESTIONS: Final = 100
"""On one connection."""
MAX_DNS_MESSAGE_BYTES: Final = 4096
"""Over TCP. The longest name takes 255."""
_DATAGRAM_BYTES: Final = 64 * 1024
_DATAGRAMS_PER_TURN: Final = 32
_ACCEPTS_PER_TURN: Final = 32
_ACCEPT_PAUSE_SECONDS: Final = 0.1


class Resolver:
    """Lives as long as the guard."""

    def __init__(
        self,
        datagrams: socket.socket,
        listener: socket.socket,
        note: Callable[[str], None],
        refuse: Callable[[str], None],
    ) -> None:
        """The sockets stay the caller's. `note` gets host names that were asked for, `refuse` what looks like data on
        its way out."""
        self._datagrams = datagrams
        self._listener = listener
        self._note = note
        self._refuse = refuse
        self._loop = asyncio.get_running_loop()
        self._connections: set[asyncio.Task[None]] = set()
        self._resumption: asyncio.TimerHandle | None = None
        self._loop.add_reader(datagrams, self._answer_datagrams)
        self._loop.add_reader(listener, self._accept)

    async def close(self) -> None:
        """Idempotent."""
        self._loop.remove_reader(self._datagrams)
        self._loop.remove_reader(self._listener)
        if self._resumption is not None:
            self._resumption.cancel()
        tasks = tuple(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _answer_datagrams(self) -> None:
        for _ in range(_DATAGRAMS_PER_TURN):
            try:
                query, peer = self._datagrams.recvfrom(_DATAGRAM_BYTES)
            except OSError:
                return
            if answer := self._answer(query):
                with contextlib.suppress(OSError):
                    self._datagrams.sendto(answer, peer)

    def _answer(self, query: bytes) -> bytes | None:
        answered = dns.answer(query)
        if answered is None:
            self._refuse("malformed")
            return None
        answer, question = answered
        if question.suspicious:
            self._refuse(question.name)
        else:
            # What is no host name is answered too, but never taken for where a connection goes.
            with contextlib.suppress(HostError):
                self._note(canonical_host(question.name))
        return answer

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:  # out of descriptors, for instance
                self._loop.remove_reader(self._listener)
                self._resumption = self._loop.call_later(_ACCEPT_PAUSE_SECONDS, self._resume)
                return
            if len(self._connections) >= MAX_DNS_CONNECTIONS:
                sock.close()
                continue
            sock.setblocking(False)
            task = self._loop.create_task(self._serve(sock), name="egress-dns")
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    def _resume(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    async def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            for _ in range(MAX_DNS_QUESTIONS):
                query = await self._read_query(sock)
                answer = self._answer(query) if query else None
                if answer is None:
                    return
                async with asyncio.timeout(DNS_SECONDS):
                    await self._loop.sock_sendall(sock, len(answer).to_bytes(2) + answer)

    async def _read_query(self, sock: socket.socket) -> bytes:
        """Empty at the end of the connection, or of our patience with it."""
        data = b""
        try:
            async with asyncio.timeout(DNS_SECONDS):
                data = await self._read(sock, 2)
                size = int.from_bytes(data)
                if len(data) == 2 and 0 < size <= MAX_DNS_MESSAGE_BYTES:
                    return await self._read(sock, size)
        except TimeoutError:
            pass
        if data:
            self._refuse("malformed")
        return b""

    async def _read(self, sock: socket.socket, size: int) -> bytes:
        """Fewer bytes at the end of the connection."""
        data = b""
        while len(data) < size and (piece := await self._loop.sock_recv(sock, size - len(data))):
            data += piece
        return data
