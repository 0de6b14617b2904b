"""The upstream's side of one exchange: the request sent on, and its answer, whatever version of HTTP it speaks."""

from __future__ import annotations

import abc
from collections.abc import Awaitable

from hiverd.http.framing import Headers
from hiverd.http.responses import ResponseHead


class UpstreamSide(abc.ABC):
    """`begin`, any number of `send` and one `end` if a body is streamed; `response`, `read` until there is no more;
    then `done` or `discard`.

    Sending never raises for a peer that is lost: `response` and `read` tell, by `UpstreamError`.
    """

    reused: bool
    """Other exchanges have used the connection."""

    @property
    @abc.abstractmethod
    def has_final_head(self) -> bool:
        """`response` would not wait."""

    @property
    @abc.abstractmethod
    def ready(self) -> bool:
        """`read` would not wait."""

    @property
    @abc.abstractmethod
    def trailers(self) -> Headers:
        """What followed the body of the answer, once that has been read."""

    @abc.abstractmethod
    async def begin(self, method: str, target: str, fields: Headers, body: bytes | None, *, streamed: bool) -> None:
        """Sends the head, and the body if it is at hand. `fields` are as for HTTP/1.1, Host and framing included;
        `streamed`: `send` and `end` follow."""

    @abc.abstractmethod
    async def send(self, piece: bytes) -> None:
        """Waits while the peer does not take it."""

    @abc.abstractmethod
    async def end(self, trailers: Headers) -> None:
        """The body has ended."""

    @abc.abstractmethod
    def response(self) -> Awaitable[ResponseHead]:
        """The final head. Raises `UpstreamError`."""

    @abc.abstractmethod
    def continued(self) -> Awaitable[None]:
        """Until `100 Continue` or a final head has come, or the exchange has failed. Never raises."""

    @abc.abstractmethod
    def read(self) -> Awaitable[tuple[bytes, bool]]:
        """(bytes, whether more may come). Raises `UpstreamError` if the body is cut short."""

    @abc.abstractmethod
    def abort(self, reason: str) -> None:
        """Breaks the exchange off; waiting calls raise. Idempotent."""

    def abort_for_client(self) -> None:
        """`abort`, when the one for whom the exchange was made has left."""
        self.abort("the client has left")

    @abc.abstractmethod
    def done(self) -> None:
        """The exchange has ended well: the connection is kept for others if it can carry them."""

    @abc.abstractmethod
    def discard(self) -> None:
        """The exchange has ended otherwise. Idempotent."""
