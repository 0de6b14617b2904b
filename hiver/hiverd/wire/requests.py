"""Bodies of requests other than the configuration (PROTOCOL 3.11, 3.12, 3.15)."""

from __future__ import annotations

import re
import shlex
from typing import Final

from msgspec import Struct

from hiverd.strict import build, fail, parse_json
from hiverd.wire.keys import check_key
from hiverd.wire.model import Snapshot, SnapshotFiles, SnapshotVm
from hiverd.wire.validation import validate_arguments, validate_environment, validate_snapshot_parts, validate_text
from hiverd.wire.validation_files import clean_path, validate_absolute

Command = str | tuple[str, ...] | None

_RESIZE: Final = re.compile(r"\x1b\[8;([0-9]{1,5});([0-9]{1,5})t")
_MAX_TERMINAL_SIDE: Final = 65_535


class ExecRequest(Struct, frozen=True, omit_defaults=True):
    """A command to run. `command` is a shell line, an argv, or nothing; nothing with exec-stream attaches."""

    command: str | tuple[str, ...] | None = None
    cwd: str | None = None
    env: dict[str, str] | None = None
    tty: bool | None = None


class StdinRequest(Struct, frozen=True):
    """Text for a command's standard input, or the resize sequence of a terminal."""

    data: str


class SnapshotRequest(Struct, frozen=True, omit_defaults=True):
    """What to capture now; at least one part is present."""

    vm: SnapshotVm | None = None
    files: SnapshotFiles | None = None


class SnapshotFork(Struct, frozen=True):
    """Where a copy of a snapshot goes."""

    to: str


def decode_exec(raw: bytes) -> ExecRequest:
    """Reads and checks an exec or exec-stream body; an empty one is `{}`. Raises `InvalidError`."""
    request = build(ExecRequest, parse_json(raw) if raw.strip() else {})
    if isinstance(request.command, str):
        validate_text("command", request.command)
    else:
        validate_arguments("command", request.command or ())
    if request.cwd:
        validate_absolute("cwd", request.cwd)
    validate_environment("env", request.env or {})
    return request


def decode_stdin(raw: bytes) -> StdinRequest:
    """Reads a stdin body. Raises `InvalidError`."""
    return build(StdinRequest, parse_json(raw))


def decode_snapshot(raw: bytes) -> SnapshotRequest:
    """Reads and checks a snapshot body; that `files.mount` is a mount of the sandbox is for the caller to check."""
    request = build(SnapshotRequest, parse_json(raw) if raw.strip() else {})
    if request.vm is None and request.files is None:
        fail("", "select what to capture: vm, files or both")
    validate_snapshot_parts(Snapshot(vm=request.vm, files=request.files), "")
    if request.files is None or request.files.mount is None:
        return request
    files = SnapshotFiles(
        key=request.files.key,
        write_on_shutdown=request.files.write_on_shutdown,
        include=request.files.include,
        mount=clean_path(request.files.mount),
    )
    return SnapshotRequest(vm=request.vm, files=files)


def decode_fork(raw: bytes) -> SnapshotFork:
    """Reads and checks the body of a fork. Raises `InvalidError`."""
    fork = build(SnapshotFork, parse_json(raw))
    check_key(fork.to, field="to")
    return fork


def argv_of(command: Command) -> tuple[str, ...] | None:
    """The argv to execute: a string goes to `sh -c`, a list is itself (PROTOCOL 0.8). None: there is no command."""
    if not command:
        return None
    return ("sh", "-c", command) if isinstance(command, str) else command


def display_command(command: Command) -> str:
    """The command as one string for `exec.request` events: an argv is quoted as a shell would need it."""
    if not command:
        return ""
    return command if isinstance(command, str) else shlex.join(command)


def parse_resize(data: str) -> tuple[int, int] | None:
    """Rows and columns if the whole of `data` is the sequence `ESC [ 8 ; rows ; cols t`, else None."""
    match = _RESIZE.fullmatch(data)
    if match is None:
        return None
    rows, cols = int(match[1]), int(match[2])
    return (rows, cols) if max(rows, cols) <= _MAX_TERMINAL_SIDE else None
