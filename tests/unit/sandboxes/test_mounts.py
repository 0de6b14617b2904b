"""Which kind a mount is of, what a change of the configuration changes, and what is tried again."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from hiverd.sandboxes.mounts import MountPlanner, changes_between
from hiverd.wire.config import decode_config, with_defaults

OPEN = {"path": "/w/**", "access": "rw"}
DENY = {"path": "/w/secret", "access": "deny"}
S3 = {"backend": "s3", "mount": "/w", "s3_bucket": "b", "s3_access_key_id": "i", "s3_secret_access_key": "one"}
EXTERNAL = {"backend": "external", "mount": "/w", "host": "http://someone:one@example.org"}


def plans(planner=None, *, events=None, **entry):
    document = {"fs": [{"backend": "local", "mount": "/w", **entry}]}
    if events is not None:
        document["events"] = events
    planner = planner or MountPlanner((), environ={})
    return planner.plan(with_defaults(decode_config(msgspec.json.encode(document))))


def changes(before, after):
    return changes_between(plans(**before), plans(**after))


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        ({}, "native"),
        ({"acls": [OPEN]}, "native"),
        ({"acls": [{"path": "/w/a", "access": "rw"}, OPEN]}, "native"),
        ({"acls": [{"path": "/w/a/**", "access": "rw"}]}, "governed"),
        ({"acls": [OPEN, DENY]}, "governed"),
        ({"acls": [{"path": "/**", "access": "ro"}]}, "governed"),
        ({"internal": True}, "internal"),
        (S3, "governed"),
        ({**S3, "internal": True}, "internal"),
    ],
)
def test_a_mount_is_native_only_if_it_is_the_sandboxs_own_and_open_to_all(entry, kind):
    assert [plan.kind for plan in plans(**entry)] == [kind]


def test_a_folder_of_the_operator_is_governed(tmp_path):
    planner = MountPlanner([tmp_path], environ={})
    assert plans(planner, origin=str(tmp_path))[0].kind == "governed"


def test_what_cannot_be_watched_is_governed_unless_nobody_asks(tmp_path):
    planner = MountPlanner((), environ={}, watchable=lambda: False)
    assert plans(planner)[0].kind == "governed"
    assert plans(planner, events=["stdio"])[0].kind == "native"


def test_the_same_access_in_other_words_is_no_change():
    changed = changes({"acls": [OPEN]}, {"acls": [{"path": "/**", "access": "rw"}]})
    assert changed == changes({}, {})
    assert not changed.added
    assert not changed.removed
    assert not changed.governed_anew


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"acls": [OPEN, DENY]}, {"acls": [OPEN, {**DENY, "access": "ro"}]}),
        (S3, {**S3, "s3_secret_access_key": "two"}),
        (S3, {**S3, "acls": [OPEN, DENY]}),
        (EXTERNAL, {**EXTERNAL, "host": "http://someone:two@example.org"}),
    ],
)
def test_rules_and_credentials_change_where_they_are_served(before, after):
    changed = changes(before, after)
    assert len(changed.governed_anew) == 1
    assert not changed.added
    assert not changed.removed


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"acls": [OPEN, DENY]}),
        ({"acls": [OPEN, DENY]}, {}),
        (S3, {**S3, "s3_bucket": "other"}),
        (S3, {**S3, "s3_prefix": "a"}),
        (S3, {**S3, "async": True}),
        (EXTERNAL, {**EXTERNAL, "host": "http://someone:one@example.com"}),
        ({}, {"internal": True}),
    ],
)
def test_other_data_or_another_kind_is_another_mount(before, after):
    changed = changes(before, after)
    assert [plan.target for plan in changed.removed] == [plan.target for plan in changed.added] == ["/w"]
    assert not changed.governed_anew


async def test_what_has_nothing_behind_it_is_tried_again(open_core):
    async with open_core() as core:
        sandbox, _ = await core.obtain("k", lambda: with_defaults(decode_config(b"{}")))
        tried = asyncio.Event()

        async def revive(found, target):
            assert (found, target) == (sandbox, "/workspace")
            tried.set()

        core.manager._revive = revive
        core.manager._missing = lambda _: ["/workspace"]
        async with sandbox.changing:
            await core.manager.revive_mounts()  # a change is under way, which may bring it
        await asyncio.sleep(0)
        assert not tried.is_set()
        await core.manager.revive_mounts()
        await asyncio.wait_for(tried.wait(), 5)
