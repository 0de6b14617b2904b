"""Reading and applying a configuration (PROTOCOL 3.9, 4)."""

from __future__ import annotations

import asyncio
from typing import Any

from contract.scenarios.context import Context
from contract.scenarios.registry import scenario

SINCE_EXTRA_HOSTS = (0, 1, 16)
SINCE_FRACTIONS = (0, 1, 20)
SINCE_FILTERS = (0, 1, 40)


def local(context: Context, mount: str) -> Any:
    return context.hiver.LocalFileSystem(backend="local", mount=mount)


@scenario()
async def the_configuration_reads_back(context: Context) -> None:
    sandbox = await context.create(
        env={"A": "1"}, ttl=900, memory=256, fs=[local(context, "/workspace"), local(context, "/data")]
    )
    config = await sandbox.get_config()
    assert config.env == {"A": "1"}
    assert config.ttl == 900
    assert config.memory == 256
    assert config.cpu is None, "defaults are not filled in"
    assert [mount.mount for mount in config.fs] == ["/workspace", "/data"]
    acls = [(rule.path, rule.access) for mount in config.fs for rule in mount.acls]
    assert acls == [("/workspace/**", "rw"), ("/data/**", "rw")]


@scenario()
async def the_workspace_is_there_without_asking(context: Context) -> None:
    sandbox = await context.create()
    config = await sandbox.get_config()
    assert [mount.mount for mount in config.fs] == ["/workspace"]
    assert (await sandbox.exec("echo x > f && cat f", cwd="/workspace"))["stdout"] == "x\n"


@scenario(since=SINCE_FRACTIONS)
async def fractions_and_lists_read_back(context: Context) -> None:
    sandbox = await context.create(cpu=0.5, entrypoint=["sleep", "infinity"])
    config = await sandbox.get_config()
    assert config.cpu == 0.5
    assert config.entrypoint == ["sleep", "infinity"]


@scenario(until=(0, 1, 18))
async def new_settings_do_not_break_old_clients(context: Context) -> None:
    """Releases before 0.1.20 parse whole processors and string entrypoints only (PROTOCOL 4.1)."""
    key = context.new_key()
    async with context.http() as http:
        body = {"cpu": 1.5, "entrypoint": ["sleep", "infinity"]}
        assert (await http.post(f"/v1/sandboxes/{key}", json=body)).status_code == 201
    config = await (await context.create(key)).get_config()
    assert config.cpu == 2
    assert config.entrypoint == "sleep infinity"


@scenario()
async def applying_the_same_changes_nothing(context: Context) -> None:
    sandbox = await context.create()
    config = await sandbox.get_config()
    result = await sandbox.apply_config(config)
    assert result.applied
    assert result.error is None
    assert result.changes.fs is None
    assert result.changes.egress is None
    assert not result.changes.warnings
    assert await sandbox.get_config() == config


@scenario()
async def egress_rules_are_compared(context: Context) -> None:
    rule = context.hiver.EgressRule
    kept, dropped = rule(access="allow", host="kept.example"), rule(access="deny", host="dropped.example")
    added = rule(access="allow", host="added.example", methods=["GET"], paths=["/x/*"])
    sandbox = await context.create(egress=[kept, dropped])
    config = await sandbox.get_config()
    result = await sandbox.apply_config(config.model_copy(update={"egress": [added, kept]}))
    assert result.applied
    assert [found.host for found in result.changes.egress.added] == ["added.example"]
    assert [found.host for found in result.changes.egress.removed] == ["dropped.example"]
    assert [found.host for found in result.config.egress] == ["added.example", "kept.example"]
    assert (await sandbox.get_config()).egress[0].paths == ["/x/*"]
    swapped = await sandbox.apply_config(config.model_copy(update={"egress": [kept, added]}))
    assert swapped.changes.egress is None, "a new order is no change"
    assert [found.host for found in swapped.config.egress] == ["kept.example", "added.example"]


@scenario()
async def mounts_come_and_go(context: Context) -> None:
    sandbox = await context.create()
    config = await sandbox.get_config()
    await context.write(sandbox, "/workspace/kept.txt", "kept")
    more = [*config.fs, local(context, "/extra")]
    result = await sandbox.apply_config(config.model_copy(update={"fs": more}))
    assert result.applied, result.error
    assert [mount.mount for mount in result.changes.fs.added] == ["/extra"]
    assert result.changes.fs.removed is None
    made = await sandbox.exec("echo x > /extra/f && cat /extra/f /workspace/kept.txt")
    assert made["stdout"] == "x\nkept", made
    back = await sandbox.apply_config(config)
    assert [mount.mount for mount in back.changes.fs.removed] == ["/extra"]
    assert (await sandbox.exec("cat /extra/f"))["exit_code"] != 0
    assert await context.read(sandbox, "/workspace/kept.txt") == b"kept"


@scenario()
async def what_cannot_change_is_kept_with_a_warning(context: Context) -> None:
    sandbox = await context.create(env={"A": "1"}, memory=256)
    config = await sandbox.get_config()
    wanted = config.model_copy(update={"env": {"A": "2"}, "memory": 512, "cpu": 2, "ttl": 1234})
    result = await sandbox.apply_config(wanted)
    assert result.applied
    assert result.config.env == {"A": "1"}
    assert result.config.memory == 256
    assert result.config.ttl == 1234
    warnings = " ".join(result.changes.warnings)
    for name in ("env", "memory", "cpu"):
        assert name in warnings, warnings
    assert "ttl" not in warnings
    assert (await sandbox.exec("echo $A"))["stdout"] == "1\n"


@scenario(since=SINCE_FILTERS)
async def the_events_filter_applies(context: Context) -> None:
    sandbox = await context.create(events=["stdio"])
    async with context.events(sandbox) as log:
        await sandbox.exec("echo one")
        first = await log.wait_for(lambda event: event.type == "stdio", what="stdio")
        config = await sandbox.get_config()
        assert config.events == ["stdio"]
        applied = await sandbox.apply_config(config.model_copy(update={"events": ["exec.request", "exec.response"]}))
        assert applied.applied
        await sandbox.exec("echo two")
        last = await log.wait_for(lambda event: event.type == "exec.response", what="exec.response")
    assert [event.type for event in log.events] == ["stdio", "exec.request", "exec.response"]
    assert first.id > 2, "excluded events consume ids"
    assert last.id > first.id + 2


@scenario(since=SINCE_EXTRA_HOSTS)
async def this_host_has_the_name_that_docker_gives_it(context: Context) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\nConnection: close\r\n\r\nreached\n")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as service:
        name = "host.docker.internal"
        rule = context.hiver.EgressRule(host=name, access="allow")
        sandbox = await context.create(extra_hosts=[f"{name}:host-gateway"], egress=[rule])
        assert (await sandbox.get_config()).extra_hosts == [f"{name}:host-gateway"]
        port = service.sockets[0].getsockname()[1]
        found = await sandbox.exec(f"curl -sS http://{name}:{port}/")
        assert found["stdout"] == "reached\n", found
