"""HTTP/2 with upstreams, for gRPC: streams of one sandbox share connections (RFC 9113)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final
from weakref import WeakValueDictionary

from h2 import events
from h2.errors import ErrorCodes
from h2.exceptions import H2Error

from hiverd.egress.http2_connection import MAX_STREAMS, Http2Connection, Http2Error
from hiverd.egress.http2_frames import GoAway
from hiverd.egress.http2_stream import Http2Stream, StreamLostError
from hiverd.egress.stream import Stream
from hiverd.egress.uplinks import IDLE_SECONDS, Upstream
from hiverd.egress.upstream import UpstreamSide
from hiverd.http.connection import UpstreamError
from hiverd.http.framing import Headers, ProtocolError
from hiverd.http.http2 import http2_fields, parse_http2_response
from hiverd.http.responses import MAX_INTERIM_RESPONSES, ResponseHead

_NOT_SENT: Final = frozenset((b"host", b"transfer-encoding", b"connection", b"te"))

log = logging.getLogger(__name__)


class Http2Upstream(UpstreamSide):
    """One exchange, on a stream that is opened when it begins."""

    def __init__(self, uplink: Http2Uplink) -> None:
        self._uplink = uplink
        self._stream: Http2Stream | None = None
        self._head: ResponseHead | None = None
        self._interim_count = 0
        self._continued = False
        self._news = asyncio.Event()
        self.reused = uplink.used

    @property
    def has_final_head(self) -> bool:
        return self._head is not None

    @property
    def ready(self) -> bool:
        return self._stream is None or self._stream.readable

    @property
    def trailers(self) -> Headers:
        return [] if self._stream is None else self._stream.trailers

    async def begin(self, method: str, target: str, fields: Headers, body: bytes | None, *, streamed: bool) -> None:
        authority = next(value for name, value in fields if name == b"host")
        pseudo = [
            (b":method", method.encode()),
            (b":scheme", b"https"),
            (b":authority", authority),
            (b":path", target.encode("latin-1")),
        ]
        headers = [*(field for field in fields if field[0] not in _NOT_SENT), (b"te", b"trailers")]
        try:
            head = http2_fields(pseudo, headers)
        except ValueError as error:
            raise UpstreamError(str(error)) from error
        with contextlib.suppress(OSError):
            self._stream = self._uplink.start(self, head, end=not (body or streamed))
            self._stream.on_lost = self._news.set
            if body:
                await self._stream.send(body, end=not streamed)
            await self._stream.flush()

    async def send(self, piece: bytes) -> None:
        with contextlib.suppress(OSError):
            await self._open().send(piece)

    async def end(self, trailers: Headers) -> None:
        stream = self._open()
        with contextlib.suppress(OSError):
            if trailers:
                stream.send_fields(http2_fields([], trailers), end=True)
                await stream.flush()
            else:
                await stream.send(b"", end=True)

    async def response(self) -> ResponseHead:
        while self._head is None:
            if self._stream is None or self._stream.lost is not None:
                reason = self._stream.lost if self._stream is not None else None
                raise UpstreamError(reason or "the connection was lost", unanswered=True)
            self._news.clear()
            await self._news.wait()
        return self._head

    async def continued(self) -> None:
        while not (self._continued or self._head is not None or self._open().lost is not None):
            self._news.clear()
            await self._news.wait()

    async def read(self) -> tuple[bytes, bool]:
        stream = self._open()
        try:
            data = await stream.read()
        except StreamLostError as error:
            raise UpstreamError(str(error)) from error
        return data, bool(data) and not (stream.ended and stream.empty)

    def abort(self, reason: str) -> None:
        if self._stream is not None:
            self._stream.reset(ErrorCodes.CANCEL, reason)

    def done(self) -> None:
        self._uplink.finish(self, self._stream)

    def discard(self) -> None:
        self._uplink.finish(self, self._stream)

    def on_head(self, fields: Headers, *, interim: bool) -> None:
        """Called by the connection."""
        stream = self._open()
        try:
            head = parse_http2_response(fields)
            if interim:
                self._interim_count += 1
                if self._interim_count > MAX_INTERIM_RESPONSES:
                    raise ProtocolError("too many interim responses")
                self._continued = self._continued or head.status == 100
            else:
                self._head = head
        except ProtocolError as error:
            stream.reset(ErrorCodes.PROTOCOL_ERROR, str(error))
        self._news.set()

    def _open(self) -> Http2Stream:
        if self._stream is None:
            raise UpstreamError("the connection was lost", unanswered=True)
        return self._stream


class Http2Uplink(Http2Connection):
    """One connection to one upstream."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream, client=True, idle_seconds=IDLE_SECONDS)
        self.used = False
        self.retired = False
        """No new exchanges: the rules have changed, the peer is leaving, or the connection has ended."""
        self._sides: dict[int, Http2Upstream] = {}
        self._reserved: set[Http2Upstream] = set()

    @property
    def usable(self) -> bool:
        count = len(self._streams) + len(self._reserved)
        return not self.retired and count < min(MAX_STREAMS, self._h2.remote_settings.max_concurrent_streams)

    def reserve(self) -> Http2Upstream:
        """Room for an exchange."""
        side = Http2Upstream(self)
        self._reserved.add(side)
        self._note_idle()
        return side

    def start(self, side: Http2Upstream, fields: Headers, *, end: bool) -> Http2Stream:
        """Opens a stream with this head. Raises `StreamLostError`."""
        self._reserved.discard(side)
        self.used = True
        try:
            number = self._h2.get_next_available_stream_id()
        except H2Error as error:
            self.retire()
            raise StreamLostError("the connection has no more streams") from error
        stream = self._new_stream(number)
        self._sides[number] = side
        if self._ended:
            stream.lose("the connection was lost")
        self.send_fields(stream, fields, end=end)
        return stream

    def finish(self, side: Http2Upstream, stream: Http2Stream | None) -> None:
        """The exchange is over. Idempotent."""
        self._reserved.discard(side)
        if stream is not None and self._sides.pop(stream.number, None) is not None:
            stream.close()
        self._note_idle()

    def retire(self) -> None:
        """No new exchanges; closes when those that are open have ended."""
        self.retired = self._leaving = True
        self._note_idle()

    async def serve(self) -> None:
        """Raises nothing but cancellation."""
        try:
            await self.run()
        except (Http2Error, OSError) as error:
            log.debug("egress: an upstream's connection ended: %s", error)
        finally:
            self.retired = True

    def _busy(self) -> bool:
        return bool(self._streams or self._reserved)

    def _on_head(self, event: events.Event) -> None:
        assert isinstance(event, events.ResponseReceived | events.InformationalResponseReceived)  # noqa: S101
        side = self._sides.get(event.stream_id)
        if side is not None:
            side.on_head(event.headers, interim=isinstance(event, events.InformationalResponseReceived))

    def _on_goaway(self, goaway: GoAway) -> None:
        self.retire()
        for number, stream in tuple(self._streams.items()):
            if number > goaway.last_stream_id:
                stream.lose("the upstream takes no more requests on this connection")


