"""The events of one attempt to leave a sandbox (PROTOCOL 5.9 and 7): a request, its response, then text of its body."""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from hiverd.http.bodies import is_text
from hiverd.http.framing import Headers
from hiverd.http.headers import joined
from hiverd.wire.events import EgressChunkEvent, EgressRequestEvent, EgressResponseEvent, EventSink
from hiverd.wire.redaction import REDACTED

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
    ) -> None:
        """As the agent wrote it; the query without `?`."""
        self._events = events
        self._started = time.monotonic()
        wanted = events.wants(EgressRequestEvent)
        self._collecting = wanted and headers is not None and is_text(headers)
        self._collected = bytearray()
        self._secrets: Sequence[str] = ()
        self._decoder: codecs.IncrementalDecoder | None = None
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

    def changed_by(self, headers: Headers, upstream: str | None, secrets: Sequence[str]) -> None:
        """What a rule's override makes of it: fields as they may be shown, where it goes, what is not to be told."""
        self._secrets = secrets
        self.event = msgspec.structs.replace(
            self.event, headers=joined(headers) if self.event.headers is not None else None, upstream=upstream
        )

    def hide(self, secrets: Sequence[str]) -> None:
        """Further texts that are not to be told."""
        self._secrets = sorted({*self._secrets, *secrets}, key=len, reverse=True)

    def whole_body(self, body: bytes) -> None:
        """The agent's body where it is held as a whole, before it is known whether the request is sent."""
        if self._collecting:
            self._collected += body[:MAX_BODY_BYTES]

    def request_body(self, piece: bytes) -> None:
        """Collects the agent's body; records the request when there is enough of it."""
        if not self._collecting or self._request_id is not None:
            return
        room = MAX_BODY_BYTES - len(self._collected)
        self._collected += piece[:room]
        if len(piece) >= room:
            self.request("allowed")

    def request(self, access: Access) -> None:
        """Records the request, once with this access: a denied one may be allowed later (PROTOCOL 5.6)."""
        if self._access == access:
            return
        self._access = access
        body = self._collected.decode("utf-8", "replace") if self._collected else None
        self._request_id = self._events.emit(msgspec.structs.replace(self.event, access=access, body=body))

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
                headers=self._shown(headers) if headers and self._events.wants(EgressResponseEvent) else None,
            )
        )
        if headers and is_text(headers):
            self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def denied(self, status: int) -> None:
        """Both events of a denial."""
        self.request("denied")
        self.response(status)

    def response_body(self, data: bytes) -> None:
        """A piece of the response's body."""
        if self._decoder is None:
            return
        for start in range(0, len(data), MAX_CHUNK_BYTES):
            if text := self._decoder.decode(data[start : start + MAX_CHUNK_BYTES]):
                self.message(text, None)

    def message(self, text: str, label: Literal["up", "down"] | None) -> None:
        """A chunk."""
        if self._request_id is not None:
            body = self._without_secrets(text) if self._events.wants(EgressChunkEvent) else ""
            self._events.emit(EgressChunkEvent(request_id=self._request_id, body=body, label=label))

    def _shown(self, headers: Headers) -> dict[str, str]:
        return {name: self._without_secrets(value) for name, value in joined(headers).items()}

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, REDACTED)
        return text
