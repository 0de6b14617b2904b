"""Commands run inside a sandbox: `runtime exec --detach`, whose process becomes our child once the runtime is gone."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import itertools
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import termios
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from hiverd.contracts.errors import BackendError, InvalidError, NotFoundError
from hiverd.contracts.isolation import ExecProcess, Stream

from .children import Child, Children
from .killing import ProcessTree
from .runtime import ENVIRONMENT, RuntimeCalls, last_error, start_failure
from .streams import Readers, Writer, input_pipe, output_pipe

_UNDO_SECONDS: Final = 10.0
TreeFactory = Callable[[str, Child], ProcessTree]


class ExecRequest(Struct, frozen=True, kw_only=True):
    """One command, ready for the runtime."""

    sandbox_id: str
    process: dict[str, Any]
    """OCI process document."""
    owner: tuple[int, int]
    """Host ids of the sandbox's root."""
    stdin: bool

    @property
    def tty(self) -> bool:
        """Whether it runs on a terminal."""
        return bool(self.process["terminal"])


class FinishedExec(ExecProcess):
    """A command that could not be started: a message on stderr and an exit code (PROTOCOL 0.8)."""

    def __init__(self, code: int, message: str) -> None:
        self._code = code
        self._message = message.encode()

    async def output(self) -> AsyncIterator[tuple[Stream, bytes]]:
        yield "stderr", self._message

    async def write(self, data: bytes) -> None:
        raise NotFoundError("the command has ended")

    def resize(self, rows: int, cols: int) -> None:
        """There is no terminal."""

    async def wait(self) -> int:
        return self._code

    async def kill(self) -> None:
        """It never ran."""

    async def close(self) -> None:
        """It holds nothing."""


class RunningExec(ExecProcess):
    """A started command."""

    def __init__(
        self, child: Child, readers: Readers, writer: Writer, terminal: int | None, tree: ProcessTree, pool: Executor
    ) -> None:
        self._child = child
        self._readers = readers
        self._writer = writer
        self._terminal = terminal
        self._tree = tree
        self._pool = pool

    def output(self) -> AsyncIterator[tuple[Stream, bytes]]:
        return self._readers.pieces()

    async def write(self, data: bytes) -> None:
        if self._child.exited.done() and self._readers.ended:
            raise NotFoundError("the command has ended")
        await self._writer.write(data)

    def resize(self, rows: int, cols: int) -> None:
        if self._terminal is not None:
            resize_terminal(self._terminal, rows, cols)

    async def wait(self) -> int:
        return await self._child.wait()

    async def kill(self) -> None:
        loop = asyncio.get_running_loop()
        pipes = [] if self._terminal is not None else self._readers.descriptors()
        await loop.run_in_executor(self._pool, self._tree.kill, pipes)
        await self._child.wait()

    async def close(self) -> None:
        try:
            if not (self._child.exited.done() and self._readers.ended):
                await self.kill()
        finally:
            self._readers.close()
            self._writer.close()
            if self._terminal is not None:
                os.close(self._terminal)
                self._terminal = None


