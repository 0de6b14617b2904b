"""The `ingress.*` events of one exchange (PROTOCOL 7). No I/O; forwarding never waits for any of this.

When the request event is recorded: at once if there is no body or all of it came with the head, so before the upstream
is dialled. Otherwise the body flows on while its beginning is collected, and the event is recorded at the earliest of:
the end of the body, `MAX_BODY_BYTES` collected, the upstream's answer, or `BODY_PATIENCE_SECONDS`. So it may hold only
the beginning of a slow upload, but it always precedes the response event, and there is exactly one response event per
request event.

A type that the sandbox's filter excludes still takes an id and counts as a sign of life, so a bare event is recorded
for it and the work of collecting is skipped.
"""

from __future__ import annotations

import codecs
import time
from typing import Final, Literal

from hiverd.http.bodies import is_text
from hiverd.http.framing import Headers
from hiverd.http.headers import joined
from hiverd.wire.events import EventSink, IngressChunkEvent, IngressRequestEvent, IngressResponseEvent

MAX_BODY_BYTES: Final = 512 * 1024
MAX_MESSAGE_BYTES: Final = 64 * 1024
BODY_PATIENCE_SECONDS: Final = 0.25
STATUS_WITHOUT_ANSWER: Final = 502
"""Recorded when the client left before there was an answer."""

Label = Literal["up", "down"]


class IngressRecorder:
    """Records one exchange."""

    __slots__ = ("_answered", "_collected", "_collecting", "_decoder", "_events", "_request", "_started", "request_id")

    def __init__(
        self, events: EventSink, *, port: str, method: str, path: bytes, query: bytes, headers: Headers
    ) -> None:
        """`path` and `query` as they go to the target, still percent-encoded; no query is `b""`."""
        self._events = events
        self._started = time.monotonic()
        self._collected = bytearray()
        self._decoder: codecs.IncrementalDecoder | None = None
        self._answered = False
        self.request_id: int | None = None
        """Known once the request event has been recorded."""
        wanted = events.wants(IngressRequestEvent)
        self._collecting = wanted and is_text(headers)
        self._request = IngressRequestEvent(
            port=port,
            method=method,
            path=path.decode("latin-1"),
            query=query.decode("latin-1") if query else None,
            headers=joined(headers) if wanted else None,
        )

    def request_body(self, piece: bytes) -> None:
        """Collects a piece of the request's body; records the request when there is enough."""
        if not self._collecting or self.request_id is not None:
            return
        room = MAX_BODY_BYTES - len(self._collected)
        self._collected += piece if len(piece) <= room else piece[:room]
        if len(piece) >= room:
            self.request()

    def request(self) -> int:
        """Records the request with what was collected, unless that is done; returns its id."""
        if self.request_id is None:
            event = self._request
            if self._collected:
                event = IngressRequestEvent(
                    port=event.port,
                    method=event.method,
                    path=event.path,
                    query=event.query,
                    headers=event.headers,
                    body=self._collected.decode("utf-8", "replace"),
                )
                self._collected = bytearray()
            self.request_id = self._events.emit(event)
        return self.request_id

    def response(self, status: int, headers: Headers, *, text: bool | None = None) -> None:
        """Records the response, once; `text` overrides whether its body will be recorded."""
        if self._answered:
            return
        self._answered = True
        request_id = self.request()
        wanted = self._events.wants(IngressResponseEvent)
        self._events.emit(
            IngressResponseEvent(
                request_id=request_id,
                status=status,
                duration_ms=int((time.monotonic() - self._started) * 1000),
                headers=joined(headers) if wanted and headers else None,
            )
        )
        if is_text(headers) if text is None else text:
            self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def close(self) -> None:
        """The exchange is over; makes sure that there was a response event."""
        if not self._answered:
            self.response(STATUS_WITHOUT_ANSWER, [])

    def response_body(self, data: bytes, *, last: bool) -> None:
        """Records a write of the response's body if it is text; characters are never cut in two."""
        if self._decoder is None or not (data or last):
            return
        if not self._events.wants(IngressChunkEvent):
            if data:
                self._emit_chunk("", None)
            return
        for start in range(0, len(data), MAX_BODY_BYTES):
            piece = data[start : start + MAX_BODY_BYTES]
            self._emit_chunk(self._decoder.decode(piece), None, skip_empty=True)
        if last:
            self._emit_chunk(self._decoder.decode(b"", True), None, skip_empty=True)

    def message(self, label: Label, data: str | bytes) -> None:
        """Records a WebSocket message."""
        if not self._events.wants(IngressChunkEvent):
            self._emit_chunk("", label)
        elif isinstance(data, bytes):
            self._emit_chunk(f"[binary {len(data)} bytes]", label)
        else:
            size = len(data) if data.isascii() else len(data.encode("utf-8", "replace"))
            self._emit_chunk(data if size <= MAX_MESSAGE_BYTES else f"[text {size} bytes]", label)

    def control(self, label: Label, kind: Literal["ping", "pong"]) -> None:
        """Records a WebSocket ping or pong."""
        self._emit_chunk(f"[{kind}]", label)

    def closing(self, label: Label, code: int, reason: str) -> None:
        """Records a WebSocket close; code 1005 means that none was given (RFC 6455 7.1.5)."""
        self._emit_chunk(f"[close {code} {reason}]" if reason else f"[close {code}]", label)

    def _emit_chunk(self, body: str, label: Label | None, *, skip_empty: bool = False) -> None:
        if self.request_id is not None and (body or not skip_empty):
            self._events.emit(IngressChunkEvent(request_id=self.request_id, body=body, label=label))
