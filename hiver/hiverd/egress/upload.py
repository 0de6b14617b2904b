"""The body of one request on its way from the agent to the upstream."""

from __future__ import annotations

import asyncio
from typing import Final

from hiverd.egress.agent import AgentSide
from hiverd.egress.recorder import Attempt
from hiverd.egress.upstream import UpstreamSide
from hiverd.http.connection import UpstreamError
from hiverd.http.headers import relayed_trailers

CONTINUE_SECONDS: Final = 1.0
"""How long an agent that sent `Expect: 100-continue` waits for the upstream's consent (RFC 9110 10.1.1)."""
STALL_SECONDS: Final = 120.0
"""How long an upstream may take nothing of a body."""


class Upload:
    """Runs from the start until `end`, also while an answer comes: an upstream may answer what it has so far."""

    def __init__(self, agent: AgentSide, side: UpstreamSide, attempt: Attempt, reserved: frozenset[bytes]) -> None:
        """`reserved`: fields that the rule sets, and the agent's trailers do not."""
        self.fault: Exception | None = None
        """Why the body could not be sent to its end; the exchange with the upstream has been broken off then."""
        self._agent = agent
        self._side = side
        self._attempt = attempt
        self._reserved = reserved
        self._task = asyncio.create_task(self._run(), name="egress-upload")

    @property
    def done(self) -> bool:
        return self._task.done()

    async def end(self) -> None:
        """What has not been sent when the answer has ended is not wanted (RFC 9112 9.3). Raises only cancellation."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            if await self._may_begin():
                async for piece in self._agent.body():
                    self._attempt.request_body(piece)
                    await self._send(piece)
                await self._side.end(relayed_trailers(self._agent.trailers, self._reserved))
                self._attempt.request("allowed")
        except Exception as error:  # noqa: BLE001 -- raised by whoever awaits the answer
            self.fault = error
            self._side.abort("the request was broken off")

    async def _may_begin(self) -> bool:
        """Asks an agent for its body once the upstream has; False if the upstream answers without."""
        if self._agent.head.expects_continue:
            try:
                async with asyncio.timeout(CONTINUE_SECONDS):
                    await self._side.continued()
            except TimeoutError:
                pass
            if self._side.has_final_head:
                return False
            await self._agent.ask_for_body()
        return True

    async def _send(self, piece: bytes) -> None:
        try:
            async with asyncio.timeout(STALL_SECONDS):
                await self._side.send(piece)
        except TimeoutError as error:
            raise UpstreamError("it does not take the request's body") from error
