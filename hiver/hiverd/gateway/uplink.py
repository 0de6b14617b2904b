"""The client's side of one HTTP exchange: its body on the way up, and whether it is still there."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from hiverd.gateway.asgi import Receive
from hiverd.gateway.capture import IngressRecorder
from hiverd.http.connection import Connection

MAX_EARLY_BYTES: Final = 256 * 1024
"""How much of a body is taken from the client while there is no connection yet."""
MAX_REPLAY_BYTES: Final = 64 * 1024
"""How much of a body is kept in case that a kept connection turns out to be closed."""
EXPECT_PATIENCE_SECONDS: Final = 1.0
"""How long a client that sent `Expect: 100-continue` waits for the target's consent (RFC 9110 10.1.1)."""

_log = logging.getLogger(__name__)


class Uplink:
    """Reads what the client sends, passes it on under back-pressure, and notices when the client leaves.

    An ASGI server tells of a client's leaving only through `receive`, which also yields the body: hence one reader
    for both. Once the client has left, `gone` is set and an unfinished exchange is aborted.
    """

    def __init__(
        self, receive: Receive, recorder: IngressRecorder, *, has_body: bool, chunked: bool, expects_continue: bool
    ) -> None:
        loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = loop.create_future()
        self.complete = not has_body
        """The whole body has been received."""
        self._receive = receive
        self._recorder = recorder
        self._chunked = chunked
        self._expects_continue = expects_continue
        self._connection: Connection | None = None
        self._attached: asyncio.Future[None] = loop.create_future()
        self._answered: asyncio.Future[None] = loop.create_future()
        self.replayable = True
        """All that was sent of the body is still at hand, so that the request can be sent once more."""
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to read. Idempotent."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="gateway-uplink")

    def attach(self, connection: Connection) -> None:
        """Sends what was received so far to this connection, and from now on the rest as it comes."""
        self._connection = connection
        if self._kept:
            connection.write(b"".join(self._kept))
        self._limit_kept()
        if not self._attached.done():
            self._attached.set_result(None)

    def answered(self) -> None:
        """The client has been sent the response's head."""
        if not self._answered.done():
            self._answered.set_result(None)

    async def close(self) -> None:
        """Ends the reading."""
        task = self._task
        if task is None:
            return
        task.cancel()
        await asyncio.wait((task,))
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("reading from a client failed", exc_info=error)

    async def _run(self) -> None:
        if self._expects_continue and not self.complete:
            await self._await_consent()
        while not self.complete:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._leave()
                return
            await self._pass_on(message.get("body", b""), more=message.get("more_body", False))
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave()

    async def _await_consent(self) -> None:
        """The server consents on our behalf at the first `receive`, so that waits for the target's word.

        If the target gives a final answer instead, that is sent first. A target that says nothing gets the body.
        """
        try:
            async with asyncio.timeout(EXPECT_PATIENCE_SECONDS):
                await asyncio.shield(self._attached)
                if self._connection is not None:
                    await self._connection.continued()
        except TimeoutError:
            return
        if self._connection is not None and self._connection.has_final_head:
            await self._answered

    async def _pass_on(self, body: bytes, *, more: bool) -> None:
        if body:
            self._recorder.request_body(body)
        if not more:
            self.complete = True
            self._recorder.request()
        data = _as_chunk(body, last=not more) if self._chunked else body
        if self.replayable:
            self._kept.append(data)
            self._kept_bytes += len(data)
        if self._connection is not None:
            self._connection.write(data)
            self._limit_kept()
            await self._connection.drain()
        elif more and self._kept_bytes > MAX_EARLY_BYTES:
            await self._attached

    def _limit_kept(self) -> None:
        if self._kept_bytes > MAX_REPLAY_BYTES:
            self.replayable = False
            self._kept.clear()
            self._kept_bytes = 0

    def _leave(self) -> None:
        if not self.gone.done():
            self.gone.set_result(None)
        if self._connection is not None and not self._connection.complete:
            self._connection.abort("the client has left")


def _as_chunk(body: bytes, *, last: bool) -> bytes:
    chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
    return chunk + b"0\r\n\r\n" if last else chunk
