"""One WebSocket between a client, whose end the ASGI server speaks, and a server in a sandbox, whose end we speak.

Messages pass whole, since ASGI knows no fragments: hence the bound on a message's size, and one message in flight per
direction. Pings are answered on each leg. Close codes and reasons pass both ways; a leg that is lost without a close
frame makes the other one be lost likewise.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import os
from typing import Final

from wsproto.frame_protocol import CloseReason, Frame, FrameProtocol, Opcode, ParseFailed

from hiverd.gateway.asgi import Message, Receive, Scope, Send, answer
from hiverd.gateway.capture import IngressRecorder
from hiverd.gateway.exchange import ClientGoneError, Route, dial_while_wanted
from hiverd.gateway.pool import DialError
from hiverd.http.connection import Connection, UpstreamError
from hiverd.http.framing import Headers, connection_tokens
from hiverd.http.headers import end_to_end, field_block, forwarded
from hiverd.http.responses import ResponseHead

MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024
CLOSE_PATIENCE_SECONDS: Final = 5.0
FRAMES_PER_TURN: Final = 64
_ACCEPT_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 1.3
_NO_STATUS: Final = int(CloseReason.NO_STATUS_RCVD)
_UNSENDABLE: Final = (_NO_STATUS, int(CloseReason.ABNORMAL_CLOSURE), int(CloseReason.TLS_HANDSHAKE_FAILED))

_log = logging.getLogger(__name__)


class WebSocketExchange:
    """Forwards one WebSocket. Use once: `await WebSocketExchange(...).run()`."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, route: Route, recorder: IngressRecorder) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._route = route
        self._recorder = recorder
        self._connection: Connection | None = None
        self._frames = FrameProtocol(client=True, extensions=[])
        self._first: asyncio.Task[Message] | None = None
        self._key = base64.b64encode(os.urandom(16))
        self._offered: list[str] = list(scope.get("subprotocols", ()))
        self._fields = field_block(self._fields_to_send())
        self._accepted = False
        self._parts: list[bytes] | list[str] = []
        self._part_bytes = 0
        self._frame_count = 0
        self._close_sent = False

    async def run(self) -> None:
        """Always leaves exactly one request and one response event. Raises nothing but cancellation."""
        self._recorder.request()
        try:
            await self._receive()  # websocket.connect
            self._first = asyncio.create_task(self._next_from_client(), name="gateway-websocket-first")
            await self._handshake(self._first)
        except (DialError, UpstreamError) as error:
            if not self._first_done():
                self._recorder.response(502, [], text=False)
                await answer(self._scope, self._send, 502, str(error).encode(), b"text/plain; charset=utf-8")
        except (ClientGoneError, OSError):
            pass
        finally:
            await self._close()

    def _first_done(self) -> bool:
        return self._first is not None and self._first.done()

    async def _next_from_client(self) -> Message:
        return await self._receive()

    def _fields_to_send(self) -> Headers:
        client = self._scope.get("client")
        scheme = "https" if self._scope.get("scheme") == "wss" else "http"
        headers = [field for field in self._scope["headers"] if not field[0].startswith(b"sec-websocket-")]
        fields = forwarded(headers, client[0] if client else None, scheme)
        fields += [
            (b"connection", b"Upgrade"),
            (b"upgrade", b"websocket"),
            (b"sec-websocket-version", b"13"),
            (b"sec-websocket-key", self._key),
        ]
        if self._offered:
            fields.append((b"sec-websocket-protocol", ", ".join(self._offered).encode("latin-1")))
        return fields

    async def _handshake(self, first: asyncio.Task[Message]) -> None:
        connection = self._connection = await dial_while_wanted(self._route, first)
        # Before it is accepted, all that a client can "send" is its leaving.
        first.add_done_callback(lambda _: self._forsake(connection))
        connection.begin(
            b"GET %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (self._route.target, connection.authority, self._fields),
            "GET",
            upgradable=True,
        )
        head = await connection.response()
        if head.status != 101:
            self._recorder.response(head.status, head.headers)
            await self._relay_refusal(connection, head)
            return
        protocol = accepted_protocol(head, self._key, self._offered)
        self._recorder.response(101, head.headers, text=False)
        connection.start_raw()
        self._accepted = True
        await self._send({"type": "websocket.accept", "subprotocol": protocol, "headers": _accept_headers(head)})
        await self._converse(connection, first)

    def _forsake(self, connection: Connection) -> None:
        if not self._accepted:
            connection.abort("the client has left")

    async def _relay_refusal(self, connection: Connection, head: ResponseHead) -> None:
        if "websocket.http.response" not in self._scope.get("extensions", {}):
            await self._send({"type": "websocket.close"})
            return
        headers = end_to_end(head.headers)
        if head.status in (204, 304):
            headers = [field for field in headers if field[0] != b"content-length"]
        await self._send({"type": "websocket.http.response.start", "status": head.status, "headers": headers})
        more = True
        while more:
            try:
                data, more = await connection.read()
            except UpstreamError:
                return
            self._recorder.response_body(data, last=not more)
            await self._send({"type": "websocket.http.response.body", "body": data, "more_body": more})

    async def _converse(self, connection: Connection, first: asyncio.Task[Message]) -> None:
        """Until both sides are done. The side that ends first gives the other a short while to say goodbye."""
        up = asyncio.create_task(self._pump_up(connection, first), name="gateway-websocket-up")
        down = asyncio.create_task(self._pump_down(connection), name="gateway-websocket-down")
        try:
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
            if not down.done():
                await asyncio.wait((down,), timeout=CLOSE_PATIENCE_SECONDS)
        finally:
            up.cancel()
            down.cancel()
            await asyncio.wait((up, down))
            _report(up)
            _report(down)

    async def _pump_up(self, connection: Connection, first: asyncio.Task[Message]) -> None:
        message = await first
        while message["type"] == "websocket.receive":
            data: str | bytes | None = message.get("text")
            if data is None:
                data = message["bytes"]
            self._recorder.message("up", data)
            if not self._close_sent:
                connection.write(bytes(self._frames.send_data(data)))
                await connection.drain()
            message = await self._receive()
        code = message.get("code", _NO_STATUS)
        reason = message.get("reason") or ""
        if not self._close_sent:
            self._recorder.closing("up", code, reason)
            self._send_close(connection, code, reason)

    def _send_close(self, connection: Connection, code: int, reason: str) -> None:
        self._close_sent = True
        if code in _UNSENDABLE:
            connection.write(bytes(self._frames.close()))
        else:
            connection.write(bytes(self._frames.close(code, reason)))

    async def _pump_down(self, connection: Connection) -> None:
        more = True
        while more:
            try:
                data, more = await connection.read()
                self._frames.receive_bytes(data)
                for frame in self._frames.received_frames():
                    if not await self._on_frame(connection, frame):
                        return
            except ParseFailed as error:
                self._send_close(connection, error.code, "")
                await self._send({"type": "websocket.close", "code": int(CloseReason.INTERNAL_ERROR)})
                return
            except (UpstreamError, OSError):
                return

    async def _on_frame(self, connection: Connection, frame: Frame) -> bool:
        """False: this was the last one."""
        self._frame_count += 1
        if self._frame_count % FRAMES_PER_TURN == 0:
            await asyncio.sleep(0)  # a flood of tiny frames must not hold the loop
        if frame.opcode is Opcode.CLOSE:
            return await self._on_close(connection, frame)
        if frame.opcode is Opcode.PING:
            assert isinstance(frame.payload, (bytes, bytearray))  # noqa: S101 -- as wsproto has it
            self._recorder.control("down", "ping")
            if not self._close_sent:
                self._recorder.control("up", "pong")
                connection.write(bytes(self._frames.pong(frame.payload)))
                await connection.drain()
            return True
        if frame.opcode is Opcode.PONG:
            self._recorder.control("down", "pong")
            return True
        return await self._on_data(connection, frame)

    async def _on_close(self, connection: Connection, frame: Frame) -> bool:
        assert isinstance(frame.payload, tuple)  # noqa: S101 -- as wsproto has it
        code, reason = frame.payload
        self._recorder.closing("down", int(code), reason)
        if not self._close_sent:
            self._send_close(connection, code, "")
            await self._send({"type": "websocket.close", "code": code, "reason": reason})
        return False

    async def _on_data(self, connection: Connection, frame: Frame) -> bool:
        self._parts.append(frame.payload)  # type: ignore[arg-type]
        self._part_bytes += len(frame.payload)
        if self._part_bytes > MAX_MESSAGE_BYTES:
            too_big = int(CloseReason.MESSAGE_TOO_BIG)
            self._send_close(connection, too_big, "")
            await self._send({"type": "websocket.close", "code": too_big})
            return False
        if not frame.message_finished:
            return True
        if frame.opcode is Opcode.TEXT:
            text = "".join(self._parts)  # type: ignore[arg-type]
            self._recorder.message("down", text)
            await self._send({"type": "websocket.send", "text": text})
        else:
            data = b"".join(self._parts)  # type: ignore[arg-type]
            self._recorder.message("down", data)
            await self._send({"type": "websocket.send", "bytes": data})
        self._parts = []
        self._part_bytes = 0
        return True

    async def _close(self) -> None:
        if self._connection is not None:
            self._route.pool.discard(self._connection)
        self._recorder.close()
        if self._first is not None:
            self._first.cancel()
            await asyncio.wait((self._first,))
            _report(self._first)


