"""The HTTP side of the server: the routes, and uvicorn around them."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from litestar import Litestar
from litestar.di import Provide
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin

from hiverd import __version__
from hiverd.api.errors import handle_error
from hiverd.api.events import EventsController
from hiverd.api.execs import ExecController
from hiverd.api.files import FilesController
from hiverd.api.front import Front
from hiverd.api.guard import BrowserGuard
from hiverd.api.parsers import ParserWatch
from hiverd.api.running import RunningController, provide_any_sandbox, provide_sandbox
from hiverd.api.sandboxes import ControllerRoutes, CreateController, PodController, pod_events
from hiverd.api.snapshots import SnapshotsController
from hiverd.api.streams import close_all_streams
from hiverd.api.transfers import DirectProtocol
from hiverd.services import Services, say

KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep an idle connection (httpx: 5 s), so that it is they who close: a request on a connection
that the server closes at that moment would be lost."""


async def serve(services: Services, listener: socket.socket) -> bool:
    """Until a signal asks to stop; False if it could not start."""
    settings = services.settings
    server = _Server(
        uvicorn.Config(
            build_asgi(services),
            host=settings.server.host,
            port=settings.server.port,
            http=DirectProtocol,
            ws="wsproto",
            interface="asgi3",
            lifespan="off",
            # What clients claim in X-Forwarded-For is theirs to claim; frames and pings pass as they are.
            proxy_headers=False,
            ws_per_message_deflate=False,
            ws_ping_interval=None,
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=int(settings.server.shutdown_timeout_seconds),
            backlog=4096,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
    )
    await server.serve(sockets=[listener])
    return server.started


def build_asgi(services: Services) -> Front:
    """The whole HTTP side of the server."""
    shared: dict[str, Any] = {
        "manager": services.manager,
        "planner": services.planner,
        "applier": services.applier,
        "execs": services.execs,
        "isolation": services.isolation,
        "files": services.files,
        "snapshots": services.snapshots,
        "parsers": ParserWatch(),
        "snapshot_stores": services.snapshot_stores,
        "keepalive_seconds": services.settings.exec.keepalive_seconds,
    }
    dependencies = {name: Provide(_constant(value), sync_to_thread=False) for name, value in shared.items()}
    dependencies["any_sandbox"] = Provide(provide_any_sandbox, sync_to_thread=False)
    dependencies["sandbox"] = Provide(provide_sandbox, sync_to_thread=False)
    app = Litestar(
        route_handlers=[
            CreateController,
            ControllerRoutes,
            PodController,
            pod_events,
            RunningController,
            ExecController,
            EventsController,
            FilesController,
            SnapshotsController,
        ],
        dependencies=dependencies,
        exception_handlers={Exception: handle_error},
        request_max_body_size=services.settings.server.max_request_body_bytes,
        openapi_config=OpenAPIConfig(
            title="Hiver server", version=__version__, path="/schema", render_plugins=[JsonRenderPlugin()]
        ),
        logging_config=None,
    )
    guard = BrowserGuard(services.settings.server.allowed_hosts, services.settings.server.allowed_origins)
    return Front(app, services.manager, services.gateway, guard)


def _constant(value: Any) -> Any:
    return lambda: value


class _Server(uvicorn.Server):
    """Says when it is ready, and ends open streams before it waits for connections to close."""

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            for sock in sockets or ():
                host, port = sock.getsockname()[:2]
                say(f"hiver {__version__} is ready on http://{f'[{host}]' if ':' in host else host}:{port}")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike the base class, does not raise the signals again at the end: what follows must still run."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._asked_to_stop, number)
        try:
            yield
        finally:
            # From here on a second Ctrl-C ends the process at once; the next start cleans up.
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _asked_to_stop(self, number: int) -> None:
        say(f"hiver: stopping ({signal.Signals(number).name})")
        self.handle_exit(number, None)

    async def shutdown(self, sockets: Any = None) -> None:
        await close_all_streams()
        await super().shutdown(sockets)
