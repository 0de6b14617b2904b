"""conmon, the monitor of one sandbox or of one terminal session: it outlives the server, keeps the output's log, holds
the terminal and writes the exit code to a file."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path
from typing import Final

from msgspec import Struct

from hiverd.contracts.errors import BackendError

from . import pids
from .children import Children
from .runtime import ENVIRONMENT, RuntimeCalls

_ANSWER_SECONDS: Final = 120.0
"""How long a runtime may take on a machine in distress before we give up."""


class Monitor(Struct, frozen=True, kw_only=True):
    """Files of one conmon, all below two folders of ours."""

    folder: Path
    """Private files: bundle or process document, pid files, attach socket, control fifo."""
    log: Path
    exit_dir: Path

    @property
    def pid_file(self) -> Path:
        """Pid of the monitored process."""
        return self.folder / "pid"

    @property
    def conmon_pid_file(self) -> Path:
        """Pid of conmon itself."""
        return self.folder / "conmon.pid"

    @property
    def attach_socket(self) -> Path:
        """Sequenced packets; input without a prefix, output with one byte that names the stream."""
        return self.folder / "attach"

    @property
    def control_fifo(self) -> Path:
        """Takes `1 <rows> <columns>` lines."""
        return self.folder / "ctl"

    def exit_code(self, sandbox_id: str) -> int | None:
        """None while the process runs, or when its end was not recorded."""
        try:
            return int((self.exit_dir / sandbox_id).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def running_conmon(self, sandbox_id: str) -> int | None:
        """conmon's pid if it runs; the command line tells it from a process that was given the same pid later."""
        try:
            pid = int(self.conmon_pid_file.read_text())
            arguments = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return pid if sandbox_id.encode() in arguments else None

    def is_running(self, sandbox_id: str) -> bool:
        """Whether conmon is there to record the end of its process."""
        return self.running_conmon(sandbox_id) is not None


class ConmonProgram(Struct, frozen=True):
    path: str
    version: str
    skips_log_sync: bool
    """Knows `--no-sync-log`."""


class Conmon:
    """Starts monitors."""

    def __init__(self, program: ConmonProgram, calls: RuntimeCalls, children: Children, log_max_bytes: int) -> None:
        self._program = program
        self._calls = calls
        self._children = children
        self._log_max_bytes = log_max_bytes

    async def create(self, sandbox_id: str, monitor: Monitor) -> int:
        """Creates the container of the bundle in `monitor.folder`. Returns the pid of its process 1, not yet begun."""
        return await self._start(sandbox_id, monitor, [])

    async def exec_session(self, container_id: str, monitor: Monitor, process_document: Path, *, terminal: bool) -> int:
        """Runs a process in a running container, with a terminal of its own or with empty input. Returns its pid."""
        extra = ["--exec", "--exec-process-spec", str(process_document)]
        if terminal:
            extra += ["--terminal", "--stdin", "--leave-stdin-open"]
        return await self._start(container_id, monitor, extra)

    def _argv(self, sandbox_id: str, monitor: Monitor, extra: list[str]) -> list[str]:
        argv = [self._program.path, "--api-version", "1", "--cid", sandbox_id, "--cuuid", sandbox_id]
        argv += ["--name", sandbox_id, "--runtime", self._calls.program]
        for argument in self._calls.runtime.global_arguments(self._calls.state_dir):
            argv += ["--runtime-arg", argument]
        argv += ["--bundle", str(monitor.folder), "--container-pidfile", str(monitor.pid_file)]
        argv += ["--conmon-pidfile", str(monitor.conmon_pid_file), "--exit-dir", str(monitor.exit_dir)]
        argv += ["--log-path", f"k8s-file:{monitor.log}", "--log-size-max", str(self._log_max_bytes)]
        argv += ["--full-attach", "--log-level", "error"]
        if self._program.skips_log_sync:
            argv.append("--no-sync-log")
        return argv + extra

    async def _start(self, sandbox_id: str, monitor: Monitor, extra: list[str]) -> int:
        receiver, sender = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            try:
                child = self._children.spawn(
                    self._argv(sandbox_id, monitor, extra),
                    pass_fds=(sender,),
                    env={**ENVIRONMENT, "_OCI_SYNCPIPE": str(sender)},
                    new_session=True,
                )
            finally:
                os.close(sender)
            answer = await _read_answer(receiver)
        finally:
            os.close(receiver)
        await child.wait()
        self._watch_monitor(monitor)
        return _judge(answer)

    def _watch_monitor(self, monitor: Monitor) -> None:
        # conmon detaches itself and so becomes an orphan of ours, to be reaped when it ends.
        with contextlib.suppress(OSError, ValueError):
            self._children.watch(int(monitor.conmon_pid_file.read_text()))


async def _read_answer(receiver: int) -> bytes:
    answer = b""
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            while not answer.endswith(b"\n"):
                await pids.wait_readable(receiver)
                piece = os.read(receiver, 65536)
                if not piece:
                    break
                answer += piece
    except TimeoutError:
        raise BackendError(f"the runtime gave no answer for {_ANSWER_SECONDS:.0f} s") from None
    return answer


def _judge(answer: bytes) -> int:
    """The pid in conmon's answer, `{"data": pid}`; a negative one comes with the runtime's message."""
    try:
        # For a process that has ended already, its exit code follows on a line of its own.
        document = json.loads(answer.partition(b"\n")[0])
        number = int(document.get("data", document.get("pid", -1)))
    except (ValueError, AttributeError):
        raise BackendError("conmon ended without an answer") from None
    if number <= 0:
        raise BackendError(f"the runtime failed: {_message(document)}")
    return number


def _message(document: dict[str, object]) -> str:
    text = str(document.get("message") or "no reason given").strip()
    line = text.splitlines()[-1] if text else text
    with contextlib.suppress(ValueError):
        entry = json.loads(line)
        if isinstance(entry, dict) and "msg" in entry:
            return str(entry["msg"])
    return line
