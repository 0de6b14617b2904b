"""Commands inside a sandbox: buffered, streamed and on a terminal (PROTOCOL 3.11, 3.12, 0.8)."""

from __future__ import annotations

import asyncio
import codecs
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Final

from msgspec import Struct

from hiverd.clock import Clock
from hiverd.contracts.errors import ConflictError, NotFoundError
from hiverd.contracts.isolation import ExecProcess, ExecSpec, Stream
from hiverd.sandboxes.sandbox import Sandbox
from hiverd.sandboxes.stdio import StdioLimits, StdioRecorder
from hiverd.state.journal import Journal
from hiverd.wire.answers import ExecResult
from hiverd.wire.events import ExecRequestEvent, ExecResponseEvent
from hiverd.wire.requests import ExecRequest, argv_of, display_command

EXIT_KILLED: Final = 137
SHELL: Final = ("sh",)


class ExecLimits(Struct, frozen=True):
    max_output_bytes: int
    """Per stream of a buffered exec; what exceeds it is read and dropped, and the answer says so."""
    stdio: StdioLimits


class Command(Struct, frozen=True):
    """A command as asked for: `argv` is run, `display` is shown in events."""

    argv: tuple[str, ...]
    display: str
    cwd: str = ""
    env: Mapping[str, str] = {}
    tty: bool = False


class RunningCommand:
    """A started command: its output, its input, its end. Registered in the sandbox until it is closed."""

    def __init__(
        self, sandbox: Sandbox, exec_id: str, command: Command, process: ExecProcess, recorder: StdioRecorder | None
    ) -> None:
        self._sandbox = sandbox
        self._id = exec_id
        self._process = process
        self._recorder = recorder
        self._killed = False
        self._closing: asyncio.Task[None] | None = None
        self._request_id = 0
        sandbox.execs[exec_id] = self
        if recorder is not None:
            request = ExecRequestEvent(cwd=command.cwd or "/", command=command.display)
            self._request_id = sandbox.events.emit(request)

    async def pieces(self, journal: Journal) -> AsyncIterator[tuple[Stream, bytes] | int]:
        """Output as it comes, and at last the exit code. What is not asked for is not read: the command waits."""
        async for stream, data in self._process.output():
            if self._recorder is not None:
                self._recorder.feed(stream, data)
                await journal.room()
            yield stream, data
        exit_code = await self._process.wait()
        yield EXIT_KILLED if self._killed else exit_code

    async def write(self, data: bytes, size: tuple[int, int] | None) -> None:
        if size is not None:
            self._process.resize(*size)
        else:
            await self._process.write(data)

    async def kill(self) -> None:
        """Ends it from outside: the sandbox is being shut down. Its reader still gets the output and an exit code."""
        self._killed = True
        await self._process.kill()

    async def close(self) -> None:
        """Kills what is left of it and records the end. Any number of callers; goes on if they leave."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name=f"close-exec-{self._id}")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            await self._process.close()
        finally:
            self._sandbox.execs.pop(self._id, None)
            if self._recorder is not None:
                self._recorder.finish()
                self._sandbox.events.emit(ExecResponseEvent(request_id=self._request_id))


class Execs:
    """Starts commands in sandboxes and records them."""

    def __init__(self, journal: Journal, clock: Clock, limits: ExecLimits) -> None:
        self.journal = journal
        self._clock = clock
        self._limits = limits

    async def start(self, sandbox: Sandbox, exec_id: str, command: Command, *, stdin: bool) -> RunningCommand:
        """The caller must `close` what this returns. `ConflictError` if the id is in use."""
        if exec_id in sandbox.execs or exec_id in sandbox.viewers:
            raise ConflictError(f'exec "{exec_id}" is running already; use a new id for each command')
        _require_running(sandbox)
        spec = ExecSpec(
            exec_id=exec_id,
            argv=command.argv,
            env=dict(command.env),
            cwd=command.cwd,
            tty=command.tty,
            stdin=stdin or command.tty,
        )
        process = await sandbox.workload.exec(spec)
        try:
            # It may have begun to stop while the command was starting: its own sweep over commands has been and gone.
            _require_running(sandbox)
        except BaseException:
            await process.close()
            raise
        recorder = None if command.tty else StdioRecorder(sandbox.events, self._limits.stdio, self._clock)
        return RunningCommand(sandbox, exec_id, command, process, recorder)

    async def run_buffered(self, sandbox: Sandbox, command: Command) -> ExecResult:
        """Runs to the end of output and collects it. Cancelling kills the whole process tree."""
        running = await self.start(sandbox, str(uuid.uuid4()), command, stdin=False)
        buffers = {"stdout": bytearray(), "stderr": bytearray()}
        dropped = {"stdout": 0, "stderr": 0}
        exit_code = 0
        try:
            async for piece in running.pieces(self.journal):
                if isinstance(piece, int):
                    exit_code = piece
                    continue
                stream, data = piece
                kept = data[: max(0, self._limits.max_output_bytes - len(buffers[stream]))]
                buffers[stream] += kept
                dropped[stream] += len(data) - len(kept)
        finally:
            await running.close()
        return ExecResult(
            stdout=_text(buffers["stdout"], dropped["stdout"]),
            stderr=_text(buffers["stderr"], dropped["stderr"]),
            exit_code=exit_code,
            stdout_truncated_bytes=dropped["stdout"],
            stderr_truncated_bytes=dropped["stderr"],
        )

    async def write(self, sandbox: Sandbox, exec_id: str, data: bytes, size: tuple[int, int] | None) -> None:
        """Standard input, or a new terminal size, of a running command or of the entrypoint's terminal."""
        running = sandbox.execs.get(exec_id)
        if running is not None:
            await running.write(data, size)
        elif exec_id in sandbox.viewers and sandbox.terminal is not None:
            await sandbox.terminal.write(data, size)
        else:
            raise NotFoundError(f'no exec "{exec_id}" is running in sandbox "{sandbox.key}"')


def _require_running(sandbox: Sandbox) -> None:
    if sandbox.status != "running":
        raise NotFoundError(f'sandbox "{sandbox.key}" is {sandbox.status}')


def command_of(request: ExecRequest) -> Command | None:
    """A request's command; None for an empty one. A string runs in a shell, a list is the argv itself (0.8)."""
    argv = argv_of(request.command)
    if argv is None:
        return None
    return Command(
        argv=argv,
        display=display_command(request.command),
        cwd=request.cwd or "",
        env=request.env or {},
        tty=bool(request.tty),
    )


def shell_command(request: ExecRequest) -> Command:
    """A fresh shell on a terminal, where there is no entrypoint terminal to attach to (PROTOCOL 3.12)."""
    return Command(argv=SHELL, display=SHELL[0], cwd=request.cwd or "", env=request.env or {}, tty=True)


def _text(data: bytearray, dropped_bytes: int) -> str:
    text = data.decode("utf-8", "replace")
    if dropped_bytes:
        text += f"\n[output cut here: {dropped_bytes} more bytes; see exec.max_output_bytes, or use exec_stream]\n"
    return text


class Utf8Pieces:
    """Decodes a byte stream piece by piece, keeping an incomplete character for the next piece."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes, *, final: bool = False) -> str:
        return self._decoder.decode(data, final)