def accepted_protocol(head: ResponseHead, key: bytes, offered: list[str]) -> str | None:
    """The subprotocol that the upstream has chosen. Raises `UpstreamError` if its 101 is not valid (RFC 6455 4.1)."""
    fields: dict[bytes, list[bytes]] = {}
    for name, value in head.headers:
        fields.setdefault(name, []).append(value)
    accept = base64.b64encode(hashlib.sha1(key + _ACCEPT_GUID).digest())  # noqa: S324 -- RFC 6455
    valid = (
        fields.get(b"sec-websocket-accept") == [accept]
        and [value.lower() for value in fields.get(b"upgrade", ())] == [b"websocket"]
        and b"upgrade" in connection_tokens(head.headers)
        and b"sec-websocket-extensions" not in fields
    )
    chosen = [value.decode("latin-1") for value in fields.get(b"sec-websocket-protocol", ())]
    if not valid or len(chosen) > 1 or (chosen and chosen[0] not in offered):
        raise UpstreamError("the upstream's WebSocket handshake is not valid")
    return chosen[0] if chosen else None


def _accept_headers(head: ResponseHead) -> Headers:
    return [
        field
        for field in end_to_end(head.headers)
        if field[0] != b"content-length" and not field[0].startswith(b"sec-websocket-")
    ]


def _report(task: asyncio.Task[Message] | asyncio.Task[None]) -> None:
    """Errors of the client's leg are its leaving; anything else is ours and belongs in the log."""
    if task.cancelled():
        return
    error = task.exception()
    if error is not None and not isinstance(error, OSError):
        _log.error("a WebSocket's forwarding failed", exc_info=error)
