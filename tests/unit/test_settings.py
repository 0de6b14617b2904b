"""Where settings come from, which one wins, and what the errors say."""

import os
from pathlib import Path
from typing import Any

import pytest

from hiverd.settings import Settings, SettingsError, load_settings
from hiverd.settings.load import environment_names
from hiverd.settings.model import ImageAlias
from hiverd.settings.reference import sections, toml_value


def write(folder: Path, text: str) -> Path:
    path = folder / "hiver.toml"
    path.write_text(text)
    return path


def refusal(path: Path | None = None, **arguments: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(path, **{"environ": {}, **arguments})
    return caught.value.message


def test_defaults() -> None:
    settings = load_settings(environ={})
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 10000)
    assert (settings.sandbox.ttl_seconds, settings.sandbox.default_image) == (1800, "host")
    assert settings.egress.default == "allow"
    assert settings.image_aliases == {"agent-base": "host", "python": "host", "node": "host"}
    assert settings.options_of("oci") == settings.options_of("other") == {}


def test_precedence(tmp_path: Path) -> None:
    path = write(tmp_path, '[server]\nhost = "10.0.0.1"\nport = 1\nlog_level = "debug"\n[sandbox]\ncpu = 2\n')
    environ = {"HIVER_HOST": "10.0.0.2", "HIVER_PORT": "2"}
    settings = load_settings(path, environ=environ, overrides={"server.host": "10.0.0.3", "server.ephemeral": None})
    server = settings.server
    assert (server.host, server.port, server.log_level, server.ephemeral) == ("10.0.0.3", 2, "debug", False)
    assert settings.sandbox.cpu == 2.0


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    environ = {"HIVER_CONFIG": str(write(tmp_path, "[server]\nport = 5\n"))}
    assert load_settings(environ=environ).server.port == 5
    other = tmp_path / "other.toml"
    other.write_text("")
    assert load_settings(other, environ=environ).server.port == 10000


SAMPLES: dict[str, tuple[str, Any]] = {
    "path": ("/x/y", Path("/x/y")),
    "boolean": ("yes", True),
    "list of strings": ("a, b", ("a", "b")),
    "list of paths": ("/a,/b", (Path("/a"), Path("/b"))),
    "string": ("text", "text"),
    "table": ('{"a": 1}', {"a": 1}),
}


def sample(kind: str, default: Any) -> tuple[str, Any]:
    if kind.startswith(("integer", "number")):
        value = default * 2
        return str(value), value
    if " or " in kind:
        value = next(choice.strip("`") for choice in kind.split(" or ") if choice.strip("`") != default)
        return value, value
    return SAMPLES[kind]


KEYS = [
    pytest.param(variable, key, id=variable)
    for section in sections()
    for key in section.keys
    for variable in key.variables
    if key.name
]


@pytest.mark.parametrize(("variable", "key"), KEYS)
def test_every_setting_by_environment(variable: str, key: Any) -> None:
    text, expected = sample(key.type, key.default)
    settings = load_settings(environ={variable: text})
    assert getattr(getattr(settings, key.section), key.name) == expected != key.default


def test_variables_are_unique_and_every_key_has_one() -> None:
    fields = {(section.name, key.name) for section in sections() for key in section.keys if key.name}
    assert set(environment_names().values()) == fields
    assert {f"HIVER_{section}_{name}".upper() for section, name in fields} <= set(environment_names())


def test_tables_of_plugins_are_passed_on() -> None:
    environ = {
        "HIVER_OCI": '{"runtime": "runc", "a": 1}',
        "HIVER_OCI_RUNTIME": "crun",
        "HIVER_OCI_WARM_COUNT": "4",
        "HIVER_OCI_DEBUG": "true",
        "HIVER_OCI_ARGS": '["-x"]',
        "HIVER_DOCKER_HOST": "unix:///run/docker.sock",
    }
    settings = load_settings(environ=environ)
    assert settings.oci == {"runtime": "crun", "a": 1, "warm_count": 4, "debug": True, "args": ["-x"]}
    assert settings.options_of("docker") == {"host": "unix:///run/docker.sock"}


def test_images_are_merged_name_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, '[sandbox]\ndefault_image = "debian"\n[images]\npython = "python:3.13"\n"a/b:1" = "host"\n')
    settings = load_settings(path, environ={"HIVER_IMAGES_MY_TOOLS": "tools:1", "HIVER_IMAGES": '{"a/b:2": "host"}'})
    assert settings.image_aliases == {
        "agent-base": "debian",
        "python": "python:3.13",
        "node": "host",
        "a/b:1": "host",
        "a/b:2": "host",
        "my-tools": "tools:1",
    }
    assert load_settings(environ={"HIVER_IMAGES_AGENT_BASE": "x"}).image_aliases["agent-base"] == "x"


