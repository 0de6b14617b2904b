"""Decoding of configurations: whatever comes in, the answer is a config or an InvalidError that names the member."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hiverd.contracts.errors import InvalidError
from hiverd.strict import build, to_builtins
from hiverd.wire.config import SandboxConfig, config_to_wire, decode_config, validate_config, with_defaults
from hiverd.wire.model import FILE_SYSTEM_CLASSES, S3FileSystem


def decode(document: object) -> SandboxConfig:
    return decode_config(json.dumps(document).encode())


def refusal(document: object) -> InvalidError:
    with pytest.raises(InvalidError) as caught:
        decode(document)
    return caught.value


@pytest.mark.parametrize("raw", [b"", b"  \n", b"{}", b'{"cpu": null, "fs": null, "egress": null}'])
def test_nothing_given_is_an_empty_config(raw: bytes) -> None:
    assert decode_config(raw) == SandboxConfig()


def test_absent_and_empty_lists_stay_apart() -> None:
    assert decode({}).egress is None
    assert decode({"egress": []}).egress == ()
    assert decode({"events": []}).events == ()
    assert config_to_wire(decode({"egress": [], "events": []}), family="new") == {"egress": [], "events": []}


def test_both_spellings_of_async() -> None:
    mount = {"mount": "/m", "backend": "local"}
    for name in ("async", "async_"):
        config = decode({"fs": [{**mount, name: True}]})
        assert config.fs is not None
        assert config.fs[0].async_ is True
        assert config_to_wire(config, family="new")["fs"] == [{**mount, "async": True}]
    assert refusal({"fs": [{**mount, "async": True, "async_": False}]}).message.startswith(
        "fs[0].async: is given twice"
    )


def test_spelling_is_made_uniform() -> None:
    config = decode(
        {
            "image": "",
            "cwd": "",
            "entrypoint": "  ",
            "fs": [{"mount": "//a/./b//", "backend": "local"}],
            "egress": [{"access": "allow", "host": " example.org ", "methods": ["get"]}],
            "snapshot": {"files": {"key": "k", "mount": "/a/b/"}},
        }
    )
    assert (config.image, config.cwd, config.entrypoint) == (None, None, None)
    assert config.fs is not None
    assert config.fs[0].mount == "/a/b"
    assert config.egress is not None
    assert (config.egress[0].host, config.egress[0].methods) == ("example.org", ("GET",))
    assert config.snapshot is not None
    assert config.snapshot.files is not None
    assert config.snapshot.files.mount == "/a/b"
    validate_config(config)


LOCAL = {"mount": "/m", "backend": "local"}
RULE = {"access": "allow", "host": "h"}


@pytest.mark.parametrize(
    ("document", "message", "field"),
    [
        ({"egres": []}, 'egres: unknown member, did you mean "egress"?', "egres"),
        ({"fs": [{"backend": "local"}]}, "fs[0].mount is required", "fs[0].mount"),
        ({"fs": [LOCAL, {"mount": "/x"}]}, "fs[1].backend is required", "fs[1].backend"),
        ({"fs": [{**LOCAL, "backend": "x"}]}, 'fs[0].backend: unknown value "x"', "fs[0].backend"),
        (
            {"fs": [{**LOCAL, "orign": "/"}]},
            'fs[0].orign: unknown member, did you mean "origin"?',
            "fs[0].orign",
        ),
        (
            {"fs": [{**LOCAL, "acls": [{"path": "/m/**", "access": "r"}]}]},
            'fs[0].acls[0].access: must be "deny", "ro" or "rw", got "r"',
            "fs[0].acls[0].access",
        ),
        (
            {"egress": [{**RULE, "access": "x"}]},
            'egress[0].access: must be "allow" or "deny", got "x"',
            "egress[0].access",
        ),
        ({"egress": [{"access": "allow"}]}, "egress[0].host is required", "egress[0].host"),
        ({"egress": [{**RULE, "override": {"body": 1}}]}, None, "egress[0].override.body"),
        ({"cpu": "1"}, "cpu: expected a number, got a string", "cpu"),
        ({"cpu": True}, "cpu: expected a number, got true", "cpu"),
        ({"memory": 512.5}, "memory: expected an integer, got 512.5", "memory"),
        ({"tty": 1}, "tty: expected true or false, got a number", "tty"),
        ({"entrypoint": 3}, "entrypoint: expected a string or a list of strings, got a number", "entrypoint"),
        ({"entrypoint": ["a", None]}, "entrypoint[1]: expected a string, got null", "entrypoint[1]"),
        ({"env": {"a b": 1}}, 'env["a b"]: expected a string, got a number', 'env["a b"]'),
        ({"env": ["A=b"]}, "env: expected an object, got a list", "env"),
        ({"isolation": "vm"}, 'isolation: must be "container" or "microvm", got "vm"', "isolation"),
        ([], "the body: expected an object, got a list", None),
    ],
)
def test_wrong_shapes_name_the_member(document: object, message: str | None, field: str | None) -> None:
    error = refusal(document)
    assert error.status == 400
    assert error.field == field
    assert message is None or error.message == message


def test_whole_floats_are_integers() -> None:
    assert decode({"memory": 512.0}).memory == 512


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"nul",
        b'{"cpu": NaN}',
        b'{"cpu": Infinity}',
        b'{"cpu": 1e999}',
        b'{"memory": ' + b"9" * 5000 + b"}",
        b'{"memory": 99999999999999999999}',
        b"\xff\xfe",
        b'{"image": "\xff"}',
        b'{"image": "\xed\xa0\x80"}',
        b'{"image": "\\ud800"}',
        b'{"\\udc00": 1}',
        b'\xef\xbb\xbf{"cpu": 1}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"egress": [], "egress": [{"access": "allow", "host": "*"}]}',
        b'{"cpu": 1} x',
    ],
)
def test_hostile_json_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidError) as caught:
        decode_config(raw)
    caught.value.message.encode()
    assert len(caught.value.message) < 500


def with_body(body: str) -> bytes:
    """A configuration whose one free-form member is `body`."""
    return b'{"egress":[{"access":"allow","host":"h","override":{"body":{"a":%s}}}]}' % body.encode()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("[" * 80 + "]" * 80, "nested more than 64 levels deep"),
        ('{"a":' * 80 + "1" + "}" * 80, "nested more than 64 levels deep"),
        ('[{"a":' * 40 + "1" + "}]" * 40, "nested more than 64 levels deep"),
        ("1e999", "a number that is out of range"),
        ("[-1e999]", "a number that is out of range"),
        (str(2**64), "a number that is out of range"),
        (str(-(2**63) - 1), "a number that is out of range"),
        ('"\\ud800"', "an unpaired surrogate"),
        ('{"\\ud800": 1}', "an unpaired surrogate"),
        ('{"b": 1, "b": 2}', "b: is given twice"),
    ],
)
def test_free_form_members_are_not_a_way_around(body: str, reason: str) -> None:
    with pytest.raises(InvalidError) as caught:
        decode_config(with_body(body))
    assert reason in caught.value.message


@pytest.mark.parametrize(
    "body", ["[" * 50 + "]" * 50, str(2**64 - 1), str(-(2**63)), "1.5e300", '"\\ud83d\\ude00"', "null"]
)
def test_free_form_members_come_back_whole(body: str) -> None:
    wire = config_to_wire(decode_config(with_body(body)), family="new")
    assert wire["egress"][0]["override"]["body"] == {"a": json.loads(body)}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
MEMBERS = [
    *SandboxConfig.__struct_fields__,
    *(
        "mount",
        "backend",
        "acls",
        "access",
        "host",
        "ports",
        "override",
        "body",
        "path",
        "vm",
        "files",
        "key",
        "async_",
    ),
]


def nested(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(MEMBERS), inner, max_size=5)


likely_configs = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["local", "allow", "/"]),
    nested,
    max_leaves=25,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary() | st.one_of(json_values, likely_configs).map(lambda value: json.dumps(value).encode()))
def test_anything_is_a_config_or_an_invalid_error(raw: bytes) -> None:
    try:
        config = decode_config(raw)
        validate_config(config)
    except InvalidError as error:
        error.message.encode()
        return
    wire = config_to_wire(config, family="new")
    if config.fs != ():
        assert decode_config(json.dumps(wire).encode()) == config
    json.dumps(config_to_wire(with_defaults(config), family="old"))


text = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=12)
key = st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True)
rules = st.fixed_dictionaries(
    {"access": st.just("allow"), "host": text},
    optional={
        "ports": st.lists(st.integers(1, 65535), max_size=3),
        "methods": st.lists(st.sampled_from(["GET", "POST"]), max_size=2),
        "paths": st.lists(text.map(lambda name: f"/{name}"), max_size=2),
        "override": st.fixed_dictionaries(
            {},
            optional={
                "headers": st.dictionaries(text, text, max_size=2),
                "query": st.dictionaries(text, st.text(st.characters(codec="utf-8")), max_size=2),
                "body": st.text(st.characters(codec="utf-8")) | st.dictionaries(text, st.none() | st.integers(0, 9)),
                "host": st.sampled_from(["up.example", "up.example:80", "10.0.0.1:8080", "[::1]:443", "::1"]),
                "prefix_path": st.just("/mock"),
            },
        ),
        "override_script": text,
    },
)
good_configs = st.fixed_dictionaries(
    {},
    optional={
        "image": text,
        "isolation": st.sampled_from(["container", "microvm"]),
        "cpu": st.floats(0.01, 64) | st.integers(1, 64),
        "request_cpu": st.floats(0.01, 64),
        "memory": st.integers(128, 65536),
        "entrypoint": text | st.lists(text, min_size=1),
        "cwd": text.map(lambda name: f"/{name}"),
        "tty": st.booleans(),
        "env": st.dictionaries(text, st.text(st.characters(codec="utf-8", exclude_characters="\0"))),
        "extra_hosts": st.lists(text.map(lambda name: f"{name}:10.0.0.1")),
        "ttl": st.integers(0, 100_000),
        "fs": st.lists(text.map(lambda name: {"mount": f"/m/{name}", "backend": "local"}), min_size=1, max_size=1),
        "egress": st.lists(rules, max_size=3),
        "egress_deny_wait": st.integers(0, 100),
        "mitm": st.booleans(),
        "events": st.lists(st.sampled_from(["stdio", "egress.request"])),
        "snapshot": st.fixed_dictionaries({"files": st.fixed_dictionaries({"key": key})}),
    },
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(good_configs)
def test_good_configs_come_back_as_they_were(document: dict[str, object]) -> None:
    config = decode(document)
    validate_config(config)
    assert config_to_wire(config, family="new") == document
    validate_config(with_defaults(config))


def test_all_backends_are_decoded_by_their_tag() -> None:
    for cls in FILE_SYSTEM_CLASSES:
        entry = cls(mount="/m")
        assert entry.__struct_config__.tag == cls.backend
        config = decode({"fs": [to_builtins(entry)]})
        assert config.fs == (entry,)


def test_build_reads_back_what_to_builtins_wrote() -> None:
    config = SandboxConfig(fs=(S3FileSystem(mount="/m", s3_bucket="b", async_=True),), entrypoint=("a", "b"))
    assert build(SandboxConfig, to_builtins(config)) == config
