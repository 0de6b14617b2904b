"""Create, list, lifecycle stream, shutdown: what is not addressed to one running sandbox (PROTOCOL 3.1 to 3.5)."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator

import msgspec
from litestar import Controller, Response, delete, get, post, put
from litestar.openapi.spec import Operation
from litestar.params import FromPath
from litestar.status_codes import HTTP_200_OK, HTTP_204_NO_CONTENT
from litestar.types import ASGIApp

from hiverd.api.bodies import judged
from hiverd.api.documents import describe, json_body
from hiverd.api.front import POD_EVENTS_PATH
from hiverd.api.injected import AnyRequest, TheKeepalive, TheManager, ThePlanner
from hiverd.api.streams import SSE_COMMENT, SSE_HEARTBEAT_SECONDS, EventStream, HeldJson
from hiverd.contracts.errors import InvalidError, NotFoundError
from hiverd.sandboxes.manager import Manager
from hiverd.sandboxes.mounts import MountPlanner
from hiverd.sandboxes.sandbox import Sandbox
from hiverd.wire.answers import LifecycleEvent, PodInfo, PodSandbox, SandboxRef
from hiverd.wire.config import SandboxConfig, decode_config, validate_config, with_defaults
from hiverd.wire.environment import with_environment
from hiverd.wire.keys import check_key


def requested_config(raw: bytes, image_header: str | None) -> SandboxConfig:
    """A create's configuration: checked, defaults filled in, the image from the header if the body names none."""
    config = decode_config(raw)
    if config.image is None and image_header:
        config = msgspec.structs.replace(config, image=image_header)
    config = with_defaults(config)
    validate_config(with_environment(config, os.environ))
    return config


def reference(sandbox: Sandbox) -> SandboxRef:
    return SandboxRef(sandbox.id, sandbox.key, sandbox.status)


async def _create(request: AnyRequest, key: str, manager: Manager, planner: MountPlanner) -> ASGIApp:
    check_key(key)
    raw = await request.body()
    image = request.headers.get("x-hiver-image")
    if image is not None and len(image) > 512:
        raise InvalidError("x-hiver-image: must be at most 512 characters", field="x-hiver-image")

    async def read_config() -> SandboxConfig:
        config = await judged(raw, lambda body: requested_config(body, image))
        await planner.judge(config)
        return config

    sandbox, created = await manager.get_or_create(key, read_config)
    response: Response[SandboxRef] = Response(
        reference(sandbox),
        status_code=201 if created else 200,
        headers={"x-hiver-sandbox-id": sandbox.id, "x-hiver-sandbox-key": sandbox.key},
    )
    return response.to_asgi_response(app=None, request=request)


class CreateController(Controller):
    tags = ("sandboxes",)

    @post(
        "/v1/sandboxes/{key:str}",
        operation_class=json_body(SandboxConfig),
        responses=describe({200: "The sandbox existed", 201: "It was created and runs", 409: "Shut down meanwhile"}),
        summary="Get or create a sandbox",
    )
    async def create(
        self,
        request: AnyRequest,
        key: FromPath[str],
        manager: TheManager,
        planner: ThePlanner,
    ) -> ASGIApp:
        """Clients from 0.1.20 on. Answers once the sandbox is ready."""
        return await _create(request, key, manager, planner)

    @put(
        "/controller/v1/sandboxes/{key:str}",
        operation_class=json_body(SandboxConfig),
        responses=describe({200: "The sandbox existed", 201: "It was created and runs", 409: "Shut down meanwhile"}),
        summary="Get or create a sandbox (clients up to 0.1.18)",
    )
    async def create_old(
        self,
        request: AnyRequest,
        key: FromPath[str],
        manager: TheManager,
        planner: ThePlanner,
    ) -> ASGIApp:
        return await _create(request, key, manager, planner)


class ControllerRoutes(Controller):
    path = "/controller/v1"
    tags = ("sandboxes",)

    @get("/sandboxes", summary="List all sandboxes")
    async def list_sandboxes(self, manager: TheManager) -> list[SandboxRef]:
        return [reference(sandbox) for sandbox in manager.all()]

    @get("/sandboxes/events", summary="Stream lifecycle changes of all sandboxes", operation_class=Operation)
    async def watch(self, manager: TheManager) -> ASGIApp:
        return EventStream(_lifecycle_frames(manager))

    @post("/shutdown/{key:str}", status_code=HTTP_204_NO_CONTENT, summary="Shut a sandbox down (clients up to 0.1.18)")
    async def shutdown_old(self, key: FromPath[str], manager: TheManager) -> None:
        """Answers when the sandbox is gone."""
        sandbox = manager.by_key(key)
        if sandbox is None:
            raise NotFoundError(f'no sandbox "{key}" is known here')
        await manager.shutdown(sandbox, tell=True)


async def _lifecycle_frames(manager: Manager) -> AsyncGenerator[bytes, None]:
    async for event in manager.lifecycle.subscribe(manager.running_now(), SSE_HEARTBEAT_SECONDS):
        yield SSE_COMMENT if event is None else b"data: %s\n\n" % msgspec.json.encode(event)


class PodController(Controller):
    """One sandbox per id here, so the "pod" of an id holds exactly one key (PROTOCOL 3.4)."""

    path = "/sandbox/{sandbox_ref:str}/v1"
    tags = ("sandboxes",)

    @get("/", summary="The sandboxes under an id")
    async def show(self, sandbox_ref: FromPath[str], manager: TheManager) -> PodInfo:
        sandbox = _by_id(manager, sandbox_ref)
        return PodInfo((PodSandbox(sandbox.key, sandbox.ready, sandbox.status),))

    @delete("/{key:str}", status_code=HTTP_200_OK, summary="Shut a sandbox down")
    async def shutdown(
        self, sandbox_ref: FromPath[str], key: FromPath[str], manager: TheManager, keepalive_seconds: TheKeepalive
    ) -> ASGIApp:
        """204 when it is gone within a second; else 200, held open, with the key in the body when it is."""
        sandbox = _by_id(manager, sandbox_ref)
        if sandbox.key != key:
            raise NotFoundError(f'no sandbox "{key}" is known here')

        async def work() -> dict[str, str]:
            await manager.shutdown(sandbox, tell=True)
            return {"id": sandbox.id, "key": sandbox.key, "status": "destroyed"}

        return HeldJson(
            work(),
            prompt_status=204,
            cancel_on_disconnect=False,
            keepalive_seconds=keepalive_seconds,
            name=f"delete-{key}",
        )


@get(POD_EVENTS_PATH + "{sandbox_ref:str}", include_in_schema=False)
async def pod_events(sandbox_ref: FromPath[str], manager: TheManager) -> ASGIApp:
    """The lifecycle changes under an id."""
    return EventStream(_pod_frames(manager, _by_id(manager, sandbox_ref)))


async def _pod_frames(manager: Manager, sandbox: Sandbox) -> AsyncGenerator[bytes, None]:
    now = [LifecycleEvent(sandbox.id, sandbox.key, "start")] if sandbox.status == "running" else []
    async for event in manager.lifecycle.subscribe(now, SSE_HEARTBEAT_SECONDS):
        if event is None:
            yield SSE_COMMENT
        elif event.id == sandbox.id:
            yield b"data: %s\n\n" % msgspec.json.encode(event)
            if event.status == "destroy":
                return


def _by_id(manager: Manager, sandbox_id: str) -> Sandbox:
    sandbox = manager.by_id(sandbox_id)
    if sandbox is None:
        raise NotFoundError(f'no sandbox "{sandbox_id}" is known here')
    return sandbox
