"""The events of one attempt to leave a sandbox (PROTOCOL 5.9 and 7): a request, its response, then text of its body."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from hiverd.egress.budget import Budget
from hiverd.egress.redactor import Redactor
from hiverd.egress.rules import Rule
from hiverd.http.bodies import TextReader, text_reader
from hiverd.http.framing import Headers
from hiverd.http.headers import joined
from hiverd.wire.events import EgressChunkEvent, EgressRequestEvent, EgressResponseEvent, EventSink

MAX_BODY_BYTES: Final = 1 << 20
MAX_CHUNK_BYTES: Final = 32 * 1024

Access = Literal["allowed", "denied"]


class Attempt:
    """Records one attempt. `request` and `response` may be asked for at any time: the order is kept, and each event
    comes once for each access."""

    def __init__(
        self,
        events: EventSink,
        *,
        host: str,
        method: str,
        path: str,
        query: str | None = None,
        headers: Headers | None = None,
        budget: Budget | None = None,
    ) -> None:
        """As the agent wrote it; the query without `?`. Without a budget no body is collected."""
        self._events = events
        self._started = time.monotonic()
        wanted = events.wants(EgressRequestEvent)
        self._budget = budget
        self._body_reader = text_reader(headers) if wanted and headers and budget is not None else None
        self._collected = bytearray()
        self._redactor: Redactor | None = None
        self._reader: TextReader | None = None
        self._request_id: int | None = None
        self._access: Access | None = None
        self.answered = False
        self.event = EgressRequestEvent(
            access="allowed",
            host=host,
            method=method,
            path=path,
            query=query,
            headers=joined(headers) if wanted and headers else None,
        )

    async def room(self) -> None:
        """Waits while the journal has more than it can store: what a workload causes must not pile up there."""
        await self._events.room()

    def changed_by(self, headers: Headers, upstream: str | None, secrets: Sequence[str]) -> None:
        """What a rule's override makes of it: fields as they may be shown, where it goes, what is not to be told."""
        self._redactor = Redactor(secrets) if secrets else None
        self.event = msgspec.structs.replace(
            self.event, headers=joined(headers) if self.event.headers is not None else None, upstream=upstream
        )

    def hide(self, secrets: Sequence[str]) -> None:
        """Further texts that are not to be told."""
        known = self._redactor.secrets if self._redactor is not None else ()
        self._redactor = Redactor(sorted({*known, *secrets}, key=len, reverse=True))

    @property
    def collects_body(self) -> bool:
        """`request_body` has work to do."""
        return self._body_reader is not None

    def leads_to(self, rule: Rule) -> None:
        """The same where bytes pass unread, so an override is only about where they go."""
        override = rule.source.override
        if override is not None and override.host:
            self.event = msgspec.structs.replace(self.event, upstream=override.host)

    def whole_body(self, body: bytes) -> None:
        """The agent's body where it is held as a whole, before it is known whether the request is sent."""
        if self._body_reader is not None and self._budget is not None:
            self._collected += body[: self._budget.take(min(len(body), MAX_BODY_BYTES))]

    def request_body(self, piece: bytes) -> None:
        """Collects the agent's body; records the request when there is enough of it."""
        if self._body_reader is None or self._budget is None or self._access == "allowed":
            return
        wanted = min(len(piece), MAX_BODY_BYTES - len(self._collected))
        room = self._budget.take(wanted)
        self._collected += piece[:room]
        if room < len(piece):
            self.request("allowed")

    def request(self, access: Access) -> None:
        """Records the request, once with this access: a denied one may be allowed later (PROTOCOL 5.6)."""
        if self._access == access:
            return
        self._access = access
        self._request_id = self._events.emit(msgspec.structs.replace(self.event, access=access, body=self._take_body()))

    def _take_body(self) -> str | None:
        """The text of what has been collected, without its content coding."""
        if self._body_reader is None or not self._collected:
            return None
        content = bytes(self._collected)
        self._forget_body()
        text, size = "", 0
        for piece in self._body_reader.feed(content, MAX_BODY_BYTES):
            size += len(piece)
            text += piece
            if size >= MAX_BODY_BYTES:
                break
        return self._shown(text[:MAX_BODY_BYTES])

    def _forget_body(self) -> None:
        if self._budget is not None:
            self._budget.give(len(self._collected))
        self._collected = bytearray()

    def response(self, status: int, headers: Headers | None = None) -> None:
        """Records the answer, once. Status 0: there was none."""
        if self.answered:
            return
        self.request(self._access or "allowed")
        assert self._request_id is not None  # noqa: S101 -- emitted just now or before
        self.answered = True
        self._events.emit(
            EgressResponseEvent(
                request_id=self._request_id,
                status=status,
                duration_ms=int((time.monotonic() - self._started) * 1000),
                headers=self._shown_headers(headers) if headers and self._events.wants(EgressResponseEvent) else None,
            )
        )
        if headers:
            self._reader = text_reader(headers)

    def denied(self, status: int) -> None:
        """Both events of a denial."""
        self.request("denied")
        self.response(status)

    def failed(self, status: int) -> None:
        """What could not be judged or changed, for a reason of ours, has been denied."""
        self.request(self._access or "denied")
        self.response(status)

    @property
    def reads_response(self) -> bool:
        """`response_body` has work to do; wait for `room` before."""
        return self._reader is not None

    def response_body(self, data: bytes) -> None:
        """A piece of the response's body."""
        if self._reader is None:
            return
        if not self._events.wants(EgressChunkEvent):
            self._chunk("", None)  # it has an id all the same (PROTOCOL 7)
            return
        for text in self._reader.feed(data, MAX_CHUNK_BYTES):
            if shown := text if self._redactor is None else self._redactor.piece(text):
                self._chunk(shown, None)

    def end(self) -> None:
        """There is no more to record. Idempotent."""
        self._forget_body()
        reader, self._reader = self._reader, None
        if reader is None or not self._events.wants(EgressChunkEvent):
            return
        text = reader.end()
        if self._redactor is not None:
            text = self._redactor.piece(text) + self._redactor.end()
        if text:
            self._chunk(text, None)

    def message(self, text: str, label: Literal["up", "down"] | None) -> None:
        """A message of a WebSocket, or (without a label) a remark of ours."""
        self._chunk(self._shown(text) if self._events.wants(EgressChunkEvent) else "", label)

    def _chunk(self, body: str, label: Literal["up", "down"] | None) -> None:
        if self._request_id is not None:
            self._events.emit(EgressChunkEvent(request_id=self._request_id, body=body, label=label))

    def _shown_headers(self, headers: Headers) -> dict[str, str]:
        shown = joined(headers)
        return shown if self._redactor is None else {name: self._shown(value) for name, value in shown.items()}

    def _shown(self, text: str) -> str:
        return text if self._redactor is None else self._redactor.whole(text)