class Http2Uplinks:
    """The connections of one sandbox. Used from one event loop only."""

    def __init__(self) -> None:
        self._uplinks: dict[Upstream, list[Http2Uplink]] = {}
        self._dialling: WeakValueDictionary[Upstream, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    async def reserve(self, upstream: Upstream, dial: Callable[[], Awaitable[Stream]]) -> Http2Upstream:
        """An exchange on a connection that has room, if need be on a new one. Raises what `dial` raises."""
        lock = self._dialling.setdefault(upstream, asyncio.Lock())
        async with lock:  # so that many exchanges at once make one connection
            for uplink in self._uplinks.get(upstream, ()):
                if uplink.usable:
                    return uplink.reserve()
            stream = await dial()
            return self._add(upstream, stream).reserve()

    def _add(self, upstream: Upstream, stream: Stream) -> Http2Uplink:
        uplink = Http2Uplink(stream)
        self._uplinks.setdefault(upstream, []).append(uplink)
        task = asyncio.create_task(uplink.serve(), name=f"egress-http2-uplink-{upstream.host}")
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(done, upstream, uplink))
        if self._closed:
            task.cancel()
        return uplink

    def forget(self) -> None:
        """The rules have changed: what was dialled under the old ones carries nothing new."""
        for uplinks in self._uplinks.values():
            for uplink in uplinks:
                uplink.retire()

    def close(self) -> None:
        """Closes all."""
        self._closed = True
        for task in self._tasks:
            task.cancel()

    def _ended(self, task: asyncio.Task[None], upstream: Upstream, uplink: Http2Uplink) -> None:
        self._tasks.discard(task)
        kept = [other for other in self._uplinks.get(upstream, ()) if other is not uplink]
        if kept:
            self._uplinks[upstream] = kept
        else:
            self._uplinks.pop(upstream, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("egress: an upstream's connection failed unexpectedly", exc_info=error)
