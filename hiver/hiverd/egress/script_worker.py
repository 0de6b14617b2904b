"""A worker: the process that runs scripts, one fork of it for each run, so that no run finds a trace of another.

Descriptor 0 is a socket: calls come in and answers go out there, read and written by the forks. Descriptor 1 is for the
worker alone: `READY` when a new fork stands and all of the last run is over. The worker itself never sees a call.
It ends when the server closes the socket or dies.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from typing import Final, NoReturn

from hiverd.egress import script_jail
from hiverd.egress.script_frames import CPU_SECONDS, READY, SIZE_BYTES, Answer, decode_call, frame
from hiverd.egress.script_vm import Machine

_CHANNEL: Final = 0
_NOTICES: Final = 1
_OVER: Final = 3
"""Exit status of a run for which no call came."""
_READ_BYTES: Final = 1 << 20


def main() -> None:
    """Serves until there is no server any more."""
    script_jail.enter()
    gc.freeze()
    worker = os.getpid()
    while True:
        pid = os.fork()
        if pid == 0:
            _run_once(worker)
        os.write(_NOTICES, READY)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGXCPU):
            _write(frame(Answer(failure="time")))
        elif status != 0:
            os._exit(0 if os.WIFEXITED(status) and os.WEXITSTATUS(status) == _OVER else 1)
        _discard_rest()


def _run_once(worker: int) -> NoReturn:
    """In the fork: one call, one answer. What is left of it after the answer is thrown away with the process."""
    status = 1
    try:
        script_jail.die_with_parent()
        if os.getppid() != worker:
            os._exit(status)
        os.close(_NOTICES)
        machine = Machine()
        script_jail.enter_run()
        status = _serve(machine)
    finally:
        os._exit(status)


def _serve(machine: Machine) -> int:
    size = _read(SIZE_BYTES)
    if len(size) < SIZE_BYTES:
        return _OVER
    content = _read(int.from_bytes(size))
    # From here on the kernel kills this process at the end of its time, whatever it is busy with.
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        answer = frame(machine.run(decode_call(content)))
    except MemoryError:
        answer = frame(Answer(failure="memory"))
    signal.setitimer(signal.ITIMER_PROF, 0)  # an answer is written wholly or not at all
    _write(answer)
    return 0


def _read(size: int) -> bytes:
    """That many bytes; fewer if the server has closed."""
    pieces = bytearray()
    while len(pieces) < size and (piece := os.read(_CHANNEL, min(size - len(pieces), _READ_BYTES))):
        pieces += piece
    return bytes(pieces)


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(_CHANNEL, view) :]


def _discard_rest() -> None:
    """What the last run has not read of its call must not be taken for the next one's."""
    os.set_blocking(_CHANNEL, False)
    with contextlib.suppress(BlockingIOError):
        while os.read(_CHANNEL, _READ_BYTES):
            pass
    os.set_blocking(_CHANNEL, True)


if __name__ == "__main__":
    main()
