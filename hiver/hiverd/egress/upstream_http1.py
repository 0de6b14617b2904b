"""HTTP/1.1 with an upstream: one exchange at a time on a connection that comes from the pool and goes back to it."""

from __future__ import annotations

from collections.abc import Awaitable

from hiverd.egress.uplinks import Uplinks, Upstream
from hiverd.egress.upstream import UpstreamSide
from hiverd.http.connection import Connection
from hiverd.http.framing import Headers
from hiverd.http.headers import field_block
from hiverd.http.responses import ResponseHead


class Http1Upstream(UpstreamSide):
    """One exchange on a connection that nobody else uses meanwhile."""

    def __init__(self, uplinks: Uplinks, upstream: Upstream, connection: Connection) -> None:
        self._uplinks = uplinks
        self._upstream = upstream
        self._connection = connection
        self._chunked = False
        self.reused = connection.reused

    @property
    def has_final_head(self) -> bool:
        return self._connection.has_final_head

    @property
    def ready(self) -> bool:
        return self._connection.ready

    @property
    def trailers(self) -> Headers:
        return self._connection.trailers

    async def begin(self, method: str, target: str, fields: Headers, body: bytes | None, *, streamed: bool) -> None:
        self._chunked = any(name == b"transfer-encoding" for name, _ in fields)
        head = f"{method} {target} HTTP/1.1\r\n".encode("latin-1") + field_block(fields) + b"\r\n"
        self._connection.begin(head + (body or b""), method)

    async def send(self, piece: bytes) -> None:
        self._connection.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)
        await self._connection.drain()

    async def end(self, trailers: Headers) -> None:
        if self._chunked:
            self._connection.write(b"0\r\n" + field_block(trailers) + b"\r\n")

    def response(self) -> Awaitable[ResponseHead]:
        return self._connection.response()

    def continued(self) -> Awaitable[None]:
        return self._connection.continued()

    def read(self) -> Awaitable[tuple[bytes, bool]]:
        return self._connection.read()

    def abort(self, reason: str) -> None:
        self._connection.abort(reason)

    def done(self) -> None:
        self._uplinks.give_back(self._upstream, self._connection)

    def discard(self) -> None:
        self._uplinks.discard(self._connection)
