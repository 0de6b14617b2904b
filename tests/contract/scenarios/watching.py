"""A sandbox's event stream (PROTOCOL 3.14, 7)."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from contract.scenarios.context import Context, eventually
from contract.scenarios.registry import scenario


def _is(kind: str) -> Any:
    return lambda event: event.type == kind


def _answers(request: Any) -> Any:
    return lambda event: getattr(event, "request_id", None) == request.id


@scenario()
async def a_command_is_told_in_order(context: Context) -> None:
    sandbox = await context.create()
    async with context.events(sandbox) as log:
        await sandbox.exec("echo 'out é'; echo err >&2", cwd="/usr")
        await log.wait_for(_is("exec.response"), what="exec.response")
    [request] = log.of_type("exec.request")
    [response] = log.of_type("exec.response")
    assert request.cwd == "/usr"
    assert request.command == "echo 'out é'; echo err >&2"
    assert response.request_id == request.id
    lines = log.of_type("stdio")
    assert {(line.stdout, line.stderr) for line in lines} == {("out é\n", None), (None, "err\n")}
    assert all(request.id < line.id < response.id for line in lines)
    ids = [event.id for event in log.events]
    assert ids == sorted(set(ids))
    assert all(datetime.fromisoformat(event.timestamp).utcoffset() is not None for event in log.events)


@scenario()
async def a_stream_resumes_behind_an_id(context: Context) -> None:
    sandbox = await context.create()
    async with context.events(sandbox) as log:
        await sandbox.exec("echo one")
        last = await log.wait_for(_is("exec.response"), what="exec.response")
    await sandbox.exec("echo two")
    async with context.events(sandbox, after=last.id) as resumed:
        await resumed.wait_for(lambda event: event.type == "stdio" and event.stdout == "two\n", what="two")
    assert all(event.id > last.id for event in resumed.events)
    assert "one\n" not in [event.stdout for event in resumed.of_type("stdio")]


@scenario()
async def late_readers_get_what_happened_before(context: Context) -> None:
    sandbox = await context.create()
    for number in range(5):
        await sandbox.exec(f"echo {number}")
    async with context.events(sandbox) as log:
        await log.wait_for(lambda event: event.type == "stdio" and event.stdout == "4\n", what="the last line")
    printed = [event.stdout for event in log.of_type("stdio")]
    assert printed == [f"{number}\n" for number in range(5)]


@scenario(since=(0, 1, 36))
async def the_first_event_is_the_start(context: Context) -> None:
    sandbox = await context.create()
    async with context.events(sandbox) as log:
        first = await log.wait_for(lambda _: True, what="of any kind")
    assert first.type == "system.start"
    assert first.id == 1


@scenario(until=(0, 1, 35))
async def streams_hold_only_what_this_release_can_parse(context: Context) -> None:
    """One event of an unknown kind breaks this release's stream (PROTOCOL 7); it reconnects thrice at most. The old
    family is known by its routes, later releases by how they leave and come back."""
    sandbox = await context.create()
    config = await sandbox.get_config()
    async with context.events(sandbox) as log:
        await sandbox.apply_config(config.model_copy(update={"ttl": 777}))
        async with context.http() as http:
            await context.write(sandbox, "/workspace/f", "x")
            await http.delete(context.api(sandbox, "/file/workspace/f"))
        await sandbox.exec("echo still readable")
        await log.wait_for(lambda event: event.type == "stdio", what="stdio after the hazards")
    assert log.of_type("config.apply")
    assert not [event for event in log.events if event.type.startswith("system.")]


@scenario()
async def file_calls_are_events(context: Context) -> None:
    sandbox = await context.create()
    async with context.events(sandbox) as log:
        await context.write(sandbox, "/workspace/f", "x")
        await context.read(sandbox, "/workspace/f")
        read = await log.wait_for(lambda event: event.type == "fs.request" and event.operation == "read", what="read")
        await log.wait_for(_answers(read), what="its response")
    written = next(event for event in log.of_type("fs.request") if event.operation == "write")
    assert (written.access, written.mount, written.path) == ("allowed", "/workspace", "/workspace/f")
    [answer] = [event for event in log.of_type("fs.response") if event.request_id == written.id]
    assert answer.backend == "local"
    assert answer.error is None


@scenario()
async def an_apply_is_an_event(context: Context) -> None:
    sandbox = await context.create()
    config = await sandbox.get_config()
    rule = context.hiver.EgressRule(access="deny", host="told.example")
    async with context.events(sandbox) as log:
        await sandbox.apply_config(config.model_copy(update={"egress": [rule]}))
        applied = await log.wait_for(_is("config.apply"), what="config.apply")
        assert applied.success
        assert [found.host for found in applied.changes.egress.added] == ["told.example"]
        if context.reads_system_events:
            changed = await log.wait_for(_is("system.config-changed"), what="system.config-changed")
            assert changed.id > applied.id
            assert [found.host for found in changed.config.egress] == ["told.example"]


@scenario()
async def the_entrypoint_is_heard(context: Context) -> None:
    key = context.new_key()
    async with context.http() as http:
        body = {"entrypoint": ["sh", "-c", "while :; do echo from-the-entrypoint; sleep 1; done"]}
        assert (await http.post(f"/v1/sandboxes/{key}", json=body)).status_code == 201
    sandbox = await context.create(key)
    async with context.events(sandbox, after=1) as log:
        line = await log.wait_for(_is("stdio"), what="stdio of the entrypoint")
    assert line.stdout == "from-the-entrypoint\n"


@scenario(waits=True, seconds=60)
async def usage_is_sampled(context: Context) -> None:
    sandbox = await context.create()
    await sandbox.exec_stream("while :; do :; done")
    async with context.events(sandbox) as log:
        sample = await log.wait_for(
            lambda event: event.type == "resource.usage" and event.cpu_percent > 1, seconds=30, what="resource.usage"
        )
    assert sample.memory_bytes > 0


@scenario(waits=True, seconds=60)
async def an_expiry_is_told(context: Context) -> None:
    sandbox = await context.create(ttl=2)
    async with context.events(sandbox) as log:
        if context.reads_system_events:
            await log.wait_for(_is("system.shutdown"), seconds=30, what="system.shutdown")
        else:
            await _until_gone(context, sandbox.key)


async def _until_gone(context: Context, key: str) -> None:
    async def gone() -> bool:
        return await context.listed(key) is None

    await eventually(gone, seconds=30, what="the sandbox expires")
