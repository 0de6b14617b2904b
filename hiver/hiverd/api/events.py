"""The event stream of one sandbox (PROTOCOL 3.14, 7)."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Annotated, Final

from litestar import Controller, get
from litestar.params import FromQuery, QueryParameter
from litestar.types import ASGIApp

from hiverd.api.documents import describe
from hiverd.api.front import Family, family_of
from hiverd.api.injected import AnyRequest, TheSandbox
from hiverd.api.streams import SSE_COMMENT, SSE_HEARTBEAT_SECONDS, EventStream
from hiverd.contracts.errors import InvalidError
from hiverd.sandboxes.sandbox import Sandbox

LastEventId = Annotated[str | None, QueryParameter(name="lastEventId", description="Skip events up to it")]
_MAX_ID: Final = 2**63 - 1


class EventsController(Controller):
    path = "/sandbox/{sandbox_ref:str}/v1/{key:str}"
    tags = ("sandbox",)

    @get("/events", summary="Stream the sandbox's events", responses=describe())
    async def events(
        self,
        request: AnyRequest,
        sandbox: TheSandbox,
        last_event_id: LastEventId = None,
        follow: FromQuery[bool] = True,
    ) -> ASGIApp:
        """Everything kept after the given id, then what happens. `follow=false` ends after the replay."""
        position = _position(request.headers.get("last-event-id"), last_event_id)
        return EventStream(_frames(sandbox, position, follow=follow, family=family_of(request.scope)))


def _position(header: str | None, query: str | None) -> int:
    """The header wins, and is ignored when it cannot be read; the query must be a number."""
    if header is not None and _is_id(header.strip()):
        return int(header)
    if query is None or not query.strip():
        return 0
    if not _is_id(query.strip()):
        raise InvalidError(f"lastEventId: must be a whole number from 0, got {query[:40]!r}", field="lastEventId")
    return int(query)


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 19 and int(text) <= _MAX_ID


async def _frames(sandbox: Sandbox, position: int, *, follow: bool, family: Family) -> AsyncGenerator[bytes, None]:
    events = sandbox.events
    if not follow:
        await events.flushed()
    with events.reader():
        while True:
            page = await events.read_after(position)
            for event_id, body in page:
                position = event_id
                shown = body if family == "new" else for_old_clients(body)
                if shown is not None:
                    yield b"id: %d\ndata: %s\n\n" % (event_id, shown)
            if page:
                continue
            if not follow:
                return
            if await events.wait_beyond(position, SSE_HEARTBEAT_SECONDS):
                continue
            if events.closed:
                return
            yield SSE_COMMENT


def for_old_clients(body: bytes) -> bytes | None:
    """The event as clients up to 0.1.18 can parse it; None if they cannot (PROTOCOL 7, compat hazards)."""
    event = json.loads(body)
    kind = event["type"]
    if kind.startswith("system.") or kind == "ingress.chunk":
        return None
    if kind == "fs.request" and event["operation"] == "delete":
        event["operation"] = "write"
    elif kind == "fs.response" and event["backend"] not in {"local", "gdrive", "gcs", "external"}:
        return None
    else:
        return body
    return json.dumps(event, separators=(",", ":")).encode()
