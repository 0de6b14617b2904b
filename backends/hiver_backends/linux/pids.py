"""Processes by identity: a pid together with its start time, so that a reused pid is never taken for the old one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import select
import signal
from pathlib import Path
from typing import Final, NamedTuple

_BOOT_ID_FILE: Final = Path("/proc/sys/kernel/random/boot_id")


class ProcessStat(NamedTuple):
    """What we need of /proc/<pid>/stat (proc(5))."""

    name: str
    state: str
    parent: int
    session: int
    start_ticks: int


@functools.cache
def boot_id() -> str:
    """Changes with every boot of the kernel; start times compare only within one."""
    return _BOOT_ID_FILE.read_text().strip()


def read_stat(pid: int) -> ProcessStat | None:
    """None when there is no such process."""
    try:
        text = Path("/proc", str(pid), "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name, in parentheses, may hold anything: count from its end.
    fields = text[text.rindex(")") + 2 :].split()
    name = text[text.index("(") + 1 : text.rindex(")")]
    return ProcessStat(name, fields[0], int(fields[1]), int(fields[3]), int(fields[19]))


def open_verified(pid: int, start_ticks: int) -> int | None:
    """A pidfd of exactly that process; None if it is gone (a zombie is still there)."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        stat = read_stat(pid)
        if stat is not None and stat.start_ticks == start_ticks:
            return descriptor
        os.close(descriptor)
    return None


def has_ended(descriptor: int) -> bool:
    """Whether the process behind a pidfd has ended, reaped or not."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def send_signal(descriptor: int, number: int) -> None:
    """Through a pidfd; harmless when the process has ended."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, number)


async def wait_readable(descriptor: int) -> None:
    """Until a descriptor (a pidfd that ends, a pipe with data) is readable. One waiter per descriptor at a time."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(descriptor, _set, ready)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


async def wait_writable(descriptor: int) -> None:
    """Until a descriptor is writable. One waiter per descriptor at a time."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_writer(descriptor, _set, ready)
    try:
        await ready
    finally:
        loop.remove_writer(descriptor)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def exit_code(status: os.waitid_result) -> int:
    """A shell's view: 128+n for signal n."""
    return status.si_status if status.si_code == os.CLD_EXITED else 128 + status.si_status


def reap(descriptor: int) -> int | None:
    """Collects an ended child through its pidfd and returns its exit code; None if it is no (ended) child of ours."""
    try:
        result = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    return None if result is None else exit_code(result)


def descendants(pid: int, candidates: dict[int, ProcessStat]) -> set[int]:
    """Those of `candidates` that descend from `pid` or are in the session that it leads, itself included."""
    found = {pid} & candidates.keys()
    found |= {other for other, stat in candidates.items() if stat.session == pid}
    while True:
        more = {other for other, stat in candidates.items() if stat.parent in found or stat.parent == pid} - found
        if not more:
            return found
        found |= more
