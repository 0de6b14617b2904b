"""An agent that speaks HTTP/2, in memory, with the egress proxy's side of its connection running in the same loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    DataReceived,
    Event,
    InformationalResponseReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import H2Error

from hiverd.egress.agent_http2 import Http2AgentConnection
from hiverd.egress.authority import Authority, ServerContexts
from hiverd.egress.dialer import Dialer
from hiverd.egress.exchange import Way
from hiverd.egress.outlet import Outlet, Rules
from hiverd.egress.own_api import own_api
from hiverd.egress.script_pool import ScriptPool
from hiverd.egress.stream import Stream
from hiverd.wire.model import EgressRule
from support.gateway import RecordedEvents

Fields = list[tuple[bytes, bytes]]

WAIT_SECONDS = 10.0


class Answer:
    """What has come on one stream."""

    def __init__(self) -> None:
        self.fields: Fields = []
        self.interim: list[int] = []
        self.body = bytearray()
        self.trailers: Fields = []
        self.ended = False
        self.reset: int | None = None

    @property
    def status(self) -> int | None:
        """None until the final head has come."""
        return int(dict(self.fields)[b":status"]) if self.fields else None

    @property
    def over(self) -> bool:
        return self.ended or self.reset is not None


class Http2Client:
    """The agent's end of a connection. `take` decides whether a stream's body is acknowledged as it comes."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.h2 = H2Connection(
            H2Configuration(
                client_side=True,
                header_encoding=None,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.answers: dict[int, Answer] = {}
        self.take = True
        self.error: int | None = None
        """The code of the peer's GOAWAY."""
        self.last_stream_id: int | None = None
        self.closed = False
        """The peer has closed."""
        self.events: list[Event] = []
        self._confused = False
        self._tail = b""
        self._sending = asyncio.Lock()
        self._news = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.listen()
        self.h2.initiate_connection()
        await self.flush()

    def listen(self) -> None:
        """Reads what comes, from now on."""
        self._reader = asyncio.create_task(self._read())

    def end(self) -> None:
        """Nothing more will be sent."""
        self._sock.shutdown(socket.SHUT_WR)

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        self._sock.close()

    async def flush(self) -> None:
        await self.raw(self.h2.data_to_send())

    async def raw(self, data: bytes) -> None:
        """Sends bytes as they are; a peer that has closed is no error."""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(WAIT_SECONDS), self._sending:
                await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def request(
        self, path: str = "/", *, method: str = "GET", fields: Fields | None = None, end: bool = True, **pseudo: str
    ) -> int:
        """Sends a head; `pseudo` names other pseudo fields (`authority`, `scheme`). Returns the stream's number."""
        named = {"method": method, "scheme": "https", "authority": "api.test", "path": path, **pseudo}
        head = [(f":{name}".encode(), value.encode("latin-1")) for name, value in named.items()]
        return await self.send_head([*head, *(fields or [])], end=end)

    async def send_head(self, fields: Fields, *, end: bool = True) -> int:
        number = self.h2.get_next_available_stream_id()
        self.answers[number] = Answer()
        self.h2.send_headers(number, fields, end_stream=end)
        await self.flush()
        return number

    async def send(self, number: int, data: bytes, *, end: bool = False) -> None:
        """Sends a body, as fast as the windows open."""
        view = memoryview(data)
        while view:
            room = min(self.h2.local_flow_control_window(number), self.h2.max_outbound_frame_size)
            if room <= 0:
                before = len(self.events)
                await self.until(lambda: len(self.events) > before, "a window")  # noqa: B023 -- awaited here
                continue
            self.h2.send_data(number, view[:room])
            view = view[room:]
            await self.flush()
        if end:
            self.h2.end_stream(number)
            await self.flush()

    async def answer(self, number: int) -> Answer:
        """The whole of it."""
        answer = self.answers[number]
        await self.until(lambda: answer.over or self.closed, f"the end of stream {number}")
        return answer

    async def get(self, path: str = "/", **more: Any) -> Answer:
        return await self.answer(await self.request(path, **more))

    async def until(self, probe: Callable[[], object], what: str) -> None:
        """Waits for something that the peer's frames bring about."""
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while not probe():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise AssertionError(f"did not come: {what}") from None

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            while data := await loop.sock_recv(self._sock, 65536):
                self._look_for_goaway(data)
                if not self._confused:
                    await self._receive(data)
                self._news.set()
        self.closed = True
        self._news.set()

    async def _receive(self, data: bytes) -> None:
        """What was sent raw is unknown to the library, and so may be the answers to it."""
        try:
            for event in self.h2.receive_data(data):
                self._handle(event)
            await self.flush()
        except H2Error:
            self._confused = True

    def _look_for_goaway(self, data: bytes) -> None:
        self._tail += data
        while len(self._tail) >= 9 and len(self._tail) >= (end := 9 + int.from_bytes(self._tail[:3])):
            if self._tail[3] == 7:
                self.last_stream_id, self.error = int.from_bytes(self._tail[9:13]), int.from_bytes(self._tail[13:17])
            self._tail = self._tail[end:]

    def _handle(self, event: Event) -> None:
        self.events.append(event)
        match event:
            case InformationalResponseReceived(stream_id=number):
                self.answers[number].interim.append(int(dict(event.headers)[b":status"]))
            case ResponseReceived(stream_id=number):
                self.answers[number].fields = [(bytes(name), bytes(value)) for name, value in event.headers]
            case DataReceived(stream_id=number):
                self.answers[number].body += event.data
                if self.take:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, number)
            case TrailersReceived(stream_id=number):
                self.answers[number].trailers = [(bytes(name), bytes(value)) for name, value in event.headers]
            case StreamEnded(stream_id=number):
                self.answers[number].ended = True
            case StreamReset(stream_id=number):
                self.answers[number].reset = int(event.error_code or 0)
            case _:
                pass


