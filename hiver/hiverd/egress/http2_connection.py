"""One HTTP/2 connection, either side of it: streams over bytes, with pressure both ways (RFC 9113).

The library `h2` is the state machine. What it does not do is here and in `http2_frames`: limits, waiting for windows,
and a peer that says GOAWAY while streams go on. Header lists come out as they are; `hiverd.http.http2` judges them.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
from typing import Final

from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings

from hiverd.egress.http2_frames import EARNED_BY_DATA, FloodError, FrameReader, GoAway
from hiverd.egress.http2_stream import Http2Stream, StreamLostError
from hiverd.egress.stream import Stream
from hiverd.http.framing import MAX_HEAD_BYTES, Headers, ProtocolError
from hiverd.http.http2 import parse_http2_trailers

MAX_STREAMS: Final = 128
"""Open at a time on one connection."""
STREAM_WINDOW_BYTES: Final = 256 * 1024
"""Of a body that may come before it is passed on: on each stream ..."""
CONNECTION_WINDOW_BYTES: Final = 512 * 1024
"""... and on all streams of a connection together."""
MAX_DECODED_BYTES: Final = 2 * MAX_HEAD_BYTES
"""Of a header list; beyond it the connection ends. Between `MAX_HEAD_BYTES` and this a request is answered 431."""
_FIRST_WINDOW_BYTES: Final = 65_535
"""Of a connection, until it is told otherwise (RFC 9113 6.9.2)."""
_TABLE_BYTES: Final = 4096
"""Of the table that compresses what we send, even if the peer would keep a larger one."""
_MAX_SENT_FRAME_BYTES: Final = 64 * 1024
_GOODBYE_SECONDS: Final = 0.5


class Http2Error(Exception):
    """The peer broke the protocol, or exceeded a limit; the connection has ended. The text is safe to show."""


class _Machine(H2Connection):
    MAX_CLOSED_STREAMS = 1024  # 65,536 in the library: megabytes for a connection that is used long


class Http2Connection(abc.ABC):
    """`run` reads until the end, and is to be a task, or in one, of its own."""

    def __init__(self, stream: Stream, *, client: bool, idle_seconds: float) -> None:
        """Owns the stream. Without a request for `idle_seconds` the connection is closed."""
        self._stream = stream
        self._idle_seconds = idle_seconds
        self._loop = asyncio.get_running_loop()
        self._idle: asyncio.Timeout | None = None
        self._frames = FrameReader(server=not client)
        self._streams: dict[int, Http2Stream] = {}
        self._leaving = False
        self._ended = False
        self.client = client
        self._h2 = _machine(client=client)
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(CONNECTION_WINDOW_BYTES - _FIRST_WINDOW_BYTES)

    @property
    def stream_count(self) -> int:
        return len(self._streams)

    async def run(self) -> None:
        """Returns when the peer has closed, or was idle. Raises `Http2Error`, `OSError`."""
        self._flush()
        reason = "the connection was lost"
        try:
            async with asyncio.timeout(self._idle_seconds) as idle:
                self._idle = idle
                self._note_idle()
                try:
                    await self._read()
                finally:
                    self._idle = None
        except TimeoutError:
            await self._say_goodbye(ErrorCodes.NO_ERROR)
        except asyncio.CancelledError:
            await self._say_goodbye(ErrorCodes.NO_ERROR)
            raise
        except FloodError as error:
            reason = str(error)
            await self._say_goodbye(ErrorCodes.ENHANCE_YOUR_CALM)
            raise Http2Error(reason) from error
        except Http2Error as error:
            reason = str(error)
            await self._stream.close(_GOODBYE_SECONDS)  # the state machine has said why
            raise
        finally:
            self._ended = True
            self._stream.abort()
            for stream in tuple(self._streams.values()):
                stream.lose(reason)

    # Called by streams

    def send_fields(self, stream: Http2Stream, fields: Headers, *, end: bool) -> None:
        """Raises `StreamLostError`."""
        self._may_send(stream)
        try:
            self._h2.send_headers(stream.number, fields, end_stream=end)
        except H2Error as error:
            raise StreamLostError("the stream was closed") from error
        stream.sent_end = end

    async def send_data(self, stream: Http2Stream, data: bytes, *, end: bool) -> None:
        """Raises `StreamLostError`, `OSError`."""
        view = memoryview(data)
        while True:
            self._may_send(stream)
            stream.room.clear()
            try:
                view = self._send_what_fits(stream, view, end=end)
            except H2Error as error:
                raise StreamLostError("the stream was closed") from error
            await self.flush()
            if not view:
                return
            await stream.room.wait()

    def _send_what_fits(self, stream: Http2Stream, view: memoryview, *, end: bool) -> memoryview:
        frame_bytes = min(self._h2.max_outbound_frame_size, _MAX_SENT_FRAME_BYTES)
        room = self._h2.local_flow_control_window(stream.number)
        while view and room > 0:
            piece = view[: min(room, frame_bytes)]
            view = view[len(piece) :]
            stream.sent_end = end and not view
            self._h2.send_data(stream.number, piece, end_stream=stream.sent_end)
            self._frames.overhead.earn(EARNED_BY_DATA)
            room -= len(piece)
        if end and not view and not stream.sent_end:
            stream.sent_end = True
            self._h2.end_stream(stream.number)
        return view

    def _may_send(self, stream: Http2Stream) -> None:
        if stream.lost is not None:
            raise StreamLostError(stream.lost)
        if stream.sent_end:
            raise StreamLostError("the stream was ended")

    async def flush(self) -> None:
        """Raises `OSError`."""
        self._flush()
        if self._stream.full:
            await self._stream.drain()

    def reset(self, number: int, code: ErrorCodes) -> None:
        """Breaks a stream off toward the peer. Harmless when it has ended."""
        with contextlib.suppress(H2Error):
            self._h2.reset_stream(number, code)
        self._flush()

    def acknowledge(self, number: int, count: int) -> None:
        """So many bytes were passed on: the peer may send as many again."""
        with contextlib.suppress(H2Error):
            self._h2.acknowledge_received_data(count, number)
        self._flush()

    def forget(self, stream: Http2Stream) -> None:
        """The stream is closed."""
        self._streams.pop(stream.number, None)
        self._note_idle()

    # What the sides do differently

    @abc.abstractmethod
    def _on_head(self, event: events.Event) -> None:
        """A request, a response or an interim response."""

    @abc.abstractmethod
    def _on_goaway(self, goaway: GoAway) -> None:
        """The peer is leaving; the connection ends when it carries nothing more."""

    # Inner workings

    def _new_stream(self, number: int) -> Http2Stream:
        stream = self._streams[number] = Http2Stream(self, number)
        self._note_idle()
        return stream

    def _note_idle(self) -> None:
        if self._idle is None or self._idle.expired():
            return
        seconds = 0.0 if self._leaving else self._idle_seconds
        self._idle.reschedule(None if self._busy() else self._loop.time() + seconds)

    def _busy(self) -> bool:
        return bool(self._streams)

    async def _read(self) -> None:
        while data := await self._stream.read():
            for part in self._frames.feed(data):
                if isinstance(part, GoAway):
                    self._leaving = True
                    self._on_goaway(part)
                    self._note_idle()
                    continue
                self._receive(part)
                # A peer that does not read is not read from: what we owe it would only pile up.
                await self.flush()
                await asyncio.sleep(0)

    def _receive(self, frames: bytes) -> None:
        try:
            found = self._h2.receive_data(frames)
        except H2Error as error:
            self._flush()
            raise Http2Error(f"HTTP/2: {error}") from error
        except Exception as error:
            # What the library did not expect is not let through.
            raise Http2Error("HTTP/2: malformed frames") from error
        for event in found:
            self._handle(event)

    def _handle(self, event: events.Event) -> None:
        match event:
            case events.DataReceived(stream_id=number):
                self._on_data(number, event)
            case events.StreamEnded(stream_id=number):
                if stream := self._streams.get(number):
                    stream.end()
            case events.RequestReceived() | events.ResponseReceived() | events.InformationalResponseReceived():
                self._on_head(event)
            case events.TrailersReceived(stream_id=number):
                self._on_trailers(number, event.headers)
            case events.StreamReset(stream_id=number):
                self._on_reset(number, ours=not event.remote_reset)
            case events.WindowUpdated(stream_id=number):
                self._wake(number)
            case events.RemoteSettingsChanged():
                self._on_settings(event)
            case _:
                pass

    def _on_data(self, number: int, event: events.DataReceived) -> None:
        stream = self._streams.get(number)
        if stream is None or stream.lost is not None:
            self.acknowledge(number, event.flow_controlled_length)
            return
        stream.receive(event.data, event.flow_controlled_length)

    def _on_trailers(self, number: int, fields: Headers) -> None:
        stream = self._streams.get(number)
        if stream is None:
            return
        try:
            stream.trailers = parse_http2_trailers(fields)
        except ProtocolError as error:
            stream.reset(ErrorCodes.PROTOCOL_ERROR, str(error))

    def _on_reset(self, number: int, *, ours: bool) -> None:
        if ours and not self._frames.resets.take():
            raise FloodError("too many streams are broken off")
        if stream := self._streams.get(number):
            stream.lose("the stream was broken off")

    def _wake(self, number: int) -> None:
        if number == 0:
            for stream in self._streams.values():
                stream.room.set()
        elif number in self._streams:
            self._streams[number].room.set()

    def _on_settings(self, event: events.RemoteSettingsChanged) -> None:
        for code in event.changed_settings:
            if not isinstance(code, SettingCodes):
                # The library keeps all of the 65,536 that there might be.
                with contextlib.suppress(KeyError):
                    del self._h2.remote_settings[code]
        self._h2.encoder.header_table_size = min(self._h2.encoder.header_table_size, _TABLE_BYTES)
        self._wake(0)

    def _flush(self) -> None:
        if data := self._h2.data_to_send():
            self._stream.send(data)

    async def _say_goodbye(self, code: ErrorCodes) -> None:
        with contextlib.suppress(H2Error):
            self._h2.close_connection(code)
        self._flush()
        await self._stream.close(_GOODBYE_SECONDS)


def _machine(*, client: bool) -> H2Connection:
    machine = _Machine(
        H2Configuration(
            client_side=client,
            header_encoding=None,
            # Judged by ourselves: a bad head ends its stream with an answer, not the connection.
            validate_inbound_headers=False,
            normalize_inbound_headers=False,
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
    )
    machine.local_settings = Settings(
        client=client,
        initial_values={
            SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
            SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEAD_BYTES,
            SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW_BYTES,
            SettingCodes.ENABLE_PUSH: 0,
        },
    )
    machine.decoder.max_header_list_size = MAX_DECODED_BYTES
    return machine
