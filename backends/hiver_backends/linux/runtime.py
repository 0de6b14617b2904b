"""The OCI runtime program: crun, runc or runsc."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from msgspec import Struct

from hiverd.contracts.errors import BackendError

from . import pids
from .children import Children

Kind = Literal["crun", "runc", "runsc"]

ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C",
    # Runs of a few milliseconds in which a Go runtime's collector only costs time.
    "GOGC": "off",
}
"""What the runtime and conmon see of our environment: nothing of the operator's."""

_START_SECONDS: Final = 60.0
_MISSING: Final = 127
_NOT_EXECUTABLE: Final = 126


class Runtime(Struct, frozen=True):
    """A runtime that a probing run has found good."""

    path: str
    kind: Kind
    version: str
    userns: bool
    """Sandboxes get a user namespace."""

    def global_arguments(self, state_dir: Path, log: Path | None = None) -> list[str]:
        """What comes before the subcommand."""
        arguments = ["--root", str(state_dir)]
        if log is not None:
            arguments += ["--log", str(log), "--log-format", "json"]
        if self.kind == "runsc":
            # The kernel's stack of the private namespace, not gVisor's own: our listeners are in that one.
            arguments += ["--network", "host"]
        return arguments


def kind_of(path: str) -> Kind:
    """By the program's name; what we do not know is taken to behave like runc."""
    name = Path(path).name
    if "crun" in name:
        return "crun"
    return "runsc" if "runsc" in name else "runc"


class SealedProgram:
    """A program copied once into sealed memory, from where it is run.

    runc copies itself so on every start, to keep a hostile container from overwriting it (CVE-2019-5736), and skips the
    copy, some 3 ms, when it already runs from a sealed memfd.
    """

    def __init__(self, path: str) -> None:
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        self._descriptor: int | None = os.memfd_create(Path(path).name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        with Path(path).open("rb") as program:
            while os.sendfile(self._descriptor, program.fileno(), None, 1 << 24):
                pass
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, seals)
        self.path: Final = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        """Frees the memory once no process runs from it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class RuntimeCalls:
    """Runs the runtime's subcommands."""

    def __init__(self, runtime: Runtime, state_dir: Path, children: Children) -> None:
        self.runtime: Final = runtime
        self.state_dir: Final = state_dir
        self._children = children
        self._sealed = SealedProgram(runtime.path) if runtime.kind == "runc" else None
        self.program: Final = self._sealed.path if self._sealed else runtime.path

    def close(self) -> None:
        """Frees this process's resources."""
        if self._sealed is not None:
            self._sealed.close()

    def argv(self, *arguments: str, log: Path | None = None) -> list[str]:
        """A whole command line."""
        return [self.program, *self.runtime.global_arguments(self.state_dir, log), *arguments]

    async def start(self, sandbox_id: str, log: Path) -> None:
        """Lets a created container run. No error if it runs already. Raises `BackendError`."""
        if self.runtime.kind == "runc":
            await self._open_exec_fifo(sandbox_id)
            return
        try:
            await self.run(["start", sandbox_id], log)
        except BackendError as error:
            if "running" not in error.message:
                raise

    async def _open_exec_fifo(self, sandbox_id: str) -> None:
        """All that `runc start` does, without some 7 ms for a process: process 1 waits until its fifo is opened for
        reading, writes one byte and goes on; a container without the fifo counts as started."""
        fifo = self.state_dir / sandbox_id / "exec.fifo"
        try:
            descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            if (fifo.parent / "state.json").exists():
                return
            raise BackendError(f"runc knows nothing of sandbox {sandbox_id}") from None
        try:
            async with asyncio.timeout(_START_SECONDS):
                await pids.wait_readable(descriptor)
            if not os.read(descriptor, 1):
                raise BackendError("the sandbox ended before it began")
        except TimeoutError:
            raise BackendError("the sandbox did not begin") from None
        finally:
            os.close(descriptor)
        fifo.unlink(missing_ok=True)

    async def run(self, arguments: Sequence[str], log: Path) -> None:
        """Runs a subcommand to its end. Raises `BackendError` with the runtime's own message."""
        child = self._children.spawn(self.argv(*arguments, log=log), env=ENVIRONMENT)
        code = await child.wait()
        message = last_error(log)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(log)
        if code != 0:
            raise BackendError(f"{self.runtime.kind} {arguments[0]} failed: {message or f'exit code {code}'}")


def last_error(log: Path) -> str:
    """The last error in a runtime's JSON log; empty if there is none."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    message = ""
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("level") in {"error", "fatal", "warning"}:
            message = str(entry.get("msg", "")) if entry.get("level") != "warning" or not message else message
    return message


_WORKING_DIRECTORY: Final = re.compile(r"chdir|\bcwd\b|working directory", re.IGNORECASE)
_NOT_FOUND: Final = re.compile(r"not found|no such file or directory", re.IGNORECASE)
_REFUSED: Final = re.compile(
    r"permission denied|exec format error|is a directory|argument list too long|not a directory|too many levels",
    re.IGNORECASE,
)


def start_failure(message: str, argv: Sequence[str], cwd: str) -> tuple[int, str] | None:
    """Judges a runtime's error when `exec` fails: exit code and text for stderr (PROTOCOL 0.8).

    None: the failure is not the caller's doing.
    """
    program = argv[0] if argv else ""
    if _WORKING_DIRECTORY.search(message) and (_NOT_FOUND.search(message) or _refused_directory(message)):
        return _NOT_EXECUTABLE, f"cannot change to working directory {cwd}: {_reason(message)}\n"
    if _NOT_FOUND.search(message) and program in message:
        return _MISSING, f"{program}: not found\n"
    if _REFUSED.search(message):
        return _NOT_EXECUTABLE, f"{program}: {_reason(message)}\n"
    return None


def _refused_directory(message: str) -> bool:
    return bool(re.search(r"not a directory|permission denied|outside of container|too many", message, re.IGNORECASE))


def _reason(message: str) -> str:
    return message.rsplit(": ", 1)[-1].strip().lower()
