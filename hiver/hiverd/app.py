"""`hiver serve`: the composition root. It imports little, since what it imports delays the first answer."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Awaitable, Callable

import msgspec
import uvloop

from hiverd.contracts.errors import HiverError, UnavailableError
from hiverd.logs import configure_logging
from hiverd.services import Services, say
from hiverd.settings import Settings


def run(settings: Settings) -> int:
    """`hiver serve`. Returns the exit code: 0 after a clean stop, 1 when it could not start."""
    configure_logging(settings.server.log_level, settings.server.log_format)
    try:
        return uvloop.run(_serve(settings))
    except HiverError as error:
        say(f"hiver: {error.message}")
        return 1


async def _serve(settings: Settings) -> int:
    listener = _listen(settings.server.host, settings.server.port)
    # From here on everything knows the true port, also if the kernel chose it: requests are told from web pages' by
    # it, and no sandbox may dial it.
    server = msgspec.structs.replace(settings.server, port=listener.getsockname()[1])
    settings = msgspec.structs.replace(settings, server=server)
    services = Services(settings)
    # The trial of the runtime waits for other processes while Litestar is being imported.
    importing = asyncio.get_running_loop().run_in_executor(None, _import_serve)
    try:
        await services.start()
    finally:
        serve = await importing
    # What is there now stays: the collector, whose full runs over it would be felt as pauses, need not look at it.
    gc.freeze()
    try:
        return 0 if await serve(services, listener) else 1
    finally:
        await services.stop()


def _import_serve() -> Callable[[Services, socket.socket], Awaitable[bool]]:
    from hiverd.web import serve  # noqa: PLC0415 -- half of all the imports, made while something else waits

    return serve


def _listen(host: str, port: int) -> socket.socket:
    """Before anything else is started: a server that cannot be reached must not touch sandboxes."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UnavailableError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another with --host or --port"
        ) from error
    return listener
