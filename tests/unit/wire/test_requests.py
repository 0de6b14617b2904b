"""Bodies of exec, stdin and snapshot."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiverd.contracts.errors import InvalidError
from hiverd.wire.requests import (
    argv_of,
    decode_exec,
    decode_snapshot,
    decode_stdin,
    display_command,
    parse_resize,
)


@pytest.mark.parametrize(
    ("raw", "argv", "shown"),
    [
        (b"", None, ""),
        (b"{}", None, ""),
        (b'{"command": null}', None, ""),
        (b'{"command": ""}', None, ""),
        (b'{"command": []}', None, ""),
        (b'{"command": "echo $HOME"}', ("sh", "-c", "echo $HOME"), "echo $HOME"),
        (b'{"command": ["echo", "$HOME", "it\'s"]}', ("echo", "$HOME", "it's"), "echo '$HOME' 'it'\"'\"'s'"),
    ],
)
def test_commands(raw: bytes, argv: tuple[str, ...] | None, shown: str) -> None:
    command = decode_exec(raw).command
    assert argv_of(command) == argv
    assert display_command(command) == shown


def test_all_members_of_an_exec() -> None:
    request = decode_exec(b'{"command": "x", "cwd": "/tmp", "env": {"A": "b"}, "tty": true}')
    assert (request.cwd, request.env, request.tty) == ("/tmp", {"A": "b"}, True)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"command": 3}', "command: expected a string or a list of strings, got a number"),
        (b'{"command": ["a", 1]}', "command[1]: expected a string, got a number"),
        (b'{"command": "a\\u0000"}', "command: must not hold a NUL character"),
        (b'{"command": ["a\\u0000"]}', "command[0]: must not hold a NUL character"),
        (b'{"cwd": "x"}', 'cwd: must be an absolute path, got "x"'),
        (b'{"env": {"A=": ""}}', 'env["A="]: the name must not hold ='),
        (b'{"comand": "x"}', 'comand: unknown member, did you mean "command"?'),
        (b"[", "the body is not valid JSON: "),
        (b"[]", "the body: expected an object, got a list"),
    ],
)
def test_bad_execs(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidError) as caught:
        decode_exec(raw)
    assert caught.value.message.startswith(message)


def test_stdin() -> None:
    assert decode_stdin(b'{"data": "x\\u0004"}').data == "x\x04"
    for raw in (b"", b"{}", b'{"data": 1}', b'{"data": null}'):
        with pytest.raises(InvalidError):
            decode_stdin(raw)


def test_snapshot() -> None:
    request = decode_snapshot(b'{"vm": {"key": "a"}, "files": {"key": "b", "include": ["/w/**"], "mount": "/m/"}}')
    assert request.vm is not None
    assert request.vm.key == "a"
    assert request.files is not None
    assert (request.files.key, request.files.include, request.files.mount) == ("b", ("/w/**",), "/m")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "select what to capture"),
        (b'{"vm": null}', "select what to capture"),
        (b'{"vm": {}}', "vm.key is required"),
        (b'{"files": {"key": "a/b"}}', "files.key: must be 1 to 64"),
        (b'{"files": {"key": "a", "include": []}}', "files.include: must not be empty"),
        (b'{"files": {"key": "a", "mount": "x"}}', "files.mount: must be an absolute path"),
        (b'{"restore_key": "a"}', "restore_key: unknown member"),
    ],
)
def test_bad_snapshots(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidError) as caught:
        decode_snapshot(raw)
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        ("\x1b[8;24;80t", (24, 80)),
        ("\x1b[8;0;0t", (0, 0)),
        ("\x1b[8;24;80", None),
        ("x\x1b[8;24;80t", None),
        ("\x1b[8;24;80t\n", None),
        ("\x1b[8;99999;80t", None),
        ("\x1b[8;-1;80t", None),
        ("\x1b[8;٣;80t", None),
        ("", None),
    ],
)
def test_resize(data: str, size: tuple[int, int] | None) -> None:
    assert parse_resize(data) == size


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_an_invalid_error(raw: bytes) -> None:
    for decode in (decode_exec, decode_stdin, decode_snapshot):
        try:
            decode(raw)
        except InvalidError as error:
            error.message.encode()
