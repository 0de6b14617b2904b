"""Lifecycle on a fake plug-in: races, failures at every step, restarts."""

from __future__ import annotations

import asyncio

import pytest

from hiverd.contracts.errors import (
    BackendError,
    ConflictError,
    HiverError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from hiverd.sandboxes import sandbox as sandbox_module
from hiverd.testing.fakes import FakeWorkload
from hiverd.wire.config import SandboxConfig, decode_config, with_defaults


def config(**members: object) -> SandboxConfig:
    import msgspec

    return with_defaults(decode_config(msgspec.json.encode(members)))


async def nothing_left(core) -> None:
    assert core.manager.all() == []
    assert core.isolation.workloads == {}
    assert await core.volumes.list_owned() == frozenset()
    assert await core.records.load() == []
    assert await core.database.fetch("SELECT * FROM events") == []


async def test_racing_callers_get_one_sandbox(open_core):
    async with open_core() as core:
        answers = await asyncio.gather(*(core.obtain("k", config) for _ in range(20)))
        assert len({sandbox.id for sandbox, _ in answers}) == 1
        assert sum(created for _, created in answers) == 1
        assert len(core.isolation.workloads) == 1


async def test_config_of_an_existing_key_is_not_even_read(open_core):
    async with open_core() as core:
        await core.obtain("k", config)

        def malformed() -> SandboxConfig:
            raise InvalidError("never read")

        _, created = await core.obtain("k", malformed)
        assert not created


@pytest.mark.parametrize("step", ["create", "destroy"])
async def test_a_failed_create_tells_why_and_leaves_nothing(open_core, step):
    async with open_core() as core:
        failures = {"create": 1, "destroy": 2 if step == "destroy" else 0}

        async def fail(at: str) -> None:
            if failures.get(at, 0) > 0:
                failures[at] -= 1
                raise BackendError(f"{at} failed")

        core.isolation.hook = fail
        with pytest.raises(BackendError, match="create failed"):
            await core.obtain("k", config)
        await nothing_left(core)
        core.isolation.hook = None
        _, created = await core.obtain("k", config)
        assert created


async def test_an_engine_that_is_away_keeps_no_caller_waiting(open_core, monkeypatch):
    monkeypatch.setattr(sandbox_module, "STUCK_PATIENCE_SECONDS", 0.05)
    async with open_core() as core, asyncio.timeout(10):
        sandbox, _ = await core.obtain("kept", config)

        async def away(at: str) -> None:
            raise UnavailableError("the engine is away")

        core.isolation.hook = away
        with pytest.raises(UnavailableError, match="the engine is away"):
            await core.obtain("new", config)
        with pytest.raises(UnavailableError, match="cannot be removed yet"):
            await core.obtain("new", config)
        with pytest.raises(UnavailableError, match="cannot be removed yet"):
            await core.manager.shutdown(sandbox)
        core.isolation.hook = None
        monkeypatch.setattr(sandbox_module, "STUCK_PATIENCE_SECONDS", 5)
        await core.manager.shutdown(sandbox)
        _, created = await core.obtain("new", config)
        assert created


async def test_a_stop_does_not_wait_for_an_engine_that_is_away(open_core, monkeypatch):
    monkeypatch.setattr(sandbox_module, "STUCK_PATIENCE_SECONDS", 0.05)
    async with open_core() as core, asyncio.timeout(10):
        sandbox, _ = await core.obtain("k", config)

        async def away(at: str) -> None:
            raise UnavailableError("the engine is away")

        core.isolation.hook = away
        said: list[str] = []
        await core.manager.shutdown_all(said.append)
        assert "left for the next start" in said[-1]
        core.isolation.hook = None
        await asyncio.wait_for(sandbox.destroyed.wait(), 5)


async def test_an_unknown_image_is_told_and_leaves_nothing(open_core):
    async with open_core() as core:
        with pytest.raises(NotFoundError, match="missing"):
            await core.obtain("k", lambda: config(image="missing"))
        await nothing_left(core)


async def test_an_internal_error_is_not_shown(open_core):
    async with open_core() as core:

        async def fail(at: str) -> None:
            if at == "create":
                raise RuntimeError("secret detail")

        core.isolation.hook = fail
        with pytest.raises(HiverError) as caught:
            await core.obtain("k", config)
        assert "secret" not in caught.value.message


async def test_shutdown_during_create_ends_with_nothing_left(open_core):
    async with open_core() as core:
        entered, go_on = asyncio.Event(), asyncio.Event()

        async def hold(at: str) -> None:
            if at == "create":
                entered.set()
                await go_on.wait()

        core.isolation.hook = hold
        creating = asyncio.ensure_future(core.obtain("k", config))
        await entered.wait()
        stopping = asyncio.ensure_future(core.manager.shutdown(core.manager.by_key("k")))
        await asyncio.sleep(0)
        go_on.set()
        await stopping
        with pytest.raises(ConflictError, match="shut down while it started"):
            await creating
        await nothing_left(core)


async def test_create_during_shutdown_waits_and_gets_a_new_sandbox(open_core):
    async with open_core() as core:
        first, _ = await core.obtain("k", config)
        entered, go_on = asyncio.Event(), asyncio.Event()

        async def hold(at: str) -> None:
            if at == "destroy":
                entered.set()
                await go_on.wait()

        core.isolation.hook = hold
        stopping = asyncio.ensure_future(core.manager.shutdown(first))
        await entered.wait()
        creating = asyncio.ensure_future(core.obtain("k", config))
        await asyncio.sleep(0)
        assert not creating.done()
        core.isolation.hook = None
        go_on.set()
        await stopping
        second, created = await creating
        assert created
        assert second.id != first.id
        assert second.events.last_id <= 1  # a fresh stream


async def test_the_caller_who_leaves_does_not_stop_a_create(open_core):
    async with open_core() as core:
        entered, go_on = asyncio.Event(), asyncio.Event()

        async def hold(at: str) -> None:
            if at == "create":
                entered.set()
                await go_on.wait()

        core.isolation.hook = hold
        creating = asyncio.ensure_future(core.obtain("k", config))
        await entered.wait()
        creating.cancel()
        go_on.set()
        _, created = await core.obtain("k", config)
        assert not created


async def test_exec_during_shutdown_ends_killed(open_core):
    from hiverd.sandboxes.execs import Command

    async with open_core() as core:
        sandbox, _ = await core.obtain("k", config)
        running = asyncio.ensure_future(
            core.execs.run_buffered(sandbox, Command(argv=("wait-for-kill",), display="wait-for-kill"))
        )
        while not sandbox.execs:
            await asyncio.sleep(0)
        await core.manager.shutdown(sandbox)
        assert (await running).exit_code == 137
        with pytest.raises(NotFoundError):
            await core.execs.run_buffered(sandbox, Command(argv=("true",), display="true"))
        await nothing_left(core)


async def test_a_workload_that_ends_by_itself_dies_and_is_removed(open_core):
    async with open_core() as core:
        sandbox, _ = await core.obtain("k", config)
        stream = core.manager.lifecycle.subscribe((), 5.0)
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        core.isolation.workloads[sandbox.id].end(3)
        seen = [await first]
        while seen[-1].status != "destroy":
            seen.append(await anext(stream))
        assert [event.status for event in seen] == ["die", "stop", "destroy"]
        await stream.aclose()
        await nothing_left(core)


async def test_a_restart_adopts_and_everything_goes_on(open_core):
    async with open_core() as core:
        sandbox, _ = await core.obtain("k", lambda: config(ttl=60))
        core.clock.added_seconds = 40
        await core.execs.run_buffered(sandbox, _echo())
        await core.housekeeping.store_activity()
        await core.journal.flushed()
        last_id = sandbox.events.last_id
    async with open_core() as core:
        core.clock.added_seconds = 40 + 30
        await core.manager.adopt_all()
        adopted = core.manager.by_key("k")
        assert adopted.id == sandbox.id
        assert adopted.status == "running"
        assert adopted.events.last_id == last_id
        assert not adopted.expired
        await core.housekeeping.reap()
        assert core.manager.by_key("k") is not None
        core.clock.added_seconds = 40 + 61
        assert adopted.expired  # its TTL counted on over the restart
        result = await core.execs.run_buffered(adopted, _echo())
        assert result.stdout == "echo\n"
        await core.journal.flushed()
        ids = [row[0] for row in await core.database.fetch("SELECT id FROM events ORDER BY id")]
        assert len(ids) == len(set(ids)) == 7  # start, and twice request, stdio, response
        assert ids[-1] > last_id


async def test_a_restart_removes_what_was_half_made(open_core, isolation):
    async with open_core() as core:
        entered = asyncio.Event()

        async def hold(at: str) -> None:
            if at == "create":
                entered.set()
                await asyncio.Event().wait()

        core.isolation.hook = hold
        creating = asyncio.ensure_future(core.obtain("k", config))
        await entered.wait()
        # The server is killed here.
        creating.cancel()
        for task in list(core.tasks._tasks):
            task.cancel()
    isolation.hook = None
    assert len(isolation.workloads) == 1
    async with open_core() as core:
        await core.manager.adopt_all()
        sandbox, created = await core.obtain("k", config)
        assert created
        assert list(isolation.workloads) == [sandbox.id]


async def test_a_restart_finishes_a_shutdown(open_core, isolation):
    async with open_core() as core:
        sandbox, _ = await core.obtain("k", config)
        await core.records.set_stopping(sandbox.id)
    async with open_core() as core:
        await core.manager.adopt_all()
        await asyncio.wait_for(core.manager.by_key("k").destroyed.wait(), 5)
        await nothing_left(core)


async def test_what_cannot_be_found_out_is_not_dead(open_core, isolation, monkeypatch):
    monkeypatch.setattr("hiverd.sandboxes.manager.ADOPT_RETRY_SECONDS", 0.01)
    async with open_core() as core:
        sandbox, _ = await core.obtain("k", config)
    async with open_core() as core:
        attempts = 0

        async def unknown_twice(at: str) -> None:
            nonlocal attempts
            if at == "adopt":
                attempts += 1
                if attempts < 3:
                    raise OSError("the engine does not answer")

        isolation.hook = unknown_twice
        await core.manager.adopt_all()
        assert core.manager.by_key("k").status == "starting"
        adopted, created = await asyncio.wait_for(core.obtain("k", config), 5)
        assert not created
        assert adopted.id == sandbox.id
        assert isolation.destroyed == []


async def test_what_surely_ended_meanwhile_is_removed(open_core, isolation):
    async with open_core() as core:
        await core.obtain("k", config)
    isolation.workloads.clear()
    async with open_core() as core:
        await core.manager.adopt_all()
        _, created = await asyncio.wait_for(core.obtain("k", config), 5)
        assert created


async def test_the_reaper_ends_what_is_idle_and_records_it(open_core):
    async with open_core() as core:
        sandbox, _ = await core.obtain("k", lambda: config(ttl=10))
        other, _ = await core.obtain("eternal", lambda: config(ttl=0))
        core.clock.added_seconds = 9
        await core.housekeeping.reap()
        assert sandbox.status == "running"
        core.clock.added_seconds = 11
        await core.housekeeping.reap()
        await asyncio.wait_for(sandbox.destroyed.wait(), 5)
        assert other.status == "running"


async def test_only_the_holder_of_the_lease_reaps(open_core):
    async with open_core() as core:
        now = core.clock.wall()
        assert await core.records.take_lease("reaper", "another", now, 3.0)
        sandbox, _ = await core.obtain("k", lambda: config(ttl=1))
        core.clock.added_seconds = 2
        await core.housekeeping.reap()
        assert sandbox.status == "running"
        core.clock.added_seconds = 4
        await core.housekeeping.reap()
        await asyncio.wait_for(sandbox.destroyed.wait(), 5)


async def test_the_sweep_removes_orphans_and_nothing_else(open_core, isolation):
    async with open_core() as core:
        sandbox, _ = await core.obtain("k", config)
        isolation.workloads["orphan"] = FakeWorkload(sandbox.spec)
        await core.volumes.allocate("lost", 7)
        for name in (sandbox.id, "lost-authority"):
            (core.egress_folder / name).mkdir(parents=True)
        await core.housekeeping.sweep()
        assert set(isolation.workloads) == {sandbox.id}
        assert await core.volumes.list_owned() == {sandbox.id}
        assert await core.egress.list_owned() == {sandbox.id}
        assert sandbox.status == "running"


async def test_without_its_gate_a_sandbox_never_begins(open_core, isolation, monkeypatch):
    async with open_core() as core:
        begun: list[FakeWorkload] = []
        monkeypatch.setattr(FakeWorkload, "begin", begun.append)

        async def open_gate(sandbox, *, fresh):
            assert fresh
            raise BackendError("no gate")

        monkeypatch.setattr(core.egress, "open", open_gate)
        with pytest.raises(BackendError, match="no gate"):
            await core.obtain("k", config)
        assert (begun, isolation.workloads, core.manager.all()) == ([], {}, [])


async def test_the_sweep_opens_gates_that_could_not_be_opened(open_core, monkeypatch):
    async with open_core() as core:
        sandbox, _ = await core.obtain("k", config)
        tried: list[tuple[str, bool]] = []

        async def open_gate(sandbox, *, fresh):
            tried.append((sandbox.key, fresh))
            raise OSError("not yet")

        monkeypatch.setattr(core.egress, "open", open_gate)
        await core.housekeeping.sweep()
        assert tried == [("k", False)]
        assert sandbox.status == "running"


async def test_the_maximum_of_sandboxes(open_core):
    async with open_core() as core:
        for number in range(20):
            await core.obtain(f"k{number}", config)
        with pytest.raises(ConflictError, match="max_sandboxes"):
            await core.obtain("one-too-many", config)


def _echo():
    from hiverd.sandboxes.execs import Command

    return Command(argv=("echo",), display="echo")