class Execs:
    """Starts commands. `folder` holds their files while they start; it is ours alone."""

    def __init__(self, folder: Path, calls: RuntimeCalls, children: Children, pool: Executor) -> None:
        self._folder = folder
        self._calls = calls
        self._children = children
        self._pool = pool
        # A runtime that a killed server left behind may still write its files: ours have other names.
        self._token = secrets.token_hex(4)
        self._numbers = itertools.count()

    def prepare(self) -> None:
        """Empties the folder: a killed server may have left files with secrets in it.

        What a runtime of that server still writes meanwhile is no more than a process id.
        """
        self.clear(self._folder)

    @staticmethod
    def clear(folder: Path) -> None:
        """The same for a folder that several of these use."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def start(self, request: ExecRequest, tree: TreeFactory) -> ExecProcess:
        """Raises `BackendError` when the runtime fails for a reason that is not the command's."""
        _check_strings(request.process)
        files = _Files(self._folder, f"{self._token}-{next(self._numbers)}")
        try:
            with open(files.document, "xb", opener=_private) as document:  # noqa: ASYNC230 -- a few hundred bytes
                document.write(msgspec.json.encode(request.process))
            if request.tty:
                return await self._start_tty(request, files, tree)
            return await self._start_pipes(request, files, tree)
        finally:
            files.remove()

    async def _start_pipes(self, request: ExecRequest, files: _Files, tree: TreeFactory) -> ExecProcess:
        out_reader, out_writer = output_pipe(request.owner)
        err_reader, err_writer = output_pipe(request.owner)
        in_reader, in_writer = input_pipe(request.owner) if request.stdin else (None, None)
        readers = Readers({out_reader: "stdout", err_reader: "stderr"})
        writer = Writer(in_writer)
        try:
            try:
                runtime = self._spawn(request, files, in_reader, out_writer, err_writer)
            finally:
                for descriptor in (out_writer, err_writer, in_reader):
                    if descriptor is not None:
                        os.close(descriptor)
            started = await self._started(runtime, request, files, tree)
        except BaseException:
            readers.close()
            writer.close()
            raise
        if isinstance(started, FinishedExec):
            readers.close()
            writer.close()
            return started
        return RunningExec(started, readers, writer, None, tree(request.sandbox_id, started), self._pool)

    async def _start_tty(self, request: ExecRequest, files: _Files, tree: TreeFactory) -> ExecProcess:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(files.console))
            listener.listen(1)
            listener.setblocking(False)
            runtime = self._spawn(request, files, None, None, None)
            started = await self._started(runtime, request, files, tree)
            if isinstance(started, FinishedExec):
                return started
            # The runtime has gone, so what it sent lies ready in the socket.
            terminal = _receive_terminal(listener)
        os.set_blocking(terminal, False)
        writer = Writer(os.dup(terminal))
        readers = Readers({os.dup(terminal): "stdout"})
        return RunningExec(started, readers, writer, terminal, tree(request.sandbox_id, started), self._pool)

    def _spawn(
        self, request: ExecRequest, files: _Files, stdin: int | None, stdout: int | None, stderr: int | None
    ) -> Child:
        arguments = ["exec", "--detach", "--pid-file", str(files.pid), "--process", str(files.document)]
        if request.tty:
            arguments += ["--console-socket", str(files.console)]
        null = subprocess.DEVNULL
        return self._children.spawn(
            self._calls.argv(*arguments, request.sandbox_id, log=files.log),
            stdin=null if stdin is None else stdin,
            stdout=null if stdout is None else stdout,
            stderr=null if stderr is None else stderr,
            env=ENVIRONMENT,
            new_session=True,
        )

    async def _started(
        self, runtime: Child, request: ExecRequest, files: _Files, tree: TreeFactory
    ) -> Child | FinishedExec:
        try:
            code = await runtime.wait()
        except asyncio.CancelledError:
            await self._undo(runtime, request, files, tree)
            raise
        if code == 0:
            return self._children.watch(int(files.pid.read_text()))
        message = last_error(files.log)
        verdict = start_failure(message, request.process["args"], request.process["cwd"])
        if verdict is None:
            raise BackendError(f"the command could not be started: {message or f'exit code {code}'}")
        return FinishedExec(*verdict)

    async def _undo(self, runtime: Child, request: ExecRequest, files: _Files, tree: TreeFactory) -> None:
        """Nobody wants the command any more. A runtime killed in the middle may leave it running, so let it finish."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_UNDO_SECONDS):
                await runtime.wait()
        runtime.signal(signal.SIGKILL)
        with contextlib.suppress(OSError, ValueError):
            child = self._children.watch(int(files.pid.read_text()))
            doomed = tree(request.sandbox_id, child)
            await asyncio.get_running_loop().run_in_executor(self._pool, doomed.kill, [])


class _Files:
    def __init__(self, folder: Path, name: str) -> None:
        self.document = folder / f"{name}.json"
        self.pid = folder / f"{name}.pid"
        self.log = folder / f"{name}.log"
        self.console = folder / f"{name}.sock"

    def remove(self) -> None:
        for file in (self.document, self.pid, self.log, self.console):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _check_strings(process: dict[str, Any]) -> None:
    if not process["args"] or not process["args"][0]:
        raise InvalidError("the command is empty", field="command")
    for text in (*process["args"], *process["env"], process["cwd"]):
        if "\0" in text:
            raise InvalidError("a command, its environment and its cwd cannot hold NUL characters", field="command")
    if any(entry.startswith("=") for entry in process["env"]):
        raise InvalidError("an environment variable has no name", field="env")


def _receive_terminal(listener: socket.socket) -> int:
    try:
        connection, _ = listener.accept()
    except BlockingIOError:
        raise BackendError("the runtime sent no terminal") from None
    with connection:
        descriptors = array.array("i")
        _, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(descriptors.itemsize), socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(data[: descriptors.itemsize])
    if not descriptors:
        raise BackendError("the runtime sent no terminal")
    return descriptors[0]


def resize_terminal(terminal: int, rows: int, cols: int) -> None:
    """Sets a terminal's size (0 to 65535 each).

    The kernel signals only a change, so an unchanged size goes through another one: the workload is to repaint.
    """
    rows, cols = min(max(rows, 0), 65535), min(max(cols, 0), 65534)
    size = struct.pack("HHHH", rows, cols, 0, 0)
    with contextlib.suppress(OSError):
        before = fcntl.ioctl(terminal, termios.TIOCGWINSZ, b"\0" * 8)
        if before[:4] == size[:4]:
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols + 1, 0, 0))
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
