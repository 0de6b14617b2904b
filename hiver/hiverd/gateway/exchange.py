"""One HTTP request on its way into a sandbox, and its response on the way back."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from hiverd.contracts.isolation import Workload
from hiverd.gateway.asgi import Receive, Scope, Send, answer, answer_error
from hiverd.gateway.capture import BODY_PATIENCE_SECONDS, IngressRecorder
from hiverd.gateway.pool import DialError, NothingListensError, Pool
from hiverd.gateway.uplink import Uplink
from hiverd.http.connection import Connection, UpstreamError
from hiverd.http.framing import Headers
from hiverd.http.headers import end_to_end, field_block, forwarded
from hiverd.http.responses import ResponseHead

WATCH_AFTER_SECONDS: Final = 0.02
"""A request that is answered sooner needs no task that watches for the client's leaving."""
IDEMPOTENT_METHODS: Final = frozenset(("GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"))
"""RFC 9110 9.2.2: these may be sent again when a kept connection turns out to be closed."""


class ClientGoneError(Exception):
    """The client has left; nothing is left to answer."""


class Route:
    """Where a request goes."""

    __slots__ = ("patience_seconds", "pool", "port", "target", "workload")

    def __init__(self, workload: Workload, pool: Pool, port: int, target: bytes, patience_seconds: float) -> None:
        """`target` is the request target in origin form, path and query (RFC 9112 3.2.1)."""
        self.workload = workload
        self.pool = pool
        self.port = port
        self.target = target
        self.patience_seconds = patience_seconds

    async def dial(self) -> Connection:
        """A fresh connection. Raises `DialError`."""
        return await self.pool.dial(
            self.workload.network_namespace,
            self.workload.ingress_addresses,
            self.port,
            refused_patience_seconds=self.patience_seconds,
        )


async def dial_while_wanted(route: Route, unwanted: asyncio.Future[Any]) -> Connection:
    """Dials until connected or `unwanted` is done. Raises `DialError`, `ClientGoneError`."""
    dialling = asyncio.create_task(route.dial(), name=f"gateway-dial-{route.port}")
    try:
        await asyncio.wait((dialling, unwanted), return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not dialling.done():
            dialling.cancel()
            await asyncio.wait((dialling,))
    if unwanted.done():
        if not dialling.cancelled() and dialling.exception() is None:
            route.pool.discard(dialling.result())
        raise ClientGoneError
    return dialling.result()


class HttpExchange:
    """Forwards one request. Use once: `await HttpExchange(...).run()`."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, route: Route, recorder: IngressRecorder) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._route = route
        self._recorder = recorder
        self._method: str = scope["method"]
        self._loop = asyncio.get_running_loop()
        self._connection: Connection | None = None
        self._uplink: Uplink | None = None
        self._timers: list[asyncio.TimerHandle] = []
        headers: Headers = list(scope["headers"])
        self._length = next((value for name, value in headers if name == b"content-length"), None)
        self._chunked = any(name == b"transfer-encoding" for name, _ in headers)
        self._has_body = self._chunked or self._length not in (None, b"0")
        self._expects_continue = any(n == b"expect" and v.lower() == b"100-continue" for n, v in headers)
        self._fields = field_block(self._fields_to_send(headers))

    async def run(self) -> None:
        """Always leaves exactly one request and one response event. Raises nothing but cancellation."""
        try:
            await self._begin()
            head = await self._obtain_response()
        except (DialError, UpstreamError) as error:
            await self._refuse(error)
        except ClientGoneError:
            pass
        else:
            await self._relay(head)
        finally:
            await self._close()

    def _fields_to_send(self, headers: Headers) -> Headers:
        client = self._scope.get("client")
        fields = forwarded(headers, client[0] if client else None, self._scope.get("scheme", "http"))
        if self._chunked:
            fields.append((b"transfer-encoding", b"chunked"))
        elif self._length is not None:
            fields.append((b"content-length", self._length))
        return fields

    async def _begin(self) -> None:
        """Records the request, or sees to it that this happens in time."""
        if not self._has_body:
            self._recorder.request()
            self._timers.append(self._loop.call_later(WATCH_AFTER_SECONDS, self._watch))
            return
        self._watch()
        await asyncio.sleep(0)  # the reader takes what has come with the head, often the whole body
        self._timers.append(self._loop.call_later(BODY_PATIENCE_SECONDS, self._recorder.request))

    def _watch(self) -> Uplink:
        if self._uplink is None:
            self._uplink = Uplink(
                self._receive,
                self._recorder,
                has_body=self._has_body,
                chunked=self._chunked,
                expects_continue=self._expects_continue,
            )
            self._uplink.start()
            if self._connection is not None:
                self._uplink.attach(self._connection)
        return self._uplink

    async def _obtain_response(self) -> ResponseHead:
        """Sends the request and awaits the final head, once more if a kept connection had just been closed."""
        repeatable = self._method in IDEMPOTENT_METHODS
        connection = self._route.pool.take(self._route.port, checked=not repeatable or self._has_body)
        while True:
            if connection is None:
                connection = await dial_while_wanted(self._route, self._watch().gone)
            self._connection = connection
            self._send_request(connection)
            try:
                return await connection.response()
            except UpstreamError as error:
                if not (repeatable and connection.reused and error.unanswered and self._replayable()):
                    raise
                self._route.pool.discard(connection)
                connection = self._route.pool.take(self._route.port, checked=True)

    def _replayable(self) -> bool:
        return self._uplink is None or (self._uplink.replayable and not self._uplink.gone.done())

    def _send_request(self, connection: Connection) -> None:
        head = b"%b %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (
            self._method.encode("ascii"),
            self._route.target,
            connection.authority,
            self._fields,
        )
        connection.begin(head, self._method)
        if self._uplink is not None:
            self._uplink.attach(connection)

    async def _refuse(self, error: DialError | UpstreamError) -> None:
        """502, with an empty body if nothing listens (PROTOCOL 3.13)."""
        if self._uplink is not None and self._uplink.gone.done():
            return
        self._recorder.response(502, [], text=False)
        if isinstance(error, NothingListensError):
            await answer(self._scope, self._send, 502, b"", None)
        else:
            await answer_error(self._scope, self._send, 502, str(error))

    async def _relay(self, head: ResponseHead) -> None:
        """Passes the response on as it comes. If it breaks off, returning early makes the server break off, too."""
        connection = self._connection
        assert connection is not None  # noqa: S101 -- there is a head
        self._recorder.response(head.status, head.headers)
        headers = end_to_end(head.headers)
        if head.status in (204, 304):
            # Servers of ASGI hold a length to be a promise of bytes; RFC 9110 8.6 makes it optional here.
            headers = [field for field in headers if field[0] != b"content-length"]
        await self._send({"type": "http.response.start", "status": head.status, "headers": headers})
        if self._uplink is not None:
            self._uplink.answered()
        more = True
        while more:
            try:
                data, more = await connection.read()
            except UpstreamError:
                return
            self._recorder.response_body(data, last=not more)
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
        if self._uplink is None or self._uplink.complete:
            self._connection = None
            self._route.pool.give_back(self._route.port, connection)

    async def _close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        if self._connection is not None:
            self._route.pool.discard(self._connection)
        self._recorder.close()
        if self._uplink is not None:
            await self._uplink.close()
