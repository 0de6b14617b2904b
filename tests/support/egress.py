"""One sandbox's way out within the test's process: real sessions, outlet and dialer, agents on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

import h11
import msgspec

from hiverd.contracts.isolation import RESOLVER_ADDRESS
from hiverd.egress import authority
from hiverd.egress.dialer import Dialer
from hiverd.egress.outlet import Outlet, Rules
from hiverd.egress.own_api import OwnApi
from hiverd.egress.script_pool import ScriptPool, ScriptShare
from hiverd.egress.session import Session
from hiverd.egress.upstream_tls import client_context
from hiverd.wire.events import EgressChunkEvent, EgressRequestEvent, EgressResponseEvent
from hiverd.wire.model import EgressRule
from support.gateway import RecordedEvents
from support.waiting import until_async

SECONDS = 10.0
"""For anything that should come soon."""


class Answer(NamedTuple):
    """A response as a strict client reads it."""

    status: int
    headers: dict[str, str]
    body: bytes
    trailers: dict[str, str]
    interim: tuple[int, ...]


class Agent:
    """A program in the sandbox with one connection."""

    def __init__(self, sock: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.sock = sock
        self.reader = reader
        self.writer = writer
        self._excess = b""

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(SECONDS):
            self.writer.write(data)
            await self.writer.drain()

    async def get(self, url: str = "http://api.test/", *fields: str, method: str = "GET", body: bytes = b"") -> Answer:
        """A whole exchange."""
        await self.send(request(url, *fields, method=method, body=body))
        return await self.answer(method)

    async def answer(self, method: str = "GET") -> Answer:
        """Reads one answer, as a strict client would. Raises `h11.RemoteProtocolError`."""
        async with asyncio.timeout(SECONDS):
            return await self._answer(method)

    async def _answer(self, method: str) -> Answer:
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        client.send(h11.EndOfMessage())
        status, headers, body, interim = 0, {}, bytearray(), []
        if self._excess:
            client.receive_data(self._excess)
            self._excess = b""
        while True:
            event = client.next_event()
            if event is h11.NEED_DATA:
                client.receive_data(await self.reader.read(65536))
            elif isinstance(event, h11.InformationalResponse):
                interim.append(event.status_code)
            elif isinstance(event, h11.Response):
                status, headers = event.status_code, _texts(event.headers.raw_items())
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                self._excess = client.trailing_data[0]
                return Answer(status, headers, bytes(body), _texts(event.headers.raw_items()), tuple(interim))
            else:
                raise ConnectionResetError

    async def head(self) -> bytes:
        """Reads up to the next empty line."""
        async with asyncio.timeout(SECONDS):
            return await self.reader.readuntil(b"\r\n\r\n")

    async def expect(self, data: bytes) -> None:
        """Reads exactly these bytes."""
        async with asyncio.timeout(SECONDS):
            assert await self.reader.readexactly(len(data)) == data

    async def rest(self) -> bytes:
        """Everything until the connection ends; raises `OSError` if it breaks."""
        async with asyncio.timeout(SECONDS):
            return self._excess + await self.reader.read()

    async def ended(self) -> bool:
        """True once the connection has ended, whatever came before."""
        with contextlib.suppress(OSError):
            await self.rest()
        return True

    def finish_sending(self) -> None:
        self.writer.write_eof()

    def leave(self) -> None:
        """Closes as a program that ends does."""
        self.writer.close()

    def reset(self) -> None:
        """Breaks off."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def drop(self) -> None:
        self.writer.transport.abort()


