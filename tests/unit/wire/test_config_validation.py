"""The rules of PROTOCOL 4.4 with the message shapes that it gives, and the bounds that are ours."""

import json
from typing import Any

import pytest

from hiverd.contracts.errors import InvalidError
from hiverd.wire.config import decode_config, validate_config
from hiverd.wire.validation import split_extra_host


def check(document: dict[str, Any]) -> None:
    validate_config(decode_config(json.dumps(document).encode()))


def local(mount: str, **members: Any) -> dict[str, Any]:
    return {"mount": mount, "backend": "local", **members}


def rule(**members: Any) -> dict[str, Any]:
    return {"access": "allow", "host": "example.org", **members}


def egress(**members: Any) -> dict[str, Any]:
    return {"egress": [rule(**members)]}


def override(access: str = "allow", **members: Any) -> dict[str, Any]:
    return egress(access=access, override=members)


def remote(backend: str, **members: Any) -> dict[str, Any]:
    return {"fs": [{"mount": "/m", "backend": backend, **members}]}


DENY = "is only possible on an allow rule"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"cpu": 0}, "cpu: must be > 0"),
    ({"cpu": -1}, "cpu: must be > 0"),
    ({"cpu": 1025}, "cpu: must be <= 1024"),
    ({"request_cpu": 0}, "request_cpu: must be > 0"),
    ({"memory": 127}, "memory: must be >= 128 (MiB)"),
    ({"memory": 10**9}, "memory: must be <= 16777216 (MiB)"),
    ({"ttl": -1}, "ttl: must be >= 0"),
    ({"ttl": 10**12}, "ttl: must be <= 315360000 (seconds)"),
    ({"egress_deny_wait": -1}, "egress_deny_wait: must be >= 0"),
    ({"egress_deny_wait": 3601}, "egress_deny_wait: must be <= 3600 (seconds)"),
    ({"image": "-x"}, "image: must be an image reference"),
    ({"image": "a b"}, "image: must be an image reference"),
    ({"image": "a\nb"}, "image: must be an image reference"),
    ({"image": "a" * 1025}, "image: must be an image reference"),
    ({"entrypoint": ["", "a"]}, "entrypoint[0]: must name a program"),
    ({"entrypoint": ["a", "b\0"]}, "entrypoint[1]: must not hold a NUL character"),
    ({"entrypoint": "a b\0"}, "entrypoint[1]: must not hold a NUL character"),
    ({"entrypoint": ["a", "b" * 131_072]}, "entrypoint[1]: must be at most 131071 bytes"),
    ({"entrypoint": ["a"] * 4097}, "entrypoint: must have at most 4096 arguments"),
    ({"cwd": "x"}, 'cwd: must be an absolute path, got "x"'),
    ({"cwd": "/\0"}, "cwd: must not hold a NUL character"),
    ({"env": {"": "x"}}, "env: a variable needs a name"),
    ({"env": {"A=B": "x"}}, 'env["A=B"]: the name must not hold ='),
    ({"env": {"A\0": "x"}}, 'env["A\\u0000"]: the name must not hold ='),
    ({"env": {"A": "\0"}}, "env.A: must not hold a NUL character"),
    ({"env": {"A": "x" * 131_072}}, "env.A: name and value must be at most"),
    ({"env": {f"A{n}": "" for n in range(1025)}}, "env: must have at most 1024 variables"),
    ({"extra_hosts": ["a"]}, 'extra_hosts[0]: must be "host:ip" or "host:host-gateway", got "a"'),
    ({"extra_hosts": ["a:10.0.0.1", "a:300.0.0.1"]}, "extra_hosts[1]: must be"),
    ({"extra_hosts": ["a b:10.0.0.1"]}, "extra_hosts[0]: must be"),
    ({"extra_hosts": ["a:fe80::1%eth0"]}, "extra_hosts[0]: must be"),
    ({"extra_hosts": ["a:10.0.0.1\n6.6.6.6 b"]}, "extra_hosts[0]: must be"),
    ({"events": ["stdio", "x"]}, 'events[1]: unknown value "x"'),
    ({"fs": [local("")]}, "fs[0].mount is required"),
    ({"fs": [local("x")]}, 'fs[0].mount: must be an absolute path, got "x"'),
    ({"fs": [local("/a/../b")]}, "fs[0].mount: must not hold .. segments"),
    ({"fs": [local("/a\0")]}, "fs[0].mount: must not hold a NUL character"),
    ({"fs": [local("/" + "a" * 4096)]}, "fs[0].mount: must be at most 4095 bytes"),
    ({"fs": [local("//")]}, "fs[0].mount: must not be the root directory"),
    ({"fs": [local("/proc")]}, "fs[0].mount: must not lie in /proc"),
    ({"fs": [local("/sys/x")]}, "fs[0].mount: must not lie in /sys"),
    ({"fs": [local("/dev/shm/")]}, "fs[0].mount: must not lie in /dev"),
    ({"fs": [local("/a"), local("/a/b")]}, 'fs[1].mount: "/a/b" overlaps fs[0].mount "/a"'),
    ({"fs": [local("/a/b"), local("/a/")]}, 'fs[1].mount: "/a" overlaps fs[0].mount "/a/b"'),
    ({"fs": [local("/a"), local("//a")]}, 'fs[1].mount: "/a" overlaps fs[0].mount "/a"'),
    ({"fs": [local(f"/m{n}") for n in range(65)]}, "fs: must have at most 64 entries"),
    ({"fs": [local("/a", acls=[{"path": " ", "access": "rw"}])]}, "fs[0].acls[0].path is required"),
    ({"fs": [local("/a", acls=[{"path": "/a/../b", "access": "rw"}])]}, "fs[0].acls[0].path: must be a path"),
    ({"fs": [local("/a", acls=[{"path": "/a", "access": "rw"}] * 1025)]}, "fs[0].acls: must have at most 1024 rules"),
    ({"fs": [local("/a", origin="x\0")]}, "fs[0].origin: must not hold a NUL character"),
    (remote("gcs"), "fs[0].backend gcs: gcs_bucket is required"),
    (remote("gcs", gcs_bucket="b"), "fs[0].backend gcs: gcs_service_account_json is required"),
    (remote("gdrive"), "fs[0].backend gdrive: gdrive_access_token or gdrive_service_account_json is required"),
    (remote("s3", s3_bucket="b", s3_access_key_id="k"), "fs[0].backend s3: s3_secret_access_key is required"),
    (remote("azure"), "fs[0].backend azure: azure_container is required"),
    (remote("azure", azure_container="c", azure_account_key="k"), "fs[0].backend azure: azure_account is required"),
    (remote("azure", azure_container="c", azure_account="a"), "fs[0].backend azure: azure_account_key, "),
    (remote("onedrive"), "fs[0].backend onedrive: onedrive_access_token is required"),
    (remote("external"), "fs[0].backend external: host is required"),
    (remote("external", host="ftp://x"), "fs[0].host: must be an http:// or https:// base URL"),
    (remote("external", host="http://x:99999"), "fs[0].host: must be an http:// or https:// base URL"),
    (remote("external", host="http://[x"), "fs[0].host: must be an http:// or https:// base URL"),
    (egress(host=" "), "egress[0].host is required"),
    (egress(host="https://x.org"), "egress[0].host: must be a host name, without scheme and path"),
    (egress(host="a b"), "egress[0].host: must be a host name or a pattern"),
    (egress(host="bücher.example"), "egress[0].host: must be ASCII"),
    (egress(ports=[80, 0]), "egress[0].ports[1]: 0 out of range [1, 65535]"),
    (egress(ports=[65536]), "egress[0].ports[0]: 65536 out of range [1, 65535]"),
    (egress(methods=["GET", "FETCH"]), 'egress[0].methods[1]: unknown value "FETCH"'),
    (egress(paths=["x"]), 'egress[0].paths[0]: must start with "/", got "x"'),
    (egress(paths=[""]), 'egress[0].paths[0]: must start with "/", got ""'),
    (egress(paths=["/\0"]), "egress[0].paths[0]: must be at most"),
    (egress(paths=["/"] * 1025), "egress[0].paths: must have at most 1024 entries"),
    ({"egress": [rule()] * 4097}, "egress: must have at most 4096 rules"),
    (override("deny", host="x"), f"egress[0].override.host: {DENY}"),
    (override(host="http://x"), 'egress[0].override.host: must be "host[:port]" without scheme'),
    (override(host="x/y"), "egress[0].override.host: must be"),
    (override(host="*.x"), "egress[0].override.host: must be"),
    (override(host="x:0"), "egress[0].override.host: port 0 out of range [1, 65535]"),
    (override(host="x:70000"), "egress[0].override.host: port 70000 out of range [1, 65535]"),
    (override(host="x:"), 'egress[0].override.host: must be "host[:port]" or'),
    (override(host="[::zz]:80"), 'egress[0].override.host: must be "host[:port]" or'),
    (override(host="fe80::1%lo"), 'egress[0].override.host: must be "host[:port]" or'),
    (override("deny", prefix_path="/x"), f"egress[0].override.prefix_path: {DENY}"),
    (override(prefix_path="x"), 'egress[0].override.prefix_path: must start with "/"'),
    (override(prefix_path="/a*"), "egress[0].override.prefix_path: must be an ASCII path"),
    (override(prefix_path="/a?b"), "egress[0].override.prefix_path: must be an ASCII path"),
    (override(prefix_path="/a HTTP/1.1"), "egress[0].override.prefix_path: must be an ASCII path"),
    (override(headers={"a b": "x"}), 'egress[0].override.headers["a b"]: is not a header name'),
    (override(headers={"a": "x\r\nb: c"}), "egress[0].override.headers.a: must not hold control characters"),
    (override(query={"": "x"}), "egress[0].override.query: a parameter needs a name"),
    (
        override(body_strategy="x"),
        'egress[0].override.body_strategy: must be "merge" or "replace", got "x"',
    ),
    (egress(access="deny", override_script="x"), f"egress[0].override_script: {DENY}"),
    (egress(override_script="x" * 262_145), "egress[0].override_script: must be at most 262144 bytes"),
    ({"snapshot": {"vm": {"key": "a/b"}}}, "snapshot.vm.key: must be 1 to 64 characters"),
    ({"snapshot": {"files": {"key": ".."}}}, "snapshot.files.key: must be 1 to 64 characters"),
    ({"snapshot": {"restore_key": "a" * 65}}, "snapshot.restore_key: must be"),
    ({"snapshot": {"write_key": ""}}, "snapshot.write_key: must be"),
    ({"snapshot": {"include": []}}, "snapshot.include: must not be empty"),
    (
        {"snapshot": {"files": {"key": "a", "include": ["/a/../b"]}}},
        "snapshot.files.include[0]: must be a path pattern",
    ),
    ({"snapshot": {"files": {"key": "a", "mount": "x"}}}, "snapshot.files.mount: must be an absolute path"),
    (
        {"snapshot": {"files": {"key": "a", "mount": "/x"}}, "fs": [local("/y")]},
        "snapshot.files.mount: must be the mount of an entry of fs",
    ),
    ({"snapshot": {"vm": {"key": "a"}, "restore_key": "b"}}, "snapshot: restore_key, write_key and include"),
]


