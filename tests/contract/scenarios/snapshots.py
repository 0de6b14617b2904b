"""Files that outlive their sandbox, in both forms (PROTOCOL 3.15, 3.16, 4.3)."""

from __future__ import annotations

import uuid

from contract.scenarios.context import Context
from contract.scenarios.registry import scenario


def _new_snapshot() -> str:
    return f"s-{uuid.uuid4().hex[:12]}"


@scenario(until=(0, 1, 18))
async def the_old_form_restores_and_writes(context: Context) -> None:
    first, second = _new_snapshot(), _new_snapshot()
    sandbox = await context.create(snapshot={"restore_key": first, "include": ["/workspace/**"]})
    await sandbox.exec("echo 1 >> /workspace/f; echo 1 > /root/f")
    await context.shutdown(sandbox)
    snapshot = {"restore_key": first, "write_key": second, "include": ["/workspace/**"]}
    sandbox = await context.create(snapshot=snapshot)
    assert (await sandbox.exec("cat /workspace/f; ls /root"))["stdout"] == "1\n"
    await sandbox.exec("echo 2 >> /workspace/f")
    await context.shutdown(sandbox)
    sandbox = await context.create(snapshot={"restore_key": second, "write_key": _new_snapshot()})
    assert (await sandbox.exec("cat /workspace/f"))["stdout"] == "1\n2\n"


@scenario(since=(0, 1, 20))
async def a_shutdown_writes_when_asked_to(context: Context) -> None:
    files = {"key": _new_snapshot(), "write_on_shutdown": True, "include": ["/workspace/**", "/srv/**"]}
    sandbox = await context.create(snapshot={"files": files})
    await sandbox.exec("echo kept > /workspace/f; echo kept > /srv/f; echo gone > /root/f")
    await context.shutdown(sandbox)
    sandbox = await context.create(snapshot={"files": files})
    assert (await sandbox.exec("cat /workspace/f /srv/f; ls /root"))["stdout"] == "kept\nkept\n"


@scenario(since=(0, 1, 20))
async def a_snapshot_on_demand_starts_another_sandbox(context: Context) -> None:
    key = _new_snapshot()
    sandbox = await context.create()
    await sandbox.exec("echo kept > /root/f")
    if not hasattr(sandbox, "snapshot"):
        async with context.http() as http:
            body = {"vm": {"key": key}, "files": {"key": key}}
            answer = (await http.post(context.api(sandbox, "/snapshot"), json=body)).json()
        assert answer["files"]["captured"] is True
        assert answer["vm"]["captured"] is False
    else:
        request = context.hiver.Snapshot(vm={"key": key}, files={"key": key})
        result = await sandbox.snapshot(request)
        assert result.files.captured
        assert result.files.key == key
        assert result.files.bytes > 0
        assert not result.vm.captured
        assert "microVM" in result.vm.reason
    await sandbox.exec("echo later > /root/f")
    fork = await context.create(snapshot={"files": {"key": key}})
    assert (await fork.exec("cat /root/f"))["stdout"] == "kept\n"
    assert (await sandbox.exec("cat /root/f"))["stdout"] == "later\n"
