"""Applying configurations: all or nothing, one at a time, events in order."""

from __future__ import annotations

import asyncio
import errno
import json

import msgspec
import pytest

from hiverd.contracts.errors import ConflictError, UnsupportedError
from hiverd.files import sever
from hiverd.sandboxes import mounting
from hiverd.sandboxes.mounts import MountPlanner
from hiverd.wire.config import decode_config, with_defaults


def config(**members):
    return with_defaults(decode_config(msgspec.json.encode(members)))


def local(*mounts):
    return [{"backend": "local", "mount": mount} for mount in mounts]


async def test_mounts_are_added_and_removed(open_core):
    async with open_core() as core:
        sandbox, _ = await core.obtain("k", lambda: config(fs=local("/workspace", "/old")))
        outcome = await core.applier.apply(sandbox, config(fs=local("/workspace", "/new")), "new")
        assert outcome.error is None
        assert [entry["mount"] for entry in outcome.changes["fs"]["added"]] == ["/new"]
        assert [entry["mount"] for entry in outcome.changes["fs"]["removed"]] == ["/old"]
        assert set(core.isolation.workloads[sandbox.id].mounts) == {"/workspace", "/new"}


async def test_a_failing_mount_rolls_everything_back(open_core):
    async with open_core() as core:
        sandbox, _ = await core.obtain("k", lambda: config(fs=local("/workspace", "/old")))
        before = sandbox.config
        outcome = await core.applier.apply(
            sandbox, config(fs=local("/workspace", "/new", "/refused"), egress=[], ttl=5), "new"
        )
        assert "refused" in outcome.error
        assert outcome.config == before == sandbox.config
        assert set(core.isolation.workloads[sandbox.id].mounts) == {"/workspace", "/old"}
        await core.journal.flushed()
        rows = await core.database.fetch("SELECT body FROM events ORDER BY id")
        events = [json.loads(row[0]) for row in rows]
        assert [event["type"] for event in events] == ["system.start", "config.apply"]
        assert events[-1]["success"] is False
        assert "refused" in events[-1]["errorMessage"]


async def test_events_of_an_apply_are_in_order_and_without_secrets(open_core):
    async with open_core() as core:
        sandbox, _ = await core.obtain("k", config)
        rule = {"access": "allow", "host": "x.org", "override": {"headers": {"Authorization": "Bearer hush"}}}
        await core.applier.apply(sandbox, config(egress=[rule]), "new")
        await core.journal.flushed()
        bodies = [row[0].decode() for row in await core.database.fetch("SELECT body FROM events ORDER BY id")]
        assert [json.loads(body)["type"] for body in bodies[1:]] == ["config.apply", "system.config-changed"]
        assert "hush" not in "".join(bodies)


async def test_a_second_apply_meanwhile_is_refused(open_core):
    async with open_core() as core:
        sandbox, _ = await core.obtain("k", config)
        first = asyncio.ensure_future(core.applier.apply(sandbox, config(ttl=5), "new"))
        await asyncio.sleep(0)
        with pytest.raises(ConflictError, match="still in progress"):
            await core.applier.apply(sandbox, config(ttl=6), "new")
        assert (await first).config.ttl == 5
        assert (await core.applier.apply(sandbox, config(ttl=6), "new")).config.ttl == 6


async def test_immutable_fields_are_kept_and_named(open_core):
    async with open_core() as core:
        sandbox, _ = await core.obtain("k", lambda: config(memory=256))
        outcome = await core.applier.apply(sandbox, config(memory=1024, cpu=2), "new")
        assert outcome.config.memory == 256
        assert len(outcome.changes["warnings"]) == 2


async def test_an_applied_events_filter_is_in_force_at_once(open_core):
    async with open_core() as core:
        sandbox, _ = await core.obtain("k", config)
        await core.applier.apply(sandbox, config(events=[]), "new")
        await core.journal.flushed()
        assert len(await core.database.fetch("SELECT id FROM events")) == 1
        assert sandbox.events.last_id == 3  # excluded ones consume ids too


@pytest.mark.parametrize(
    ("members", "field"),
    [
        ({"fs": [{"backend": "local", "mount": "/w", "acls": [{"path": "/w/x", "access": "ro"}]}]}, "fs[0]"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(members, field):
    with pytest.raises(UnsupportedError) as caught:
        MountPlanner((), environ={}, fuse=lambda: False).plan(config(**members))
    assert caught.value.field == field


def test_a_tree_that_cannot_be_copied_is_as_before(tmp_path, monkeypatch):
    """For want of space, say: nothing stays in the trash."""
    folder = tmp_path / "w"
    (folder / "d").mkdir(parents=True)
    for number in range(10):
        (folder / "d" / str(number)).write_text("kept")

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(sever, "copy_file", full)
    with pytest.raises(OSError, match="full"):
        mounting._sever(folder)
    assert {path.name: path.read_text() for path in (folder / "d").iterdir()} == {str(n): "kept" for n in range(10)}


async def test_a_restart_undoes_a_half_made_apply(open_core, isolation):
    async with open_core() as core:
        sandbox, _ = await core.obtain("k", lambda: config(fs=local("/a", "/b")))
        workload = isolation.workloads[sandbox.id]
        entered = asyncio.Event()

        async def die(*_):
            entered.set()
            await asyncio.Event().wait()

        core.records.set_config = die  # the server dies with the mounts changed and the configuration not stored
        applying = asyncio.ensure_future(core.applier.apply(sandbox, config(fs=local("/a", "/stray")), "new"))
        await entered.wait()
        assert set(workload.mounts) == {"/a", "/stray"}
        async with open_core() as restarted:
            await restarted.manager.adopt_all()
            assert set(workload.mounts) == {"/a", "/b"}
            assert {mount.target for mount in restarted.manager.by_key("k").spec.mounts} == {"/a", "/b"}
        for task in asyncio.all_tasks():
            if task.get_name() == "apply-k":
                task.cancel()
        await asyncio.gather(applying, return_exceptions=True)
