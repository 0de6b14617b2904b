"""Creating, finding, watching and removing sandboxes (PROTOCOL 3.1 to 3.8, 8)."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from typing import Any

from contract.scenarios.context import Context, eventually
from contract.scenarios.registry import scenario


@scenario()
async def creates_a_ready_sandbox(context: Context) -> None:
    key = context.new_key()
    sandbox = await context.create(key)
    assert sandbox.key == key
    assert str(uuid.UUID(sandbox.id)) == sandbox.id
    await sandbox.ping()
    assert (await sandbox.exec("echo ready"))["stdout"] == "ready\n"


@scenario()
async def same_key_gives_the_same_sandbox(context: Context) -> None:
    key = context.new_key()
    first = await context.create(key, env={"COLOUR": "blue"})
    second = await context.create(key, env={"COLOUR": "red"})
    assert second.id == first.id
    assert (await second.exec("echo $COLOUR"))["stdout"] == "blue\n"


@scenario()
async def racing_creates_give_one_sandbox(context: Context) -> None:
    key = context.new_key()
    sandboxes = await asyncio.gather(*(context.create(key) for _ in range(8)))
    assert len({sandbox.id for sandbox in sandboxes}) == 1
    everyone = await context.hiver.list_sandboxes(gateway_url=context.gateway_url)
    assert [sandbox.key for sandbox in everyone].count(key) == 1
    for handle in everyone:
        await handle.aclose()


@scenario()
async def list_gives_working_handles(context: Context) -> None:
    sandbox = await context.create()
    listed = await context.listed(sandbox.key)
    assert listed is not None
    assert listed.id == sandbox.id
    assert (await listed.exec("echo listed"))["stdout"] == "listed\n"


@scenario()
async def shutdown_removes_the_sandbox(context: Context) -> None:
    sandbox = await context.create()
    await context.shutdown(sandbox)

    async def gone() -> bool:
        try:
            await sandbox.ping()
        except context.hiver.SandboxError as error:
            return bool(error.status == 404)
        return False

    await eventually(gone, seconds=30, what="ping answers 404")
    assert await context.listed(sandbox.key) is None
    error = await context.error_of(context.shutdown(sandbox))
    assert error.status == 404
    assert sandbox.key in str(error)


@scenario(waits=True, seconds=90)
async def shutdown_waits_for_a_stubborn_workload(context: Context) -> None:
    """A workload that ignores SIGTERM gets its grace (PROTOCOL 0.16); the client's own time limit is shorter."""
    key = context.new_key()
    async with context.http() as http:
        body = {"entrypoint": ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]}
        assert (await http.post(f"/v1/sandboxes/{key}", json=body)).status_code == 201
    sandbox = await context.create(key)
    await sandbox.exec("true")
    await context.shutdown(sandbox)
    assert await context.listed(key) is None


@scenario()
async def a_key_can_be_used_again(context: Context) -> None:
    key = context.new_key()
    first = await context.create(key)
    await context.write(first, "/workspace/old.txt", "old")
    await context.shutdown(first)
    second = await context.create(key)
    assert second.id != first.id
    assert await second.list_directory("/workspace") == []


@scenario()
async def errors_carry_status_text_and_body(context: Context) -> None:
    sandbox = await context.create()
    await context.shutdown(sandbox)

    async def gone() -> bool:
        return await context.listed(sandbox.key) is None

    await eventually(gone, seconds=30, what="the sandbox leaves the list")
    error = await context.error_of(sandbox.exec("true"))
    assert error.status == 404
    assert error.operation == "exec"
    assert isinstance(error.body, dict)
    assert error.body["error"]
    assert sandbox.key in error.body["error"]
    for call in (sandbox.get_config(), sandbox.get_ports(), sandbox.list_directory("/"), sandbox.ping()):
        assert (await context.error_of(call)).status == 404


@scenario()
async def an_unknown_image_is_a_clear_error(context: Context) -> None:
    error = await context.error_of(context.create(image="no-such-image-anywhere"))
    assert 400 <= error.status < 500, error.status
    assert "no-such-image-anywhere" in str(error)


