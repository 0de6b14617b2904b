"""Routes of one running sandbox besides files: ping, ports, info, config, snapshot (PROTOCOL 3.6 to 3.9, 3.15)."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from litestar import Controller, Response, get, post, put
from litestar.params import FromPath, FromQuery
from litestar.types import ASGIApp

from hiverd.api.bodies import judged
from hiverd.api.documents import describe, json_body
from hiverd.api.front import family_of
from hiverd.api.injected import AnyRequest, TheApplier, TheIsolation, TheKeepalive, TheManager, TheSandbox, TheSnapshots
from hiverd.api.streams import HeldJson
from hiverd.contracts.errors import NotFoundError, UnavailableError
from hiverd.sandboxes.sandbox import Sandbox
from hiverd.wire.answers import ApplyResult, SandboxInfo
from hiverd.wire.config import SandboxConfig, config_to_wire, decode_config, validate_config, with_defaults
from hiverd.wire.environment import with_environment
from hiverd.wire.requests import SnapshotRequest, decode_snapshot


def provide_any_sandbox(sandbox_ref: FromPath[str], key: FromPath[str], manager: TheManager) -> Sandbox:
    """The sandbox in the path, in whatever state; a sign of life (PROTOCOL 8)."""
    sandbox = manager.by_id(sandbox_ref)
    if sandbox is None or sandbox.key != key:
        raise NotFoundError(f'no sandbox "{key}" is known here')
    sandbox.touch()
    return sandbox


def provide_sandbox(any_sandbox: TheSandbox) -> Sandbox:
    """The sandbox in the path, running."""
    if not any_sandbox.ready:
        raise UnavailableError(f'sandbox "{any_sandbox.key}" is {any_sandbox.status}, not running')
    return any_sandbox


def _desired_config(raw: bytes) -> SandboxConfig:
    desired = with_defaults(decode_config(raw))
    validate_config(with_environment(desired, os.environ))
    return desired


class RunningController(Controller):
    path = "/sandbox/{sandbox_ref:str}/v1/{key:str}"
    tags = ("sandbox",)

    @get("/ping", summary="Keep the sandbox alive", responses=describe({200: "It is ready"}))
    async def ping(self, any_sandbox: TheSandbox, block: FromQuery[bool] = False) -> Response[None]:
        """503 while it starts; `block=true` waits until it is ready."""
        if not any_sandbox.ready and block and any_sandbox.status == "starting":
            await asyncio.shield(any_sandbox.created)
        if not any_sandbox.ready:
            raise UnavailableError("sandbox not ready")
        return Response(None, status_code=200, media_type="text/plain")

    @get("/ports", summary="TCP ports: declared by the image, or listened on", responses=describe())
    async def ports(self, sandbox: TheSandbox) -> list[int]:
        declared = sandbox.spec.image.exposed_ports if sandbox.spec is not None else ()
        return sorted({*declared, *await sandbox.workload.listening_ports()})

    @get("/info", summary="The kind of isolation", responses=describe())
    async def info(self, sandbox: TheSandbox, isolation: TheIsolation) -> SandboxInfo:
        return SandboxInfo(isolation.kind)

    @get("/config", summary="The configuration in force", responses=describe())
    async def config(self, request: AnyRequest, sandbox: TheSandbox) -> dict[str, Any]:
        return config_to_wire(sandbox.config, family=family_of(request.scope))

    @put(
        "/config",
        summary="Apply a configuration",
        operation_class=json_body(SandboxConfig),
        responses=describe({200: "Applied, or rolled back with `error`", 409: "Another apply is in progress"}),
    )
    async def apply(
        self,
        request: AnyRequest,
        any_sandbox: TheSandbox,
        applier: TheApplier,
    ) -> ApplyResult:
        """All or nothing: when the answer says `applied`, it is in force."""
        desired = await judged(await request.body(), _desired_config)
        family = family_of(request.scope)
        outcome = await applier.apply(any_sandbox, desired, family)
        return ApplyResult(
            applied=outcome.error is None,
            config=config_to_wire(outcome.config, family=family),
            changes=outcome.changes,
            error=outcome.error,
        )

    @post("/snapshot", summary="Capture a snapshot", operation_class=json_body(SnapshotRequest), responses=describe())
    async def snapshot(
        self, request: AnyRequest, sandbox: TheSandbox, snapshots: TheSnapshots, keepalive_seconds: TheKeepalive
    ) -> ASGIApp:
        """The sandbox goes on meanwhile, but for a short pause. What takes longer than a second is answered with 200,
        and an error in the body."""
        decoded = decode_snapshot(await request.body())
        return HeldJson(
            snapshots.on_demand(sandbox, decoded),
            cancel_on_disconnect=False,
            keepalive_seconds=keepalive_seconds,
            name=f"snapshot-{sandbox.key}",
        )