class Rig:
    """`async with Rig(folder, rules)`: afterwards nothing may be left of it, or the test fails."""

    def __init__(
        self,
        folder: Path,
        rules: Iterable[dict[str, Any]] = (),
        *,
        upstream_ca: Path | None = None,
        **more: Any,
    ) -> None:
        self.events = RecordedEvents()
        self.trust = authority.Authority.load_or_make(folder / "authority")
        contexts = {"http/1.1": client_context([upstream_ca] if upstream_ca else [], ["http/1.1"])}
        self.dialer = Dialer(OwnApi("127.0.0.1", 1), contexts)
        self._more = more
        self._rules = self._compiled(rules)
        self._sessions: set[asyncio.Task[None]] = set()
        self._agents: list[Agent] = []
        self.outlet: Outlet

    async def __aenter__(self) -> Self:
        self._before = asyncio.all_tasks()
        contexts = authority.ServerContexts(self.trust, ["http/1.1"])
        self._scripts = ScriptPool()
        self.outlet = Outlet(self._rules, self.events, self.dialer, contexts, ScriptShare(self._scripts))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for agent in self._agents:
            agent.drop()
        try:
            if kind is None:
                await self.idle()
        finally:
            sessions = list(self._sessions)
            for session in sessions:
                session.cancel()
            self.outlet.close()
            await asyncio.gather(*sessions, return_exceptions=True)
            await self._scripts.close()
        if kind is None:
            known = self._before | {asyncio.current_task()}
            await eventually(lambda: asyncio.all_tasks() <= known, what="no task is left")
            assert len(self.outlet.uplinks) == 0

    def change(self, rules: Iterable[dict[str, Any]], **more: Any) -> None:
        """Puts other rules in force."""
        self._more |= more
        self.outlet.change(self._compiled(rules))

    def _compiled(self, rules: Iterable[dict[str, Any]]) -> Rules:
        return Rules(rules=tuple(msgspec.convert(rule, EgressRule) for rule in rules), **self._more)

    async def agent(
        self, port: int = 80, address: str = RESOLVER_ADDRESS, *, receive_bytes: int | None = None
    ) -> Agent:
        """A new connection to that address, as the gate hands it over."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = socket.socket()
            if receive_bytes is not None:
                near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            near.connect(listener.getsockname())
            far, _ = listener.accept()
        far.setblocking(False)
        near.setblocking(False)
        session = asyncio.create_task(Session(self.outlet, far, address, port).run(), name="session")
        self._sessions.add(session)
        reader, writer = await asyncio.open_connection(sock=near)
        agent = Agent(near, reader, writer)
        self._agents.append(agent)
        return agent

    async def secure_agent(
        self,
        name: str | None = "api.test",
        *,
        port: int = 443,
        address: str = RESOLVER_ADDRESS,
        receive_bytes: int | None = None,
        **options: Any,
    ) -> Agent:
        """The same after a TLS handshake, in which the agent trusts the sandbox's CA. Raises `ssl.SSLError`."""
        agent = await self.agent(port, address, receive_bytes=receive_bytes)
        async with asyncio.timeout(SECONDS):
            await agent.writer.start_tls(self.agent_context(**options), server_hostname=name or address)
        return agent

    def agent_context(self, *, trusted: Path | None = None, check_host: bool = True) -> ssl.SSLContext:
        """`trusted`: the file of another authority than the sandbox's."""
        context = ssl.create_default_context(cadata=None if trusted else self.trust.certificate_pem.decode())
        if trusted is not None:
            context.load_verify_locations(trusted)
        context.check_hostname = check_host
        return context

    async def idle(self) -> None:
        """Waits until all sessions have ended; re-raises what they raised."""
        await eventually(lambda: all(session.done() for session in self._sessions), what="all sessions have ended")
        for session in self._sessions:
            await session
        self._sessions.clear()

    async def recorded(self, count: int) -> list[Any]:
        """All events, once there are so many."""
        await eventually(lambda: len(self.events.recorded) >= count, what=f"{count} events are on record")
        return self.events.recorded

    @property
    def requests(self) -> list[EgressRequestEvent]:
        return self.events.of(EgressRequestEvent)

    @property
    def responses(self) -> list[EgressResponseEvent]:
        return self.events.of(EgressResponseEvent)

    @property
    def chunks(self) -> list[EgressChunkEvent]:
        return self.events.of(EgressChunkEvent)

    def summary(self) -> list[str]:
        """The events in short: `allowed GET api.test/a`, `1: 200`, `1: 'text'`."""
        return [_line(event) for event in self.events.recorded]


async def eventually(probe: Callable[[], bool], *, what: str, seconds: float = SECONDS) -> None:
    """Returns when it is true; `TimeoutError` if that takes too long."""

    async def ask() -> bool:
        return probe()

    await until_async(ask, seconds=seconds, what=what)


def request(url: str, *fields: str, method: str = "GET", body: bytes = b"", version: str = "1.1") -> bytes:
    """A request in origin form; `fields` are whole lines."""
    host, slash, path = url.partition("://")[2].partition("/")
    lines = [f"{method} {slash or '/'}{path} HTTP/{version}", f"Host: {host}", *fields]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join((*lines, "", "")).encode("latin-1") + body


def _texts(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode().lower(): value.decode("latin-1") for name, value in headers}


def _line(event: Any) -> str:
    if isinstance(event, EgressRequestEvent):
        return f"{event.access} {event.method} {event.host}{event.path}"
    if isinstance(event, EgressResponseEvent):
        return f"{event.request_id}: {event.status}"
    label = f" {event.label}" if event.label else ""
    return f"{event.request_id}:{label} {event.body!r}"


def read_head(connection: socket.socket) -> bytes:
    """For scripted upstreams: one head, byte by byte so that nothing behind it is taken; empty at the end."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        if not byte:
            return b""
        head += byte
    return head


def scripted(answer: bytes, *, keep: bool = True) -> Callable[[socket.socket], None]:
    """For `SocketUpstream`: reads heads and answers each with these bytes."""

    def serve(connection: socket.socket) -> None:
        while read_head(connection):
            connection.sendall(answer)
            if not keep:
                return

    return serve
