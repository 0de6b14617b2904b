"""The parts of ASGI that the gateway uses, and short answers of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

import msgspec

from hiverd.contracts.isolation import Workload
from hiverd.http.framing import Headers
from hiverd.wire.events import EventSink

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class GatewayTarget(Protocol):
    """The sandbox into which a request goes, as the caller has found it."""

    @property
    def workload(self) -> Workload: ...

    @property
    def events(self) -> EventSink: ...

    def touch(self) -> None:
        """Resets the sandbox's inactivity timer (PROTOCOL 8)."""


async def answer(scope: Scope, send: Send, status: int, body: bytes, content_type: bytes | None) -> None:
    """A complete answer of our own, also to a WebSocket handshake that is not accepted."""
    headers: Headers = [(b"content-length", b"%d" % len(body))]
    if content_type is not None:
        headers.append((b"content-type", content_type))
    if scope["type"] == "http":
        prefix = "http.response"
    elif "websocket.http.response" in scope.get("extensions", {}):
        prefix = "websocket.http.response"
    else:
        await send({"type": "websocket.close"})  # the server makes a 403 of this
        return
    await send({"type": f"{prefix}.start", "status": status, "headers": headers})
    await send({"type": f"{prefix}.body", "body": body})


async def answer_error(scope: Scope, send: Send, status: int, message: str) -> None:
    """The JSON of PROTOCOL 2: `{"error": ...}`."""
    body = msgspec.json.encode({"error": message})
    await answer(scope, send, status, body, b"application/json; charset=utf-8")
