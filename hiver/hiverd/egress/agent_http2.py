"""HTTP/2 with the agent: many exchanges on a connection, each in a task of its own (RFC 9113, PROTOCOL 0.12)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Final

from h2 import events
from h2.errors import ErrorCodes

from hiverd.egress.agent import BODY_STALL_SECONDS, IDLE_SECONDS, AgentGoneError, AgentSide
from hiverd.egress.exchange import Exchange, Way
from hiverd.egress.http2_connection import MAX_STREAMS, Http2Connection, Http2Error
from hiverd.egress.http2_frames import FloodError, GoAway
from hiverd.egress.http2_stream import Http2Stream, StreamLostError
from hiverd.egress.outlet import Outlet
from hiverd.egress.recorder import Attempt
from hiverd.egress.stream import Stream
from hiverd.http.framing import Headers
from hiverd.http.http2 import is_grpc, parse_http2_request
from hiverd.http.requests import RequestError, RequestHead

MAX_STREAMS_OF_SANDBOX: Final = 1024
"""On all HTTP/2 connections of a sandbox together; what is more is refused and may be tried again."""
_UNKNOWN: Final = "?"

log = logging.getLogger(__name__)


class Http2Agent(AgentSide):
    """One request and its answer. `take` sets the head; without it all one can do is refuse."""

    full_duplex = True

    def __init__(self, stream: Http2Stream) -> None:
        self._stream = stream
        self._head_only = False
        self._begun = False
        self._held: Headers | None = None

    def take(self, head: RequestHead) -> None:
        """The request is to be served."""
        self.head = head
        self._head_only = head.method == "HEAD"

    @property
    def body_read(self) -> bool:
        return (self._stream.ended and self._stream.empty) or not self.head.has_body

    @property
    def trailers(self) -> Headers:
        return self._stream.trailers

    @property
    def gone(self) -> bool:
        return self._stream.lost is not None

    def watch(self, on_gone: Callable[[], None] | None) -> None:
        self._stream.on_lost = on_gone
        if on_gone is not None and self.gone:
            self._stream.on_lost = None
            on_gone()

    async def body(self) -> AsyncIterator[bytes]:
        # A gRPC stream may be silent for as long as it likes.
        stall_seconds = None if is_grpc(self.head.headers) else BODY_STALL_SECONDS
        try:
            while True:
                async with asyncio.timeout(stall_seconds):
                    data = await self._stream.read()
                if not data:
                    return
                yield data
        except (TimeoutError, StreamLostError) as error:
            raise AgentGoneError from error

    async def ask_for_body(self) -> None:
        if self.head.expects_continue and not self._stream.readable:
            self._stream.send_fields([(b":status", b"100")])
            await self._stream.flush()

    async def start(self, status: int, fields: Headers, *, length: int | None, has_body: bool) -> None:
        self._begun = True
        head: Headers = [(b":status", b"%d" % status), *fields]
        if length is not None and status != 204:  # RFC 9110 8.6
            head.append((b"content-length", b"%d" % length))
        self._held = head  # goes out with the first piece, or with the end (gRPC tells the two cases apart)

    async def write(self, data: bytes) -> None:
        self._send_head()
        if data:
            await self._stream.send(data)
        else:
            await self._stream.flush()

    async def finish(self, trailers: Headers) -> None:
        if self._held is not None and not trailers:
            self._send_head(end=True)
        elif trailers:
            self._send_head()
            self._stream.send_fields(trailers, end=True)
        else:
            await self._stream.send(b"", end=True)
        await self._stream.flush()

    def _send_head(self, *, end: bool = False) -> None:
        if self._held is not None:
            head, self._held = self._held, None
            self._stream.send_fields(head, end=end)

    async def refuse(self, status: int, text: str) -> None:
        if self._begun and self._held is None:
            self._stream.reset(ErrorCodes.INTERNAL_ERROR, "the answer was broken off")
            return
        self._begun = True
        content = f"{text}\n".encode() if text else b""
        self._held = [(b":status", b"%d" % status), (b"content-length", b"%d" % len(content))]
        if content:
            self._held.append((b"content-type", b"text/plain; charset=utf-8"))
        if content and not self._head_only:
            self._send_head()
            await self._stream.send(content, end=True)
        else:
            await self.finish([])


class Http2AgentConnection(Http2Connection):
    """Serves one connection: `await serve()`."""

    def __init__(self, stream: Stream, outlet: Outlet, way: Way) -> None:
        super().__init__(stream, client=False, idle_seconds=IDLE_SECONDS)
        self._outlet = outlet
        self._way = way
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Until the connection and all that came on it have ended. Raises nothing but cancellation and `OSError`."""
        try:
            await self.run()
        except Http2Error as error:
            log.debug("egress: %s", error)
            self._attempt().denied(0)
        finally:
            await self._finish()

    async def _finish(self) -> None:
        """Exchanges notice by themselves that the agent has left, and have an end to record."""
        try:
            if self._tasks:
                await asyncio.wait(self._tasks)
        except asyncio.CancelledError:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            raise

    def _on_head(self, event: events.Event) -> None:
        assert isinstance(event, events.RequestReceived)  # noqa: S101 -- a server gets no other
        if len(self._tasks) >= MAX_STREAMS or self._outlet.http2_streams >= MAX_STREAMS_OF_SANDBOX:
            # More than may be open, or what was broken off has not come to its end yet: it costs the agent its resets.
            self.reset(event.stream_id, ErrorCodes.REFUSED_STREAM)
            if not self._frames.resets.take():
                raise FloodError("too many streams are broken off")
            return
        stream = self._new_stream(event.stream_id)
        self._outlet.http2_streams += 1
        task = self._loop.create_task(
            self._serve_stream(stream, event.headers, ended=event.stream_ended is not None),
            name=f"egress-http2-{self._way.name}-{stream.number}",
        )
        self._tasks.add(task)
        task.add_done_callback(self._exchange_ended)

    def _on_goaway(self, goaway: GoAway) -> None:
        """An agent's GOAWAY is about streams that we would open, and there are none."""

    async def _serve_stream(self, stream: Http2Stream, fields: Headers, *, ended: bool) -> None:
        agent = Http2Agent(stream)
        try:
            await self._exchange(agent, fields, ended=ended)
        except (OSError, AgentGoneError):
            pass  # the agent has left, which is its right
        except Exception:
            stream.reset(ErrorCodes.INTERNAL_ERROR, "the exchange failed")
            raise
        finally:
            stream.close()

    async def _exchange(self, agent: Http2Agent, fields: Headers, *, ended: bool) -> None:
        try:
            agent.take(parse_http2_request(fields, ended=ended))
            exchange = Exchange(self._outlet, self._way, agent)
        except RequestError as error:
            self._attempt().denied(error.status)
            await agent.refuse(error.status, str(error))
            return
        await exchange.run()

    def _exchange_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._outlet.http2_streams -= 1
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("egress: an exchange failed unexpectedly", exc_info=error)

    def _attempt(self) -> Attempt:
        return Attempt(self._outlet.events, host=self._way.name or self._way.address, method=_UNKNOWN, path="/")
