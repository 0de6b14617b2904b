"""Defaults, answers to both client families, the diff of an apply, and redaction."""

import json
from typing import Any

import pytest

from hiverd.wire.changes import Defaults
from hiverd.wire.config import (
    REDACTED,
    AclRule,
    EgressOverride,
    EgressRule,
    LocalFileSystem,
    SandboxConfig,
    config_to_wire,
    decode_config,
    diff_configs,
    effective_cpu,
    effective_egress,
    effective_entrypoint,
    effective_extra_hosts,
    effective_image,
    effective_memory_bytes,
    effective_request_cpu,
    effective_ttl_seconds,
    merge_immutables,
    redact_config,
    with_defaults,
)
from hiverd.wire.redaction import SECRET_MEMBERS


def config_of(**members: Any) -> SandboxConfig:
    return decode_config(json.dumps(members).encode())


ALL_OF_WORKSPACE = [{"path": "/workspace/**", "access": "rw"}]


def test_an_absent_fs_is_one_workspace() -> None:
    fs = config_to_wire(with_defaults(SandboxConfig()), family="new")["fs"]
    assert fs == [{"backend": "local", "mount": "/workspace", "acls": ALL_OF_WORKSPACE}]


def test_an_empty_fs_stays_empty_and_is_left_out_of_answers() -> None:
    config = with_defaults(config_of(fs=[]))
    assert config.fs == ()
    assert config_to_wire(config, family="new") == {}


def test_only_acls_are_filled_in() -> None:
    acls = [{"path": "/b", "access": "ro"}]
    config = with_defaults(
        config_of(
            fs=[{"mount": "/a", "backend": "local", "acls": []}, {"mount": "/b", "backend": "local", "acls": acls}]
        )
    )
    assert config.fs is not None
    assert [entry.acls for entry in config.fs] == [(AclRule("/a/**", "rw"),), (AclRule("/b", "ro"),)]
    assert (config.cpu, config.memory, config.ttl, config.egress) == (None, None, None, None)


def test_effective_values() -> None:
    empty = SandboxConfig()
    assert effective_image(empty) == "agent-base"
    assert effective_image(empty, "from-header") == "from-header"
    assert effective_image(config_of(image="x"), "from-header") == "x"
    assert (effective_cpu(empty), effective_cpu(empty, 2.0), effective_cpu(config_of(cpu=0.0001))) == (1.0, 2.0, 0.01)
    assert effective_request_cpu(empty) == 0.5
    assert effective_memory_bytes(empty) == 512 << 20
    assert effective_memory_bytes(config_of(memory=128), 1024) == 128 << 20
    assert (effective_ttl_seconds(empty), effective_ttl_seconds(empty, 60)) == (1800, 60)
    assert (effective_ttl_seconds(config_of(ttl=0)), effective_ttl_seconds(empty, 0)) == (None, None)
    assert effective_entrypoint(config_of(entrypoint=" a  'b c' ")) == ("a", "'b", "c'")
    assert effective_entrypoint(config_of(entrypoint=["a b"])) == ("a b",)
    assert effective_entrypoint(empty) is None
    assert effective_extra_hosts(config_of(extra_hosts=["a:[::1]", "b:host-gateway"])) == (
        ("a", "::1"),
        ("b", "host-gateway"),
    )


def test_absent_egress_is_the_operators_default_and_empty_is_deny() -> None:
    assert [rule.access for rule in effective_egress(SandboxConfig())] == ["allow"]
    assert effective_egress(SandboxConfig(), "deny") == ()
    assert effective_egress(config_of(egress=[])) == ()