def test_an_image_may_carry_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, '[images.python]\nimage = "p:3"\ntty = true\nentrypoint = ["python3", "-i"]\n')
    settings = load_settings(path, environ={"HIVER_IMAGES_NODE": '{"image": "n:24", "env": {"A": "b"}}'})
    assert settings.images["python"] == ImageAlias(image="p:3", tty=True, entrypoint=("python3", "-i"))
    assert settings.images["node"] == ImageAlias(image="n:24", env={"A": "b"})
    assert settings.image_aliases["python"] == "p:3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nprot = 1", 'server.prot: unknown member, did you mean "port"?'),
        ("[sandbx]\n", 'sandbx: unknown member, did you mean "sandbox"?'),
        ("[server]\nport = 65536", "server.port: must be <= 65535"),
        ("[server]\nport = '1'", "server.port: expected an integer, got a string"),
        ("[server]\ncontainer_backend = 'podman'", "server.container_backend: must be "),
        ("[exec]\nkeepalive_seconds = 3", "exec.keepalive_seconds: must be < 3"),
        ("[server]\nhost = ''", "server.host: must not be empty"),
        ("[server]\ndata_dir = 3", "server.data_dir: expected a path, got a number"),
        ("[server]\nport = nan", "server.port: expected an integer, got nan"),
        ("[proxy]\ndial_hold_seconds = inf", "proxy.dial_hold_seconds: must be a finite number"),
        ("[images]\nx = 1", "images.x: expected an object, got a number"),
        ("[images]\nx = { tty = true }", "images.x.image is required"),
        ('[images]\nx = { image = "host", ttty = true }', "images.x.ttty"),
        ("server = 3", "server: expected an object, got a number"),
        ("[server", "is not valid TOML"),
    ],
)
def test_errors_in_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    assert refusal(path).startswith(f"{path}: {message}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.toml") == f"{tmp_path}/none.toml: cannot be read: No such file or directory"
    (tmp_path / "bad.toml").write_bytes(b"\xff")
    assert "is not valid TOML" in refusal(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"HIVER_PROT": "1"}, 'HIVER_PROT: unknown setting, did you mean "HIVER_PORT"?'),
        ({"HIVER_QQQQQQ": "1"}, "HIVER_QQQQQQ: unknown setting, see docs/settings.md"),
        ({"HIVER_PORT": "x"}, "HIVER_PORT: expected an integer, got 'x'"),
        ({"HIVER_PORT": "-1"}, "HIVER_PORT: server.port: must be >= 0"),
        ({"HIVER_EPHEMERAL": "maybe"}, "HIVER_EPHEMERAL: expected true or false, got 'maybe'"),
        ({"HIVER_SANDBOX_CPU": "nan"}, "HIVER_SANDBOX_CPU: sandbox.cpu: must be a finite number"),
        ({"HIVER_SANDBOX_CPU": "x"}, "HIVER_SANDBOX_CPU: expected a number, got 'x'"),
        ({"HIVER_IMAGES": "[]"}, "HIVER_IMAGES: expected a JSON object"),
        ({"HIVER_OCI": "{"}, "HIVER_OCI: the value is not valid JSON"),
        ({"HIVER_PORT": "1", "HIVER_SERVER_PORT": "2"}, "HIVER_SERVER_PORT: contradicts HIVER_PORT"),
        ({"HIVER_DATA_DIR": ""}, "HIVER_DATA_DIR: server.data_dir: must be the path of a file or folder"),
    ],
)
def test_errors_in_the_environment(environ: dict[str, str], message: str) -> None:
    assert refusal(environ=environ).startswith(message)


def test_errors_on_the_command_line() -> None:
    assert refusal(overrides={"server.port": 70000}) == "command line: server.port: must be <= 65535"


def test_variables_of_others_are_left_alone() -> None:
    environ = {"HIVER_GATEWAY_URL": "x", "HIVER_TEST_SLOW": "1", "HIVER_BENCH_N": "1", "PATH": "/bin", "hiver_x": "1"}
    assert load_settings(environ=environ) == load_settings(environ={})
    assert load_settings(environ={"HIVER_PORT": "1", "HIVER_SERVER_PORT": "1"}).server.port == 1


def test_folders_of_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    server = load_settings(environ={"XDG_DATA_HOME": "/x"}).server
    assert (server.data_dir, server.run_dir) == (Path("/var/lib/hiver"), Path("/run/hiver"))


def test_folders_of_other_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/me")
    server = load_settings(environ={"XDG_DATA_HOME": "/x", "XDG_RUNTIME_DIR": "/run/user/1000"}).server
    assert (server.data_dir, server.run_dir) == (Path("/x/hiver"), Path("/run/user/1000/hiver"))
    server = load_settings(environ={"XDG_DATA_HOME": "relative", "HIVER_RUN_DIR": "~/run"}).server
    assert (server.data_dir, server.run_dir) == (Path("/home/me/.local/share/hiver"), Path("/home/me/run"))
    server = load_settings(environ={"HIVER_DATA_DIR": "data"}).server
    assert (server.data_dir, server.run_dir) == (Path.cwd() / "data", Path.cwd() / "data" / "run")


def test_toml_values_can_be_read_back() -> None:
    assert [toml_value(value) for value in (True, 3, 1.5, 'a"b', (Path("/a"),), ())] == [
        "true",
        "3",
        "1.5",
        '"a\\"b"',
        '["/a"]',
        "[]",
    ]


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Settings().server.port = 1  # type: ignore[misc]