@scenario()
async def an_entrypoint_that_ends_at_once_fails_the_create(context: Context) -> None:
    # On a busy machine even this program may outlive the moment that the server waits for it.
    status = None
    for _ in range(5):
        key = context.new_key()
        with contextlib.suppress(AssertionError):
            error = await context.error_of(context.create(key, entrypoint="/bin/false"))
            status = error.status
        if status == 500:
            break
    assert status == 500
    assert str(error).strip()

    async def gone() -> bool:
        return await context.listed(key) is None

    await eventually(gone, seconds=30, what="nothing is left of the failed create")


@scenario()
async def info_names_the_isolation(context: Context) -> None:
    sandbox = await context.create()
    if context.old_family:
        return
    assert (await sandbox.get_info()).isolation in {"container", "microvm"}


@scenario()
async def ports_are_those_in_use(context: Context) -> None:
    sandbox = await context.create()
    assert await sandbox.get_ports() == []
    await sandbox.exec_stream("python3 -m http.server 8123 --bind 127.0.0.1")

    async def listening() -> bool:
        return 8123 in await sandbox.get_ports()

    await eventually(listening, seconds=15, what="port 8123 is listed")


class _Watch:
    """A lifecycle stream read in the background."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.events: list[dict[str, Any]] = []
        self.task = asyncio.create_task(self._collect(), name="watch")

    async def _collect(self) -> None:
        async for event in self._context.controller.watch_sandbox_events(gateway_url=self._context.gateway_url):
            self.events.append(event)

    def seen(self, key: str) -> list[tuple[str, str]]:
        return [(event["status"], event["id"]) for event in self.events if event["key"] == key]

    async def wait_for(self, key: str, status: str, *, seconds: float = 30) -> None:
        async def there() -> bool:
            assert not self.task.done(), f"the lifecycle stream ended: {self.task}"
            return any(found == status for found, _ in self.seen(key))

        await eventually(there, seconds=seconds, what=f"lifecycle event {status} of {key}")

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@scenario(seconds=90)
async def lifecycle_stream_tells_each_sandbox_apart(context: Context) -> None:
    neighbour = await context.create()
    watch = _Watch(context)
    try:
        await watch.wait_for(neighbour.key, "start")
        sandbox = await context.create()
        await watch.wait_for(sandbox.key, "start")
        await context.shutdown(sandbox)
        await watch.wait_for(sandbox.key, "destroy")
    finally:
        await watch.close()
    statuses = [status for status, _ in watch.seen(sandbox.key)]
    assert statuses[0] == "start"
    assert statuses[-2:] == ["stop", "destroy"], statuses
    assert {found for _, found in watch.seen(sandbox.key)} == {sandbox.id}
    assert {status for status, _ in watch.seen(neighbour.key)} == {"start"}


@scenario(waits=True, seconds=60)
async def lifecycle_stream_outlives_silence(context: Context) -> None:
    """The client gives up after 5 s without a byte, so the server must send comments (PROTOCOL 0.7)."""
    watch = _Watch(context)
    try:
        done, _ = await asyncio.wait({watch.task}, timeout=7)
        assert not done, f"the stream ended in silence: {watch.task}"
        sandbox = await context.create()
        await watch.wait_for(sandbox.key, "start")
    finally:
        await watch.close()


@scenario(waits=True, seconds=60)
async def an_idle_sandbox_expires(context: Context) -> None:
    sandbox = await context.create(ttl=1)

    async def gone() -> bool:
        return await context.listed(sandbox.key) is None

    await eventually(gone, seconds=30, what="the sandbox expires")
    assert (await context.error_of(sandbox.ping())).status == 404


@scenario(waits=True, seconds=60)
async def pings_keep_a_sandbox_alive(context: Context) -> None:
    sandbox = await context.create(ttl=2)
    end_monotonic = time.monotonic() + 5
    while time.monotonic() < end_monotonic:
        await sandbox.ping()
        await asyncio.sleep(0.4)
    assert await context.listed(sandbox.key) is not None