def test_old_clients_get_what_they_can_parse() -> None:
    s3 = {"mount": "/s", "backend": "s3", "s3_bucket": "b", "s3_access_key_id": "i", "s3_secret_access_key": "s"}
    config = with_defaults(
        config_of(
            cpu=1.5,
            entrypoint=["sleep", "9"],
            fs=[{"mount": "/workspace", "backend": "local"}, s3],
            snapshot={"restore_key": "a.b", "write_key": "w"},
        )
    )
    assert config_to_wire(config, family="old") == {
        "cpu": 2,
        "entrypoint": "sleep 9",
        "fs": [{"backend": "local", "mount": "/workspace", "acls": ALL_OF_WORKSPACE}],
        "snapshot": {"write_key": "w"},
    }
    new = config_to_wire(config, family="new")
    assert (new["cpu"], new["entrypoint"], len(new["fs"])) == (1.5, ["sleep", "9"], 2)
    assert "fs" not in config_to_wire(config_of(fs=[s3]), family="old")


@pytest.mark.parametrize("family", ["old", "new"])
def test_whole_cpus_are_integers_and_nothing_is_null(family: Any) -> None:
    wire = config_to_wire(with_defaults(config_of(cpu=2, egress=[{"access": "allow", "host": "h"}])), family=family)
    assert json.dumps(wire["cpu"]) == "2"
    assert "null" not in json.dumps(wire)


def test_immutables_are_kept_and_named() -> None:
    current = config_of(image="a", cpu=1, env={"A": "b"}, entrypoint="x y", ttl=5)
    desired = config_of(image="b", cpu=2, env={"A": "c"}, entrypoint=["x", "y"], tty=True, cwd="/c", ttl=7, egress=[])
    merged, warnings = merge_immutables(current, desired)
    assert (merged.image, merged.cpu, merged.env, merged.entrypoint) == ("a", 1.0, {"A": "b"}, "x y")
    assert (merged.tty, merged.cwd, merged.ttl, merged.egress) == (None, None, 7, ())
    assert [warning.partition(":")[0] for warning in warnings] == ["image", "cpu", "cwd", "tty", "env"]


def test_the_same_values_in_other_words_raise_no_warning() -> None:
    current = SandboxConfig()
    same = config_of(cpu=1, memory=512, request_cpu=0.5, tty=False, env={}, extra_hosts=[], image="agent-base")
    assert merge_immutables(current, same) == (current, [])
    assert merge_immutables(same, current) == (same, [])
    hosts = ["a:::1", "b:1.2.3.4"]
    assert merge_immutables(config_of(extra_hosts=hosts), config_of(extra_hosts=["b:1.2.3.4", "a:[::1]"]))[1] == []


def test_the_operators_defaults_in_other_words_raise_no_warning() -> None:
    defaults = Defaults(image="python:3", cpu=4, memory_mib=2048)
    current = SandboxConfig()
    for same in (config_of(cpu=4, memory=2048, image="python:3"), config_of(image="agent-base")):
        assert merge_immutables(current, same, defaults=defaults) == (current, [])
    built_in = config_of(cpu=1, memory=512)
    assert len(merge_immutables(current, built_in, defaults=defaults)[1]) == 2


def test_what_a_request_leaves_out_is_kept_silently() -> None:
    current = config_of(image="a", cpu=2, memory=128, env={"A": "b"}, tty=True, cwd="/c", isolation="container")
    assert merge_immutables(current, SandboxConfig()) == (current, [])


def test_an_old_client_that_sends_back_what_it_was_shown_gets_no_warning() -> None:
    current = config_of(cpu=1.5, entrypoint=["sh", "-c", "a b"])
    shown = decode_config(json.dumps(config_to_wire(current, family="old")).encode())
    assert merge_immutables(current, shown, family="old") == (current, [])
    assert [warning.partition(":")[0] for warning in merge_immutables(current, shown)[1]] == ["cpu", "entrypoint"]


def mount(path: str, **members: Any) -> dict[str, Any]:
    return {"mount": path, "backend": "local", **members}


def with_acls(path: str) -> dict[str, Any]:
    return {"backend": "local", "mount": path, "acls": [{"path": f"{path}/**", "access": "rw"}]}