@pytest.mark.parametrize(
    ("document", "message"), REFUSED, ids=lambda value: value[:60] if isinstance(value, str) else ""
)
def test_refused(document: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidError) as caught:
        check(document)
    assert caught.value.message.startswith(message)
    assert caught.value.field
    assert caught.value.details == {"field": caught.value.field}


@pytest.mark.parametrize(
    "document",
    [
        {"cpu": 0.01, "memory": 128, "ttl": 0, "egress_deny_wait": 0},
        {"image": "hiversh/python:3.13-alpine"},
        {"image": "/srv/roots/debian"},
        {"image": "localhost:5000/a/b@sha256:00"},
        {"fs": [local("/a"), local("/ab"), local("/process")]},
        {"fs": [local("/etc/app", acls=[{"path": "*.env", "access": "deny"}])]},
        {"extra_hosts": ["db:10.0.0.1", "six:::1", "six:[::1]", "host:host-gateway", "a_b.c:1.2.3.4"]},
        {"egress": [rule(host="*"), rule(host="10.0.0.1:443"), rule(host="*.org", ports=[], methods=[], paths=[])]},
        egress(paths=["**", "/repos/**", "*"], access="deny"),
        override(host="10.0.0.1:80", prefix_path="/mock/", headers={"X-Key": "a\tb"}, body={"a": None}),
        override(host="[2001:db8::1]:8443"),
        override(host="2001:db8::1"),
        override("deny", query={"a": "b"}),
        {"snapshot": {"files": {"key": "a.b", "mount": "/workspace"}}},
        {"snapshot": {"restore_key": "a", "write_key": "b", "include": ["/home/user/*"]}},
        {"snapshot": {}},
        remote("azure", azure_container="c", azure_connection_string="x"),
        remote("gdrive", gdrive_access_token="x"),
        remote("external", host="https://files.example/base/"),
    ],
)
def test_accepted(document: dict[str, Any]) -> None:
    check(document)


def test_a_wrong_base_url_is_not_repeated() -> None:
    with pytest.raises(InvalidError) as caught:
        check(remote("external", host="ftp://user:hunter2@x"))
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    ("entry", "pair"),
    [
        ("a:1.2.3.4", ("a", "1.2.3.4")),
        ("a:[2001:DB8::1]", ("a", "2001:db8::1")),
        ("a:::1", ("a", "::1")),
        ("a:host-gateway", ("a", "host-gateway")),
        ("a", None),
        (":1.2.3.4", None),
    ],
)
def test_extra_hosts_are_split(entry: str, pair: tuple[str, str] | None) -> None:
    assert split_extra_host(entry) == pair
