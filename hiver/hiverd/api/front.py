"""The front door: an ASGI application before Litestar.

It keeps browsers out, tells the two route families apart (PROTOCOL 1.6), and sends proxied requests straight to the
gateway. Old-family requests are rewritten to the new form, so that everything behind sees one set of routes.
"""

from __future__ import annotations

from typing import Any, Final, Literal, Protocol, cast
from urllib.parse import quote, unquote

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

from hiverd.api.errors import error_body
from hiverd.api.guard import BrowserGuard
from hiverd.contracts.errors import HiverError, NotFoundError, UnavailableError
from hiverd.sandboxes.manager import Manager
from hiverd.sandboxes.sandbox import Sandbox

Family = Literal["old", "new"]
POD_EVENTS_PATH: Final = "/pod-events/"
"""Where `/sandbox/{id}/v1/events` is served: as a route of its own it would hide sandboxes whose key is `events`."""
FAMILY_KEY: Final = "hiver_family"
_PREFIX: Final = "/sandbox/"


class ProxyHandler(Protocol):
    """The gateway, spelled in plain ASGI terms."""

    async def __call__(
        self, scope: Any, receive: Any, send: Any, target: Sandbox, port_text: str, raw_path: bytes
    ) -> None: ...


class Front:
    def __init__(self, app: ASGIApp, manager: Manager, gateway: ProxyHandler, guard: BrowserGuard) -> None:
        self._app = app
        self._manager = manager
        self._gateway = gateway
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            routed = self._route(scope)
        except HiverError as error:
            await refuse(scope, receive, send, error)
            return
        if isinstance(routed, tuple):
            sandbox, port_text, raw_path = routed
            if not sandbox.ready:
                not_ready = UnavailableError(f'sandbox "{sandbox.key}" is {sandbox.status}, not running')
                await refuse(scope, receive, send, not_ready)
                return
            await self._gateway(scope, receive, send, sandbox, port_text, raw_path)
        else:
            await self._app(routed, receive, send)

    def _route(self, scope: Scope) -> Scope | tuple[Sandbox, str, bytes]:
        """The scope for the API, or what to hand to the gateway."""
        raw_path: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
        if not raw_path.startswith(_PREFIX.encode()):
            self._guard.check(scope)
            return scope
        # /sandbox/{X}/v1/{rest}
        parts = raw_path.split(b"/", 4)
        if len(parts) < 4 or parts[3] != b"v1":
            self._guard.check(scope)
            raise NotFoundError(f"no such route: {scope['path']}")
        rest = parts[4] if len(parts) > 4 else b""
        name = unquote(parts[2].decode("ascii", "replace"))
        sandbox = self._manager.by_id(name)
        if sandbox is not None:
            return self._route_new(scope, sandbox, rest)
        sandbox = self._manager.by_key(name)
        if sandbox is not None:
            return self._route_old(scope, sandbox, rest)
        self._guard.check(scope)
        raise NotFoundError(f"no sandbox {_named(name, rest)} is known here")

    def _route_new(self, scope: Scope, sandbox: Sandbox, rest: bytes) -> Scope | tuple[Sandbox, str, bytes]:
        key, _, operation = rest.partition(b"/")
        if unquote(key.decode("ascii", "replace")) == sandbox.key and operation.startswith(b"proxy/"):
            return (sandbox, *_proxy_target(operation))
        self._guard.check(scope)
        if rest == b"events" and scope.get("method") in {"GET", "HEAD"}:
            path = POD_EVENTS_PATH + sandbox.id
            return cast("Scope", {**scope, "path": path, "raw_path": path.encode()})
        if key and unquote(key.decode("ascii", "replace")) != sandbox.key:
            raise NotFoundError(f'no sandbox "{unquote(key.decode("ascii", "replace"))}" has the id {sandbox.id}')
        return scope

    def _route_old(self, scope: Scope, sandbox: Sandbox, operation: bytes) -> Scope | tuple[Sandbox, str, bytes]:
        if operation.startswith(b"proxy/"):
            return (sandbox, *_proxy_target(operation))
        self._guard.check(scope)
        if operation.startswith(b"file/"):
            # Old clients put paths in the query. A path like this one is of the new form with an unknown id, and a
            # rule that opens it for a sandbox with the key `file` must not open the files of every other sandbox.
            raise NotFoundError(f"no sandbox has the id {sandbox.key}")
        prefix = f"/sandbox/{sandbox.id}/v1/{quote(sandbox.key)}/".encode()
        state = {**scope.get("state", {}), FAMILY_KEY: "old"}
        raw_path = prefix + operation
        rewritten = {**scope, "raw_path": raw_path, "path": unquote(raw_path.decode()), "state": state}
        return cast("Scope", rewritten)


def family_of(scope: Scope) -> Family:
    """Which client generation speaks: old ones get answers and events that they can parse (PROTOCOL 7)."""
    return "old" if scope.get("state", {}).get(FAMILY_KEY) == "old" else "new"


def _named(name: str, rest: bytes) -> str:
    """What a request for nothing that we know calls it: by id and key, or by key alone."""
    key = unquote(rest.partition(b"/")[0].decode("ascii", "replace"))
    return f'"{key}" with the id {name}' if key else f'"{name}"'


def _proxy_target(operation: bytes) -> tuple[str, bytes]:
    """`proxy/{port}/{path}` as (port, raw path). Without a trailing slash the path is `/`."""
    _, port, *path = operation.split(b"/", 2)
    return port.decode("ascii", "replace"), b"/" + (path[0] if path else b"")


async def refuse(scope: Scope, receive: Receive, send: Send, error: HiverError) -> None:
    """Answers with an error outside Litestar; a WebSocket is refused before its handshake."""
    status, body = error_body(error)
    if scope["type"] == ScopeType.WEBSOCKET:
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": error.message[:120]})
        return
    headers = [
        (b"content-type", b"application/json; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
