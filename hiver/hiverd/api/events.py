"""The event stream of one sandbox (PROTOCOL 3.14, 7)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Final

from litestar import Controller, get
from litestar.params import FromQuery, QueryParameter
from litestar.types import ASGIApp

from hiverd.api.documents import describe
from hiverd.api.front import family_of
from hiverd.api.injected import AnyRequest, TheParsers, TheSandbox
from hiverd.api.parsers import ParserTrial
from hiverd.api.streams import SSE_COMMENT, SSE_HEARTBEAT_SECONDS, EventStream
from hiverd.contracts.errors import InvalidError
from hiverd.sandboxes.sandbox import Sandbox
from hiverd.state.journal import SandboxEvents

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
        parsers: TheParsers,
        last_event_id: LastEventId = None,
        follow: FromQuery[bool] = True,
    ) -> ASGIApp:
        """Everything kept after the given id, then what happens. `follow=false` ends after the replay."""
        position = _position(request.headers.get("last-event-id"), last_event_id)
        old = family_of(request.scope) == "old" or parsers.is_old(sandbox.id, position)
        trial = None if old else parsers.connection(sandbox.id, position)
        return EventStream(_frames(sandbox, position, follow=follow, trial=trial))


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


async def _frames(
    sandbox: Sandbox, position: int, *, follow: bool, trial: ParserTrial | None
) -> AsyncGenerator[bytes, None]:
    """`trial` None: for a client that cannot parse newer kinds of events."""
    try:
        async with aclosing(_pages(sandbox.events, position, follow=follow)) as pages:
            async for page in pages:
                yield _frames_of(page, trial) if page else SSE_COMMENT
    except (GeneratorExit, asyncio.CancelledError):
        if trial is not None:
            trial.client_left()
        raise


async def _pages(
    events: SandboxEvents, position: int, *, follow: bool
) -> AsyncGenerator[list[tuple[int, bytes]], None]:
    """Stored events after `position`, page by page; an empty page when nothing has happened for a while."""
    if not follow:
        await events.flushed()
    with events.reader():
        while True:
            page = await events.read_after(position)
            if page:
                position = page[-1][0]
                yield page
            elif not follow:
                return
            elif not await events.wait_beyond(position, SSE_HEARTBEAT_SECONDS):
                if events.closed:
                    return
                yield []


def _frames_of(page: list[tuple[int, bytes]], trial: ParserTrial | None) -> bytes:
    frames = []
    for event_id, body in page:
        if trial is not None:
            trial.sent(event_id, body)
        shown = for_old_clients(body) if trial is None else body
        if shown is not None:
            frames.append(b"id: %d\ndata: %s\n\n" % (event_id, shown))
    return b"".join(frames)


def for_old_clients(body: bytes) -> bytes | None:
    """The event as clients up to 0.1.18 can parse it; None if they cannot (PROTOCOL 7, compat hazards)."""
    event = json.loads(body)
    kind = event["type"]
    if kind.startswith("system.") or kind == "ingress.chunk":
        return None
    if event.get("operation") == "delete":
        event["operation"] = "write"
    elif kind == "fs.response" and event["backend"] not in {"local", "gdrive", "gcs", "external"}:
        return None
    else:
        return body
    return json.dumps(event, separators=(",", ":")).encode()
