"""Programs that run for a while and report as they go: skopeo and umoci."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from hiver_backends.linux import pids
from hiver_backends.linux.children import Children

_REAP_SECONDS: Final = 5.0


class Result(NamedTuple):
    code: int
    tail: str
    """The last lines of output and errors together."""


async def run(
    children: Children, argv: Sequence[str], on_line: Callable[[str], None], env: Mapping[str, str] | None = None
) -> Result:
    """Runs a program, standard output and error together by the line. Cancelling kills it with all it started.

    Raises `FileNotFoundError` if there is no such program.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(reader, False)
    tail: deque[str] = deque(maxlen=20)
    try:
        try:
            child = children.spawn(argv, stdout=writer, stderr=writer, env=env, new_session=True)
        finally:
            os.close(writer)
        try:
            await _read_lines(reader, tail, on_line)
            code = await child.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await asyncio.wait({child.exited}, timeout=_REAP_SECONDS)
            raise
    finally:
        os.close(reader)
    return Result(code, "\n".join(tail))


async def _read_lines(reader: int, tail: deque[str], on_line: Callable[[str], None]) -> None:
    rest = b""
    while True:
        try:
            piece = os.read(reader, 65536)
        except BlockingIOError:
            await pids.wait_readable(reader)
            continue
        *lines, rest = (rest + piece).replace(b"\r", b"\n").split(b"\n")
        if not piece and rest:
            lines.append(rest)
        for line in lines:
            text = line.decode(errors="replace").strip()
            if text:
                tail.append(text[:500])
                on_line(text[:500])
        if not piece:
            return
        rest = rest[-65536:]
        await asyncio.sleep(0)
