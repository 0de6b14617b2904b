"""The server's side of one worker: starting it, one exchange at a time, and making sure that nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Final

from hiverd.egress.script_frames import MAX_FRAME_BYTES, READY, SIZE_BYTES

SUBCOMMAND: Final = "script-worker"
"""Of the command line, hidden: how a frozen binary starts a worker from itself."""
_BOOT: Final = "import sys; sys.path[:] = sys.argv[1:]; from hiverd.egress.script_worker import main; main()"
_FROZEN_VARIABLES: Final = ("_PYI_", "_MEI", "LD_LIBRARY_PATH")
"""What lets a frozen binary find what it has unpacked already."""
_READ_BYTES: Final = 256 * 1024
_NOTICE_BYTES: Final = 64
_REAP_SECONDS: Final = 0.01

log = logging.getLogger(__name__)


class WorkerLostError(Exception):
    """The worker has ended, or does not keep to the protocol."""


class WorkerProcess:
    """Starts when made. It has no environment, and its command line says nothing about scripts.

    Must be made in a thread that lives as long as the server, as the worker dies with the thread that started it.
    Raises `OSError` if it cannot be started.
    """

    def __init__(self, on_end: Callable[[WorkerProcess], None]) -> None:
        """`on_end` is called once, when the process is gone."""
        self.ended = asyncio.Event()
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._calls = 0
        self._runs = 0
        """That the worker has made ready, the next one included."""
        self._killed = False
        self._exchanging = False
        self._reaped = False
        self._on_settled: Callable[[WorkerProcess], None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        with contextlib.ExitStack() as opened:
            self._channel, theirs = socket.socketpair()
            opened.callback(self._channel.close)
            notices, their_notices = os.pipe()
            opened.callback(os.close, notices)
            try:
                self._process = _start(theirs.fileno(), their_notices)
            finally:
                theirs.close()
                os.close(their_notices)
            self._pidfd = os.pidfd_open(self._process.pid)
            opened.pop_all()
        self._notices = notices
        self._channel.setblocking(False)
        os.set_blocking(notices, False)
        self._loop.add_reader(notices, self._read_notices)
        self._loop.add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def clean(self) -> bool:
        """It lives, and nothing has come from it unasked."""
        try:
            self._channel.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return not (self._killed or self.ended.is_set())
        except OSError:
            pass
        return False

    async def exchange(self, call: bytes) -> bytes:
        """Sends a frame and returns the content of the one that comes back. Raises `WorkerLostError`.

        After any other exception, cancellation for instance, the worker has to be killed.
        """
        self._calls += 1
        self._exchanging = True
        try:
            await self._loop.sock_sendall(self._channel, call)
            size = int.from_bytes(await self._receive(SIZE_BYTES))
            if size > MAX_FRAME_BYTES:
                raise WorkerLostError
            return await self._receive(size)
        except OSError as error:
            raise WorkerLostError from error
        finally:
            self._exchanging = False
            if self._reaped:
                self._channel.close()

    def settle(self, then: Callable[[WorkerProcess], None], seconds: float) -> None:
        """After an exchange: calls `then` once the run is over and another one can come. Kills the worker if that
        takes longer than so many seconds."""
        self._on_settled = then
        self._deadline = self._loop.call_later(seconds, self.kill)
        self._tell_if_settled()

    def kill(self) -> None:
        """At once, with what it runs. Idempotent; it is gone a moment later."""
        self._killed = True
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)  # a group of its own, which lasts until it is reaped

    async def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = await self._loop.sock_recv(self._channel, min(size - len(data), _READ_BYTES))
            if not piece:
                raise WorkerLostError
            data += piece
        return bytes(data)

    def _read_notices(self) -> None:
        data = os.read(self._notices, _NOTICE_BYTES)
        if not data:
            self._loop.remove_reader(self._notices)
        self._runs += data.count(READY)
        self._tell_if_settled()

    def _tell_if_settled(self) -> None:
        then = self._on_settled
        if then is not None and self._runs > self._calls and not self._killed:
            self._forget_deadline()
            then(self)

    def _forget_deadline(self) -> None:
        self._on_settled = None
        if self._deadline is not None:
            self._deadline.cancel()

    def _reap(self) -> None:
        """The worker has ended, and takes a run that it leaves behind with it.

        Such a run is a child of ours then where this server is a subreaper (the `oci` plug-in makes it one).
        """
        self._loop.remove_reader(self._pidfd)
        if not self._killed:
            self.kill()
            log.warning("a worker of override_script has ended by itself")
        self._process.wait()
        self._reaped = True
        self._forget_deadline()
        self._loop.remove_reader(self._notices)
        os.close(self._notices)
        os.close(self._pidfd)
        if not self._exchanging:  # otherwise whoever waits for an answer is about to see the end
            self._channel.close()
        self._reap_run()

    def _reap_run(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while os.waitid(os.P_PGID, self.pid, os.WEXITED | os.WNOHANG) is not None:
                pass
            self._loop.call_later(_REAP_SECONDS, self._reap_run)
            return
        self.ended.set()
        self._on_end(self)


def _start(channel: int, notices: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(),
        stdin=channel,
        stdout=notices,
        stderr=subprocess.DEVNULL,
        env=_environment(),
        cwd="/",
        start_new_session=True,
    )


def command() -> list[str]:
    """The argv of a worker, whichever way this server was started."""
    if _frozen():
        return [sys.executable, SUBCOMMAND]
    # Not by way of the command line, and without `site`: both would cost more than all the rest.
    return [sys.executable, "-I", "-S", "-c", _BOOT, *(os.path.abspath(entry) for entry in sys.path)]


def _environment() -> dict[str, str]:
    if not _frozen():
        return {}
    return {name: value for name, value in os.environ.items() if name.startswith(_FROZEN_VARIABLES)}


def _frozen() -> bool:
    return bool(getattr(sys, "frozen", False))
