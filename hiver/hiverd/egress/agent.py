"""The agent's side of one exchange: its request, and the answer written back, whatever version of HTTP it speaks."""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Callable
from typing import ClassVar, Final

from hiverd.egress.budget import Budget
from hiverd.egress.stream import Stream
from hiverd.http.framing import Headers
from hiverd.http.requests import RequestError, RequestHead

IDLE_SECONDS: Final = 75.0
"""Without a request on a connection that is kept open."""
HEAD_SECONDS: Final = 30.0
"""From the first byte of a request's head to its last."""
BODY_STALL_SECONDS: Final = 120.0
"""Between two pieces of a body that the agent sends."""


class AgentGoneError(Exception):
    """The agent has closed, or is too slow; nobody is left to answer."""


class AgentSide(abc.ABC):
    """One request and its answer: `start`, any number of `write`, `finish`; or `refuse`; or `switch`.

    Every method that waits raises `OSError` when the agent's connection is lost.
    """

    full_duplex: ClassVar[bool] = False
    """The answer may begin, and go on, while the body is still coming."""
    head: RequestHead

    @property
    @abc.abstractmethod
    def body_read(self) -> bool:
        """The whole body has been taken."""

    @property
    @abc.abstractmethod
    def trailers(self) -> Headers:
        """What followed the body, once that has been taken."""

    @property
    @abc.abstractmethod
    def gone(self) -> bool:
        """The agent does not wait for an answer any more."""

    @abc.abstractmethod
    def watch(self, on_gone: Callable[[], None] | None) -> None:
        """Calls this, once, when the agent leaves (at once if it has left); None: no longer."""

    @abc.abstractmethod
    def body(self) -> AsyncIterator[bytes]:
        """The pieces of the body as they come. Raises `AgentGoneError`, `RequestError`."""

    async def whole_body(self, limit: int, budget: Budget) -> bytes:
        """Raises `RequestError` 413 beyond the limit, 503 beyond the budget; what is returned counts as held."""
        gathered = bytearray()
        try:
            async for piece in self.body():
                if len(gathered) + len(piece) > limit:
                    raise RequestError(413, "the request's body is too large to be changed")
                room = budget.take(len(piece))
                gathered += piece[:room]
                if room < len(piece):
                    raise RequestError(503, "too many bodies are being changed at once")
        except BaseException:
            budget.give(len(gathered))
            raise
        return bytes(gathered)

    @abc.abstractmethod
    async def ask_for_body(self) -> None:
        """Tells an agent that waits for it (`Expect: 100-continue`) to send its body."""

    @abc.abstractmethod
    async def start(self, status: int, fields: Headers, *, length: int | None, has_body: bool) -> None:
        """The head of the answer, `fields` without framing. `length` may be told also where there is no body."""

    @abc.abstractmethod
    async def write(self, data: bytes) -> None:
        """A piece of the answer's body."""

    @abc.abstractmethod
    async def finish(self, trailers: Headers) -> None:
        """The end of the answer."""

    @abc.abstractmethod
    async def refuse(self, status: int, text: str) -> None:
        """A short answer of our own. If another answer has begun, breaks that off instead."""

    async def switch(self, fields: Headers) -> Stream:
        """Answers 101 and hands the connection over. Only where `head.upgrade` is set."""
        raise NotImplementedError