def test_a_diff_of_nothing_is_empty() -> None:
    rules = [{"access": "allow", "host": "a"}, {"access": "deny", "host": "b"}]
    current = config_of(fs=[mount("/a"), mount("/b")], egress=rules)
    new = config_of(fs=[with_acls("/b"), mount("/a")], egress=rules[::-1], ttl=9)
    assert diff_configs(current, current) == {}
    assert diff_configs(current, new) == {}


def test_the_order_of_an_objects_members_is_no_change() -> None:
    one, two = {"a": "1", "b": "2"}, {"b": "2", "a": "1"}
    current, new = (
        config_of(egress=[{"access": "allow", "host": "h", "override": {"headers": headers}}]) for headers in (one, two)
    )
    assert diff_configs(current, new) == {}


def test_a_diff_lists_whole_entries() -> None:
    allow, deny = {"access": "allow", "host": "a", "override": {"headers": {"k": "v"}}}, {"access": "deny", "host": "b"}
    acls = [{"path": "/b", "access": "ro"}]
    current = config_of(fs=[mount("/a"), mount("/b")], egress=[allow])
    new = config_of(fs=[mount("/b", acls=acls), mount("/c")], egress=[deny])
    assert diff_configs(current, new) == {
        "fs": {
            "added": [{"backend": "local", "mount": "/b", "acls": acls}, with_acls("/c")],
            "removed": [with_acls("/a"), with_acls("/b")],
        },
        "egress": {"added": [deny], "removed": [allow]},
    }


def test_going_from_allow_all_to_nothing_is_a_change() -> None:
    everything = {"access": "allow", "host": "*"}
    absent, empty = SandboxConfig(), config_of(egress=[])
    assert diff_configs(absent, empty) == {"egress": {"removed": [everything]}}
    assert diff_configs(empty, absent) == {"egress": {"added": [everything]}}
    assert diff_configs(empty, absent, default_egress="deny") == {}


SECRET = "hunter2"


def secret_config() -> SandboxConfig:
    rule = EgressRule(
        access="allow",
        host="api.example",
        override=EgressOverride(headers={"X": SECRET}, query={"q": SECRET}, body={"p": SECRET}, host="up.example"),
        override_script=f"body = '{SECRET}'",
    )
    mounts = [{"mount": f"/{name}", "backend": name.partition("_")[0], name: SECRET} for name in sorted(SECRET_MEMBERS)]
    mounts.append({"mount": "/external", "backend": "external", "host": f"https://me:{SECRET}@files.example/x"})
    config = config_of(fs=mounts, env={"TOKEN": SECRET})
    return SandboxConfig(env=config.env, fs=config.fs, egress=(rule,))


def test_no_secret_is_left_after_redaction() -> None:
    assert len(SECRET_MEMBERS) == 13
    config = secret_config()
    wire = config_to_wire(config, family="new")
    before = json.dumps(wire)
    redacted = redact_config(wire)
    assert SECRET not in json.dumps(redacted)
    assert json.dumps(wire) == before, "the original must stay as it was"
    assert SECRET not in json.dumps(redact_config(diff_configs(SandboxConfig(), config)))
    assert redacted["egress"][0]["override"] == {
        "headers": {"X": REDACTED},
        "query": {"q": REDACTED},
        "body": REDACTED,
        "host": "up.example",
    }
    assert redacted["env"] == {"TOKEN": REDACTED}
    assert redacted["fs"][-1]["host"] == "https://[redacted]@files.example/x"


def test_redaction_keeps_what_is_no_secret() -> None:
    wire = config_to_wire(
        with_defaults(config_of(image="x", cpu=1, egress=[{"access": "deny", "host": "h"}])), family="new"
    )
    assert redact_config(wire) == wire
    assert redact_config({"warnings": ["a"]}) == {"warnings": ["a"]}


def test_structs_are_immutable() -> None:
    with pytest.raises(AttributeError):
        LocalFileSystem(mount="/a").mount = "/b"  # type: ignore[misc]
