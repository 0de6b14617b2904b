"""Tells clients that cannot parse newer events from those that can (PROTOCOL 7, compat hazards).

Releases up to 0.1.35 fail on an event of a kind that they do not know, and for those from 0.1.20 on nothing in a
request says so. But they fail in a way of their own: the connection closes as soon as the event has arrived, and 0.2 s
later (0.4, 0.8 for the next tries) the client comes back for what follows the last event that it could read. A client
that reads everything comes back, if at all, for what follows the newer event. So the second connection is recognised,
and gets only what every release can parse. The client itself loses nothing that it could have shown.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Final

FAILED_WITHIN_SECONDS: Final = 3.0
"""From sending the event to the connection's end: the way to the client and back, on a busy machine."""
BACK_AFTER_SECONDS: Final = (0.1, 6.0)
_REMEMBERED: Final = 1000


def is_new_kind(event: dict[str, object]) -> bool:
    """Whether some release up to 0.1.35 cannot parse the event."""
    kind = str(event["type"])
    return kind.startswith("system.") or kind == "ingress.chunk" or event.get("operation") == "delete"


class ParserWatch:
    """Remembers connections that ended right after an event of a new kind. One per server; bounded."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._failures: dict[tuple[str, int], float] = {}

    def is_old(self, sandbox_id: str, position: int) -> bool:
        """Whether a stream opened at `position` is an old client's next try."""
        failed_at = self._failures.pop((sandbox_id, position), None)
        if failed_at is None:
            return False
        earliest, latest = BACK_AFTER_SECONDS
        return earliest <= self._monotonic() - failed_at <= latest

    def connection(self, sandbox_id: str, position: int) -> ParserTrial:
        return ParserTrial(self, sandbox_id, position, self._monotonic)

    def failed(self, sandbox_id: str, position: int) -> None:
        self._failures[sandbox_id, position] = self._monotonic()
        while len(self._failures) > _REMEMBERED:
            self._failures.pop(next(iter(self._failures)))


class ParserTrial:
    """One connection: where it would resume if it failed at its first event of a new kind."""

    def __init__(self, watch: ParserWatch, sandbox_id: str, position: int, monotonic: Callable[[], float]) -> None:
        self._watch = watch
        self._sandbox_id = sandbox_id
        self._position = position
        self._monotonic = monotonic
        self._first_new_at: float | None = None

    def sent(self, event_id: int, body: bytes) -> None:
        """Called for each event before it is sent."""
        if self._first_new_at is None:
            if is_new_kind(json.loads(body)):
                self._first_new_at = self._monotonic()
            else:
                self._position = event_id

    def client_left(self) -> None:
        """The client ended the connection."""
        if self._first_new_at is not None and self._monotonic() - self._first_new_at <= FAILED_WITHIN_SECONDS:
            self._watch.failed(self._sandbox_id, self._position)