class Rig:
    """An outlet with rules, and agents connected to it."""

    def __init__(self, rules: list[dict[str, Any]], folder: Path, contexts: dict[str, ssl.SSLContext]) -> None:
        self.sink = RecordedEvents()
        authority = Authority.load_or_make(folder / "authority")
        self.outlet = Outlet(
            self.rules(rules),
            self.sink,
            Dialer(own_api("127.0.0.1", 1), contexts),
            ServerContexts(authority, ["h2"]),
            ScriptPool().share(),
        )
        self._secure = bool(contexts)
        self._stack = contextlib.AsyncExitStack()
        self.connections: list[Http2AgentConnection] = []
        self.tasks: list[asyncio.Task[None]] = []

    @staticmethod
    def rules(rules: list[dict[str, Any]]) -> Rules:
        return Rules(rules=tuple(msgspec.convert(rules, list[EgressRule])))

    async def connect(self, *, start: bool = True) -> Http2Client:
        """A connection that has been intercepted for the name api.test."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        way = Way(secure=self._secure, address="11.0.0.1", port=443, name="api.test")
        stream = await Stream.over(ours)
        self.connections.append(Http2AgentConnection(stream, self.outlet, way))
        task = asyncio.create_task(_served(self.connections[-1]))
        self.tasks.append(task)
        client = Http2Client(theirs)
        if start:
            await client.start()
        self._stack.push_async_callback(_ended, client, task)
        return client

    def events(self, kind: str) -> list[Any]:
        """Those whose type ends like this, in order."""
        return [event for event in self.sink.recorded if msgspec.to_builtins(event)["type"].endswith(kind)]

    @property
    def statuses(self) -> list[int]:
        return [event.status for event in self.events("response")]

    async def aclose(self) -> None:
        """Fails if a connection ended by anything but its own end."""
        await self._stack.aclose()
        self.outlet.close()


async def _served(connection: Http2AgentConnection) -> None:
    with contextlib.suppress(OSError):
        await connection.serve()


async def _ended(client: Http2Client, task: asyncio.Task[None]) -> None:
    await client.close()
    await asyncio.wait({task}, timeout=WAIT_SECONDS)
    assert task.done()
    if not task.cancelled():
        task.result()


@contextlib.asynccontextmanager
async def rig(
    rules: list[dict[str, Any]], folder: Path, contexts: dict[str, ssl.SSLContext] | None = None
) -> AsyncIterator[Rig]:
    """`contexts`: toward upstreams with TLS; without them upstreams are plain."""
    made = Rig(rules, folder, contexts or {})
    try:
        yield made
    finally:
        await made.aclose()
