"""The way in: HTTP/1.1, server-sent events and WebSocket from a client to a port in a sandbox (PROTOCOL 3.13).

An ASGI application but for two things that its caller has already found out: the sandbox, and what follows
`.../proxy/{port}` in the path. The ASGI server must not add `Date` or `Server` fields of its own.
"""

from __future__ import annotations

import asyncio
import re
from typing import Final

from hiverd.gateway.asgi import GatewayTarget, Receive, Scope, Send, answer_error
from hiverd.gateway.capture import IngressRecorder
from hiverd.gateway.exchange import HttpExchange, Route
from hiverd.gateway.pool import Pool
from hiverd.gateway.websocket import WebSocketExchange
from hiverd.netns import SocketFactory

RESERVED_PORTS: Final = frozenset((1024, 1025, 1026, 1028))
"""Channels of upstream's own agent; kept closed for everyone (PROTOCOL 3.13)."""
_PORT = re.compile(r"[0-9]{1,5}")
_UNSAFE_IN_TARGET = re.compile(rb"[\x00-\x20\x7f#]")


class Gateway:
    """Forwards requests into sandboxes. One per event loop."""

    def __init__(
        self,
        sockets: SocketFactory,
        *,
        refused_patience_seconds: float = 60.0,
        max_idle_per_sandbox: int = 16,
        idle_seconds: float = 10.0,
    ) -> None:
        """`refused_patience_seconds`: for how long a port on which nothing listens yet is tried again."""
        self._sockets = sockets
        self._refused_patience_seconds = refused_patience_seconds
        self._max_idle = max_idle_per_sandbox
        self._idle_seconds = idle_seconds
        self._pools: dict[str, Pool] = {}

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send, target: GatewayTarget, port_text: str, raw_path: bytes
    ) -> None:
        """Serves one request of type `http` or `websocket`.

        `raw_path` is what follows the port, percent-encoded as received and without the query; empty means `/`.
        The query is taken from the scope.
        """
        target.touch()
        port = parse_port(port_text)
        if port is None:
            await answer_error(scope, send, 400, "invalid port: expected a number from 1 to 65535")
            return
        if port in RESERVED_PORTS:
            await answer_error(scope, send, 403, f"port {port} is reserved")
            return
        try:
            exchange = self._exchange(scope, receive, send, target, port_text, port, raw_path)
        except (ValueError, UnicodeError):
            await answer_error(
                scope, send, 400, "the request cannot be forwarded: invalid path, method or header field"
            )
            return
        await exchange.run()

    def forget(self, sandbox_id: str) -> None:
        """The sandbox is going away: closes all connections into it, those in use as well."""
        pool = self._pools.pop(sandbox_id, None)
        if pool is not None:
            pool.close()

    async def close(self) -> None:
        """Closes all connections into all sandboxes."""
        for sandbox_id in tuple(self._pools):
            self.forget(sandbox_id)

    def connection_count(self, sandbox_id: str) -> int:
        """Open connections into a sandbox, idle ones included."""
        pool = self._pools.get(sandbox_id)
        return pool.connection_count if pool is not None else 0

    def _exchange(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        target: GatewayTarget,
        port_text: str,
        port: int,
        raw_path: bytes,
    ) -> HttpExchange | WebSocketExchange:
        """Raises `ValueError` if the request could not be written out safely."""
        query: bytes = scope["query_string"]
        path = raw_path if raw_path.startswith(b"/") else b"/" + raw_path
        request_target = path + b"?" + query if query else path
        if _UNSAFE_IN_TARGET.search(request_target):
            raise ValueError("unsafe request target")
        workload = target.workload
        route = Route(workload, self._pool(workload.sandbox_id), port, request_target, self._refused_patience_seconds)
        recorder = IngressRecorder(
            target.events,
            port=port_text,
            method=scope.get("method", "GET"),
            path=path,
            query=query,
            headers=list(scope["headers"]),
        )
        if scope["type"] == "websocket":
            return WebSocketExchange(scope, receive, send, route, recorder)
        return HttpExchange(scope, receive, send, route, recorder)

    def _pool(self, sandbox_id: str) -> Pool:
        pool = self._pools.get(sandbox_id)
        if pool is None:
            pool = self._pools[sandbox_id] = Pool(
                asyncio.get_running_loop(), self._sockets, max_idle=self._max_idle, idle_seconds=self._idle_seconds
            )
        return pool


def parse_port(text: str) -> int | None:
    """A decimal port number from 1 to 65535, or None."""
    if _PORT.fullmatch(text) is None:
        return None
    port = int(text)
    return port if 1 <= port <= 65535 else None
